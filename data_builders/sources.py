"""Who draws candidates, and how: what is loaded, and what each row of the table says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from diffusers import DiffusionPipeline
from torch import nn

from data_builders.stages import Record
from prefopt.diffusion.sampling import Sampler, System, load_pipeline, system_identity
from prefopt.records import InputError

SOURCE_KEYS: dict[str, Callable] = {
    "steps": int,
    "guidance": float,
    "adapter": str,
    "scale": float,
    "revision": str,
}


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


def parse_source(text: str, base: Source) -> Source:
    """A source as a flag says it: a model, or nothing for the base's, and `key=value` for what differs.

    `stabilityai/sdxl-turbo steps=1 guidance=0` · `adapter=runs/sft scale=0.4`
    """
    words = text.split()
    name = words.pop(0) if words and "=" not in words[0] else base.model
    given = {key: value for key, _, value in (word.partition("=") for word in words)}
    if unknown := sorted(given.keys() - SOURCE_KEYS.keys()):
        raise InputError(f"--sources {text!r}: unknown {unknown[0]!r}; known are {', '.join(SOURCE_KEYS)}")
    values = {}
    for key, value in given.items():
        try:
            values[key] = SOURCE_KEYS[key](value)
        except ValueError as error:
            raise InputError(f"--sources {text!r}: {key} is {value!r}, not a number") from error
    same = name == base.model
    sampler = replace(
        base.sampler,
        num_inference_steps=values.get("steps", base.sampler.num_inference_steps),
        guidance_scale=values.get("guidance", base.sampler.guidance_scale),
    )
    return Source(
        name,
        sampler,
        values.get("revision", base.revision if same else None),
        values.get("adapter", base.adapter if same else None),
        values.get("scale", base.adapter_scale),
        base.dtype,
    )


def settle(module: nn.Module) -> None:
    """Move a module's weights to memory that torch allocates.

    Weights just loaded may be views into the mapped file, at any address, or copies, as under
    torch.distributed; and on CPUs the last bit of a product depends on its factors' alignment.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
