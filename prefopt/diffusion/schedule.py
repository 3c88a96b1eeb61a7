"""Noise schedules: from a time in [0, 1) to a noised sample, its target, and back to the clean latents.

Noised samples and targets are float32; the denoiser casts them once, at the network's input.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from prefopt.errors import InputError
from prefopt.store import tensors_key


class Noised(NamedTuple):
    """Clean latents with noise, for one denoising."""

    sample: Tensor  # (batch, k, C, H, W)
    timestep: Tensor  # (batch,), as the network takes it
    target: Tensor  # (batch, k, C, H, W)
    clean: Callable[[Tensor], Tensor]  # from the network's prediction to the clean latents


class Parametrisation(NamedTuple):
    """What a network predicts of latents x and noise e in the sample a x + s e."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, e, a, s)
    clean: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (prediction, sample, a, s)


PARAMETRISATIONS = {
    "epsilon": Parametrisation(
        target=lambda x, e, a, s: e,
        clean=lambda prediction, sample, a, s: (sample - s * prediction) / a,
    ),
    "v_prediction": Parametrisation(  # arXiv 2202.00512, appendix D
        target=lambda x, e, a, s: a * e - s * x,
        clean=lambda prediction, sample, a, s: a * sample - s * prediction,
    ),
    "sample": Parametrisation(
        target=lambda x, e, a, s: x,
        clean=lambda prediction, sample, a, s: prediction,
    ),
}


class DiscreteSchedule(nn.Module):
    """The variance-preserving schedule of Stable Diffusion: whole timesteps and their alphas."""

    alphas_cumprod: Tensor  # (steps,) float32

    def __init__(self, alphas_cumprod: Tensor, prediction: str):
        super().__init__()
        self.prediction = prediction
        self.timestep_range = (0.0, 1.0)  # the part of the schedule that times cover
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    @classmethod
    def of(cls, pipeline: Any) -> Self:
        """The schedule that a pipeline was trained with; InputError if its prediction is unknown."""
        scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
        prediction = str(scheduler.config["prediction_type"])
        if prediction not in PARAMETRISATIONS:
            known = ", ".join(PARAMETRISATIONS)
            raise InputError(f"{pipeline.name_or_path} predicts {prediction!r}; known are {known}")
        return cls(scheduler.alphas_cumprod, prediction)

    @property
    def identity(self) -> dict[str, str]:
        """What a score depends on here."""
        whole = self.timestep_range == (0.0, 1.0)
        return {
            "noise schedule": tensors_key({"alphas_cumprod": self.alphas_cumprod}),
            "prediction": self.prediction,
            **({} if whole else {"timestep range": "{} to {}".format(*self.timestep_range)}),
        }

    def share(self, time: Tensor) -> Tensor:
        """How much of the schedule is gone through at a time in [0, 1)."""
        low, high = self.timestep_range
        return low + (high - low) * time

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor) -> Noised:
        """Latents (batch, k, C, H, W) with noise (batch, C, H, W) at time (batch,) in [0, 1)."""
        if time.dtype in (torch.float16, torch.bfloat16):
            raise InputError(f"times came in {time.dtype}, too coarse for timesteps: leave inputs in float32")
        steps = self.alphas_cumprod.shape[0]
        timestep = (self.share(time) * steps).long().clamp(max=steps - 1)
        alpha = self.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        noise, latents = noise[:, None].float().expand_as(latents), latents.float()
        sample, parametrisation = a * latents + s * noise, PARAMETRISATIONS[self.prediction]
        return Noised(
            sample,
            timestep,
            target=parametrisation.target(latents, noise, a, s),
            clean=lambda prediction: parametrisation.clean(prediction, sample, a, s),
        )
