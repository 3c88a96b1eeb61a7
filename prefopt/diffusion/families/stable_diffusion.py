"""Stable Diffusion 1.x and 2.x: a UNet conditioned on one text encoder."""

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from prefopt.diffusion.schedule import DiscreteSchedule
from prefopt.errors import InputError


class StableDiffusion:
    """The family of StableDiffusionPipeline."""

    component = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    per_candidate: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def network(self, pipeline: Any) -> nn.Module:
        """The conditional UNet."""
        unet = getattr(pipeline, self.component, None)
        if not isinstance(unet, UNet2DConditionModel):
            raise InputError(f"{pipeline.name_or_path}: a {type(pipeline).__name__} has no conditional UNet")
        return unet

    def schedule(self, pipeline: Any) -> DiscreteSchedule:
        """The schedule of the pipeline's scheduler."""
        return DiscreteSchedule.of(pipeline)

    def scaling(self, pipeline: Any) -> tuple[float, float]:
        """From the VAE's config."""
        config = pipeline.vae.config
        return float(config.get("shift_factor") or 0.0), float(config.scaling_factor)

    def encode_prompts(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """`embeddings` (texts, tokens, width)."""
        embeddings, _ = pipeline.encode_prompt(
            texts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"embeddings": embeddings}

    def empty_is_zeros(self, pipeline: Any) -> bool:
        """Never."""
        return False

    def inputs(self, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """The UNet's arguments."""
        embeddings = conditioning["embeddings"]
        return {"sample": sample, "timestep": timestep, "encoder_hidden_states": embeddings}

    def prediction(self, output: Any) -> Tensor:
        """The first of the UNet's outputs."""
        return output[0]
