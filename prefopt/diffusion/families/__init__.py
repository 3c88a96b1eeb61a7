"""What differs between families of text-to-image models, one file each; the mathematics knows none of them.

A new family is one file, an entry of `FAMILIES`, and a row in the parity test
(tests/diffusion/test_families.py).
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from prefopt.diffusion.families.stable_diffusion import StableDiffusion
from prefopt.diffusion.families.stable_diffusion_xl import StableDiffusionXL
from prefopt.diffusion.schedule import DiscreteSchedule
from prefopt.errors import InputError


class Family(Protocol):
    """A family of pipelines that share a network's inputs and outputs."""

    component: str  # what the pipeline and its files call the network
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    per_candidate: tuple[str, ...]  # conditioning that each candidate has of its own, (batch, k, ...)
    lora_targets: tuple[str, ...]  # the layers that get an adapter if none are named

    def network(self, pipeline: Any) -> nn.Module:
        """The network to train; InputError if the pipeline has none of this family."""
        ...

    def schedule(self, pipeline: Any) -> DiscreteSchedule:
        """The noise schedule, with what the network predicts."""
        ...

    def scaling(self, pipeline: Any) -> tuple[float, float]:
        """(shift, factor) that normalise the VAE's latents: (latents - shift) * factor."""
        ...

    def encode_prompts(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """The conditioning of texts by name, each (texts, ...)."""
        ...

    def empty_is_zeros(self, pipeline: Any) -> bool:
        """Whether the model samples unconditionally from zeros in place of the encoded empty prompt."""
        ...

    def inputs(self, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """The network's arguments for samples (n, C, H, W), timesteps (n,), conditioning (n, ...)."""
        ...

    def prediction(self, output: Any) -> Tensor:
        """(n, C, H, W), what the network's output says of the schedule's target."""
        ...


# By the class of the pipeline.
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
}


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline, by its class or the first known one that it derives from."""
    for kind in type(pipeline).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    raise InputError(
        f"{pipeline.name_or_path} is a {type(pipeline).__name__}; trained can be {', '.join(FAMILIES)}"
    )
