"""Pipelines of the shapes that people train, with random weights: speed does not ask what a model knows."""

from __future__ import annotations

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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from prefopt import pocket
from prefopt.diffusion.sampling import load_pipeline

RESOLUTION = {"pocket": 64, "half-sd15": 256, "sd15": 512, "sdxl": 1024}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# Dimensions from the published config.json of Stable Diffusion 1.5 and SDXL 1.0.
SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
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
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}


def build(size: str) -> DiffusionPipeline:
    """A pipeline of one of the sizes, float32, on the CPU."""
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
            scheduler=DDPMScheduler(**SCHEDULE),
        )
    halved = {"block_out_channels": (160, 320, 640, 640), "sample_size": 32} if size == "half-sd15" else {}
    return StableDiffusionPipeline(
        vae=_vae((64, 128, 256, 256) if halved else (128, 256, 512, 512)),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        tokenizer=_tokenizer(),
        unet=UNet2DConditionModel(**{**SD15, **halved}),
        scheduler=DDPMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _vae(channels: tuple[int, ...], scaling_factor: float = 0.18215) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        scaling_factor=scaling_factor,
    )


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(pocket.folder("text_to_image") / "tokenizer", model_max_length=77)
