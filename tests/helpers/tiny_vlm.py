"""A tiny random LLaVA with a real byte-level BPE tokenizer and processor, and vision preference rows for it.

Images are 32 x 32: sixteen placeholder tokens each. `LLAVA_1_5` writes neither BOS nor EOS, like the template
of llava-1.5-7b-hf; `CLOSED` writes both, so another trainer that adds nothing reads the same tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

# peft 0.21 still asks a transformers model by the older name.
PEFT_ON_TRANSFORMERS_5 = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"

SIDE = 32
PATCH = 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2

_BODY = (
    "{% for m in messages %}"
    "{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] + AFTER }}{% endif %}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_1_5 = _BODY.replace("AFTER", "' '")
CLOSED = "{{ bos_token }}" + _BODY.replace("AFTER", "(eos_token if m['role'] == 'assistant' else ' ')")

ANIMALS = ("elephant", "giraffe", "zebra")
COLOURS = ("red", "green", "blue", "grey")


def tiny_llava(folder: str | Path, *, template: str = CLOSED, seed: int = 0) -> str:
    """Save a random LlavaForConditionalGeneration and its LlavaProcessor; return their folder."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # wide enough that the completions' probabilities differ visibly
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)


def vision_pairs(count: int = 12) -> Dataset:
    """Pairs in trl's conversational vision preference format: images (one each), prompt, chosen, rejected."""
    rows = [_row(i) for i in range(count)]
    message = {"role": Value("string"), "content": Value("string")}
    features = Features(
        images=List(Image()), **dict.fromkeys(("prompt", "chosen", "rejected"), List(message))
    )
    return Dataset.from_list(rows, features=features)


def picture(i: int) -> Pictures.Image:
    """A plain 40 x 36 picture, another colour for another i."""
    return Pictures.new("RGB", (40, 36), (37 * i % 256, 91 * i % 256, 151 * i % 256))


def _row(i: int) -> dict:
    animal, colour = ANIMALS[i % 3], COLOURS[i % 4]
    question = f"What animal is it{' and which colour has it' * (i % 2)}?"
    answer = f"It is a {colour} {animal}" + ", seen from afar in the evening." * (i % 3)
    other = f"A {COLOURS[(i + 1) % 4]} {ANIMALS[(i + 1) % 3]}."
    return {
        "images": [picture(i)],
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": other}],
    }


