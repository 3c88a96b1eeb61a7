"""Tiny random models of the real classes, saved to folders: what the tests load instead of a download.

Images are 16 x 16, latents 4 x 8 x 8. The tokenizer is a real CLIPTokenizer over single bytes, so any text
encodes, one token a character, 77 at most.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

SIZE = 16
WIDTH = 16


def tiny_stable_diffusion(folder: str | Path, *, prediction_type: str = "epsilon", seed: int = 0) -> str:
    """Save a StableDiffusionPipeline ("epsilon" or "v_prediction"); return its folder."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=_tokenizer(),
        unet=UNet2DConditionModel(**_unet_arguments(), cross_attention_dim=WIDTH),
        scheduler=_scheduler(prediction_type),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    return _save(pipeline, folder)


def tiny_sdxl(folder: str | Path, seed: int = 0) -> str:
    """Save a StableDiffusionXLPipeline, two text encoders and size conditioning; return its folder."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **_unet_arguments(),
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config()),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=_scheduler("epsilon"),
        add_watermarker=False,
    )
    return _save(pipeline, folder)


def tiny_clip(folder: str | Path, seed: int = 0) -> str:
    """Save a CLIPModel and its CLIPProcessor; return the folder."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
    }
    config = CLIPConfig(text_config=_text_config().to_dict(), vision_config=vision, projection_dim=WIDTH)
    CLIPModel(config).save_pretrained(folder)
    side = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side)
    CLIPProcessor(image_processor=processor, tokenizer=_tokenizer()).save_pretrained(folder)
    return str(folder)


def _tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _text_config() -> CLIPTextConfig:
    tokenizer = _tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
    )


def _unet_arguments() -> dict:
    return {
        "sample_size": SIZE // 2,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _save(pipeline: DiffusionPipeline, folder: str | Path) -> str:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return str(folder)


def tiny_adapter(model: str | Path, folder: str | Path, *, size: float = 1.0, seed: int = 0) -> str:
    """Save a random LoRA of rank 2 on the UNet of the pipeline `model`, its second factors times `size`."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))
    factors = get_peft_model_state_dict(pipeline.unet)
    factors = {name: factor * size if "lora_B" in name else factor for name, factor in factors.items()}
    type(pipeline).save_lora_weights(folder, unet_lora_layers=convert_state_dict_to_diffusers(factors))
    return str(folder)
