"""A tiny random LLaVA with a real byte-level BPE tokenizer and processor, and vision preference rows for it.

Images are 32 x 32: sixteen placeholder tokens each. `LLAVA_1_5` writes neither BOS nor EOS, like the template
of llava-1.5-7b-hf; `CLOSED` writes both, so another trainer that adds nothing reads the same tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

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


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 320 tokens, trained on the rows above; adds BOS by itself, as Llama's does."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [_row(i) for i in range(12)]
    texts = [row[side][0]["content"] for row in rows for side in ("prompt", "chosen", "rejected")]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        model_max_length=512,
        padding_side="left",
    )
