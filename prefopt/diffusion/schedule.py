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


class Times(NamedTuple):
    """Which part of a schedule is trained on, and how often each place in it."""

    low: float = 0.0  # the shares of the schedule that are gone through, 0 without noise
    high: float = 1.0
    logit_normal: tuple[float, float] | None = None  # mean and standard deviation; None: all alike

    def share(self, time: Tensor) -> Tensor:
        """How much of the schedule is gone through at a time, uniform in [0, 1).

        The logit-normal distribution puts most weight where its mean is, and little on the ends; arXiv
        2403.03206, section 3.1.
        """
        if self.logit_normal:
            mean, deviation = self.logit_normal
            time = torch.sigmoid(mean + deviation * torch.special.ndtri(time))
        return self.low + (self.high - self.low) * time


EVERYWHERE = Times()


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
        self.times = EVERYWHERE
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
        low, high, logit_normal = self.times
        return {
            "noise schedule": tensors_key({"alphas_cumprod": self.alphas_cumprod}),
            "prediction": self.prediction,
            **({} if (low, high) == (0.0, 1.0) else {"timestep range": f"{low} to {high}"}),
            **({"logit-normal times": str(logit_normal)} if logit_normal else {}),
        }

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor) -> Noised:
        """Latents (batch, k, C, H, W) with noise (batch, C, H, W) at time (batch,) in [0, 1)."""
        if time.dtype in (torch.float16, torch.bfloat16):
            raise InputError(f"times came in {time.dtype}, too coarse for timesteps: leave inputs in float32")
        steps = self.alphas_cumprod.shape[0]
        timestep = (self.times.share(time) * steps).long().clamp(max=steps - 1)
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
