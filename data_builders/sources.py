"""Who draws candidates, and how: what is loaded, and what each row of the table says about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from data_builders.stages import Record
from prefopt.diffusion.sampling import load_pipeline
from prefopt.evaluation.text_to_image import Sampler, System, system_identity


@dataclass(frozen=True)
class Source:
    """A text-to-image model with its sampler; with a LoRA if one is named. `dtype` by its name in torch."""

    model: str
    sampler: Sampler
    revision: str | None = None
    adapter: str | None = None
    adapter_scale: float = 1.0
    dtype: str = "float32"

    def load(self, device: str | torch.device) -> DiffusionPipeline:
        """The pipeline, ready to draw."""
        pipeline = load_pipeline(
            self.model,
            adapter=self.adapter,
            adapter_scale=self.adapter_scale,
            revision=self.revision,
            dtype=getattr(torch, self.dtype),
            device=device,
        )
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                settle(part)
        return pipeline

    def names(self) -> Record:
        """What model and adapter are called here; the same weights may be called otherwise elsewhere."""
        return {"model": self.model, "model_revision": self.revision, "adapter": self.adapter}

    def identity(self) -> Record:
        """What an image depends on beside prompt and seed: SHA-256 of the weights, and settings."""
        who = system_identity(System("", self.model, self.adapter, self.adapter_scale, self.revision))
        return {
            "model_identity": who["model"],
            "adapter_identity": who["adapter"],
            "adapter_scale": who["scale"],
            **asdict(self.sampler),
            "dtype": self.dtype,
        }


def settle(module: nn.Module) -> None:
    """Move a module's weights to memory that torch allocates.

    Weights just loaded may be views into the mapped file, at any address, or copies, as under
    torch.distributed; and on CPUs the last bit of a product depends on its factors' alignment.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
