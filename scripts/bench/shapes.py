"""Models of the shapes that people train and ask, with random weights: speed asks not what a model knows."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from prefopt import pocket
from prefopt.diffusion.sampling import load_pipeline
from prefopt.judges.rubric import RUBRICS

RESOLUTION = {"pocket": 64, "half-sd15": 256, "sd15": 512, "sdxl": 1024}
SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# Dimensions from the published config.json of Stable Diffusion 1.5, 2.1 and SDXL 1.0.
SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
}
SD21: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
}

# LLaVA-NeXT on Vicuna 7B, from its published config.json; and a small one that reads as many image tokens.
TILE, PATCH = 336, 14
TILES = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
VISION: dict[str, dict[str, Any]] = {
    "25m": {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 4},
    "7b": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    },
}
LANGUAGE: dict[str, dict[str, Any]] = {
    "25m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
    },
    "7b": {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# LLaVA-1.5 on Vicuna 7B; and small ones: the second reads as many image tokens, 576.
LLAVA_15: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 56,
        "vision": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
        "text": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
        "layers": (3, 2),
    },
    "small": {
        "image_size": TILE,
        "vision": {"hidden_size": 160, "intermediate_size": 640, "num_attention_heads": 4},
        "text": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8},
        "layers": (3, 7),
    },
    "7b": {
        "image_size": TILE,
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
        "text": {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
        },
        "layers": (24, 32),
    },
}


def build_llava_15(size: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A LLaVA-1.5 of a size, and its processor; of a text, each of the words `0`, `1`, ... is a token."""
    shape, special = LLAVA_15[size], ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
    words = [str(number) for number in range(shape["text"]["vocab_size"] - len(special))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    side = shape["image_size"]
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace(
            "{% endfor %} {% endfor %}",
            "{% endfor %} {% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
        ),
    )
    tower, language = shape["layers"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=side, patch_size=PATCH, num_hidden_layers=tower, **shape["vision"]
        ),
        text_config=LlamaConfig(
            max_position_embeddings=4096,
            num_hidden_layers=language,
            pad_token_id=special.index("<pad>"),
            bos_token_id=special.index("<s>"),
            eos_token_id=special.index("</s>"),
            **shape["text"],
        ),
        image_token_index=special.index("<image>"),
        image_seq_length=(side // PATCH) ** 2,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:  # seven billion random numbers take minutes on a CPU
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(default)
    return model, processor


def save_vlm(size: str, folder: Path, dtype: torch.dtype, device: torch.device) -> str:
    """Save a LLaVA-NeXT of a size with its processor; an image of 672 x 672 is 2,928 tokens to it."""
    torch.manual_seed(0)
    tokenizer = _chat_tokenizer()
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=TILES,
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=TILE, patch_size=PATCH, **VISION[size]),
        text_config=LlamaConfig(max_position_embeddings=4096, **LANGUAGE[size], **ids),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=TILES,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:  # seven billion random numbers take minutes on a CPU
        model = LlavaNextForConditionalGeneration(config)
    torch.set_default_dtype(default)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _chat_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that cuts the rubrics' questions into about one and a half tokens a word."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [file.read_text(encoding="utf-8") for file in sorted(RUBRICS.glob("*.yaml"))]
    tokenizer.train_from_iterator([*texts, *["Yes No"] * 50], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def build(size: str) -> DiffusionPipeline:
    """A pipeline of one of the sizes, float32, on the CPU."""
    # Any: diffusers annotates its constructors more narrowly than it calls them itself.
    scheduler: Any = DDPMScheduler(**SCHEDULE)
    nothing: Any = None
    torch.manual_seed(0)
    if size == "pocket":
        return load_pipeline("pocket")
    if size == "sdxl":
        return StableDiffusionXLPipeline(
            vae=_vae((128, 256, 512, 512), scaling_factor=0.13025),
            text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, projection_dim=1280)),
            tokenizer=_tokenizer(),
            tokenizer_2=_tokenizer(),
            unet=UNet2DConditionModel(**SDXL),
            scheduler=scheduler,
        )
    halved = {"block_out_channels": (160, 320, 640, 640), "sample_size": 32} if size == "half-sd15" else {}
    return StableDiffusionPipeline(
        vae=_vae((64, 128, 256, 256) if halved else (128, 256, 512, 512)),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        tokenizer=_tokenizer(),
        unet=UNet2DConditionModel(**{**SD15, **halved}),
        scheduler=scheduler,
        safety_checker=nothing,
        feature_extractor=nothing,
        requires_safety_checker=False,
    )


def _vae(channels: Any, scaling_factor: float = 0.18215) -> AutoencoderKL:
    blocks: Any = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        scaling_factor=scaling_factor,
    )


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(pocket.folder("text_to_image") / "tokenizer", model_max_length=77)