def _tokenizer(image_token: str = "<image>", more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 320 tokens, trained on the rows above and more texts; adds BOS, as Llama's."""
    special = ["<pad>", "<s>", "</s>", image_token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=320 + 10 * len(more),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [_row(i) for i in range(12)]
    texts = [row[side][0]["content"] for row in rows for side in ("prompt", "chosen", "rejected")]
    tokenizer.train_from_iterator([*texts, *more], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[image_token],
        model_max_length=512,
        padding_side="left",
    )


# Spelled often enough that each becomes one token.
ANSWERS = ("Yes No yes no YES NO", "No no NO Yes yes YES", "Yes\nyes\nYES\nNo\nno\nNO\nA\nB\nC") * 8
TILES = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm")

# SmolVLM's processor needs another library for the numbers of videos, of which there are none here.
processing_smolvlm.num2words = processing_smolvlm.num2words or str


def tiny_judge(folder: str | Path, family: str = "llava", *, seed: int = 0, **text: Any) -> str:
    """Save a random model of a family whose tokenizer knows yes and no as single tokens; return the folder.

    `text` changes the language model's configuration. Pictures of other sizes take another number of tokens,
    except with `llava`.
    """
    tokenizer = _tokenizer("<|image_pad|>" if family.startswith("qwen") else "<image>", ANSWERS)
    processor, model_class, config = {
        "llava": _llava,
        "llava_next": _llava_next,
        "llava_onevision": _llava_onevision,
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_vl": _qwen3_vl,
        "idefics3": _idefics3,
        "smolvlm": _smolvlm,
    }[family](tokenizer, text)
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def tiny_vlm(folder: str | Path, family: str = "llava", *, seed: int = 0, **text: Any) -> str:
    """As `tiny_judge`, with layers of 64 inputs: bitsandbytes on a CPU reads others in 4 bits wrongly."""
    return tiny_judge(folder, family, seed=seed, **{"hidden_size": 64, "num_attention_heads": 8, **text})


def _text(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + 6,  # two more that the processor adds, and a few that nothing uses
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }


def _vision(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.3,  # so that what an image shows is seen in the answers
        **changes,
    }


def _llava(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[Any, Any, Any]:
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CLOSED,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=CONFIG_MAPPING[text.get("model_type", "llama")](**_text(tokenizer, **text)),
        image_token_index=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS,
    )
    return processor, LlavaForConditionalGeneration, config


def _llava_next(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[Any, Any, Any]:
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=TILES
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CLOSED,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=LlamaConfig(**_text(tokenizer, **text)),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=TILES,
    )
    return processor, LlavaNextForConditionalGeneration, config


def _llava_onevision(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[Any, Any, Any]:
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=TILES),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=IMAGE_TOKENS,
        vision_feature_select_strategy="full",
        chat_template=CLOSED,
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_vision(), vision_use_head=False),
        text_config=Qwen2Config(**_text(tokenizer, **text)),
        image_token_index=processor.image_token_id,
        video_token_index=len(tokenizer) + 4,
        image_grid_pinpoints=TILES,
    )
    return processor, LlavaOnevisionForConditionalGeneration, config


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[Any, Any, Any]:
    patches: dict[str, Any] = {"patch_size": PATCH, "temporal_patch_size": 2}
    pixels: dict[str, Any] = {"min_pixels": SIDE**2, "max_pixels": 4 * SIDE**2, "merge_size": 2, **patches}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CLOSED.replace("<image>", "<|image_pad|>"),
    )
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": text.get("hidden_size", 32),
            "spatial_merge_size": 2,
            "window_size": 2 * PATCH * 2,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.3,
            **patches,
        },
        text_config=_text(
            tokenizer, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}, **text
        ),
        image_token_id=processor.image_token_id,
        video_token_id=len(tokenizer) + 4,
        vision_start_token_id=len(tokenizer) + 5,
    )
    return processor, Qwen2_5_VLForConditionalGeneration, config


def _qwen3_vl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Features of two vision layers are added inside of the language model, behind its first two layers."""
    patches: dict[str, Any] = {"patch_size": PATCH, "temporal_patch_size": 2}
    pixels: dict[str, Any] = {"min_pixels": SIDE**2, "max_pixels": 4 * SIDE**2, "merge_size": 2, **patches}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(merge_size=2, **patches),
        chat_template=CLOSED.replace("<image>", "<|image_pad|>"),
    )
    config = Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": text.get("hidden_size", 32),
            "num_position_embeddings": IMAGE_TOKENS,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.3,
            **patches,
        },
        text_config=_text(
            tokenizer,
            num_hidden_layers=3,
            head_dim=8,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
            **text,
        ),
        image_token_id=processor.image_token_id,
        video_token_id=len(tokenizer) + 4,
        vision_start_token_id=len(tokenizer) + 5,
    )
    return processor, Qwen3VLForConditionalGeneration, config


def _idefics3(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[Any, Any, Any]:
    return _tiled(tokenizer, text, Idefics3Config, Idefics3ForConditionalGeneration)


def _smolvlm(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[Any, Any, Any]:
    return _tiled(tokenizer, text, SmolVLMConfig, SmolVLMForConditionalGeneration)


def _tiled(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], *classes: Any) -> tuple[Any, Any, Any]:
    """Both with SmolVLM's processor: Idefics3's own fails when control tokens are read as plain text."""
    sizes: dict[str, Any] = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(
            **sizes, video_sampling={"fps": 1, "max_frames": 2, "video_size": {"longest_edge": SIDE}}
        ),
        image_seq_len=IMAGE_TOKENS // 4,
        chat_template=CLOSED,
    )
    config_class, model_class = classes
    config = config_class(
        vision_config=_vision(),
        text_config=LlamaConfig(**_text(tokenizer, **text)),
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return processor, model_class, config
