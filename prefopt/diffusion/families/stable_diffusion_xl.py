"""Stable Diffusion XL: two text encoders, pooled text, and each image's own size (arXiv 2307.01952)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prefopt.diffusion.families.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """The family of StableDiffusionXLPipeline."""

    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    tokenizers: tuple[str, ...] = ("tokenizer", "tokenizer_2")
    per_candidate: tuple[str, ...] = ("sizes",)

    def encode_prompts(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """`embeddings` (texts, tokens, width) and `pooled` (texts, width)."""
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            texts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"embeddings": embeddings, "pooled": pooled}

    def empty_is_zeros(self, pipeline: Any) -> bool:
        """As the pipeline's config says."""
        return bool(pipeline.config.get("force_zeros_for_empty_prompt", False))

    def inputs(self, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """The UNet's arguments; `sizes` (n, 6) are height and width of the original, the crop, the target."""
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["sizes"]}
        return super().inputs(sample, timestep, conditioning) | {"added_cond_kwargs": added}
