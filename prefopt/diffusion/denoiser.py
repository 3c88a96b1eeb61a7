"""Every diffusion model behind one face: latents, noise, time and conditioning go in, scores come out.

A score is minus the denoising error: the mean over C, H, W of the squared difference to the target. Noise,
noised latents and targets are float32 and are cast once, at the network's input; the error is reduced in
float32.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from prefopt.diffusion.families import Family, family_of
from prefopt.diffusion.lora import load_weights, save_weights
from prefopt.diffusion.schedule import EVERYWHERE, DiscreteSchedule, Noised, Times
from prefopt.files import content_key
from prefopt.losses import best_and_worst
from prefopt.objectives import Scored


class Denoised(NamedTuple):
    """A batch, and what the network predicts of it."""

    noised: Noised
    prediction: Tensor  # (batch, k, C, H, W) in float32
    latents: Tensor  # (batch, k, C, H, W), clean
    time: Tensor  # (batch,) in [0, 1)
    conditioning: Mapping[str, Tensor]
    mask: Tensor | None  # (batch, k), False where there is no candidate; None: all are there


class Denoiser(nn.Module):
    """A network of any family with its noise schedule."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: Family | None = None,
        times: Times = EVERYWHERE,
    ):
        super().__init__()
        self.family = family or family_of(pipeline)
        # By the pipeline's own name for it, which is also the prefix of its LoRA's tensors.
        self.add_module(self.family.component, self.family.network(pipeline))
        self.schedule = self.family.schedule(pipeline)
        self.schedule.times = times

    @property
    def network(self) -> Any:
        """The network that is trained."""
        return getattr(self, self.family.component)

    @property
    def identity(self) -> dict[str, str]:
        """What scores depend on besides the weights."""
        config = {name: value for name, value in self.network.config.items() if not name.startswith("_")}
        return {
            **self.schedule.identity,
            "UNet configuration": content_key(json.dumps(config, sort_keys=True, default=str)),
        }

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        time: Tensor,
        conditioning: Mapping[str, Tensor],
        mask: Tensor | None = None,
    ) -> Scored:
        """Scores (batch, k) of clean latents (batch, k, C, H, W) at one shared noise (batch, C, H, W) and
        time (batch,) in [0, 1), which the schedule turns into a timestep.

        `conditioning` holds what the family's `encode_prompts` gives of each prompt, (batch, ...), and what
        each candidate has of its own, (batch, k, ...). Where `mask` (batch, k) is False is no candidate: the
        network is not run, and the score is 0.
        """
        candidates = latents.shape[1]
        noised = self.schedule.add_noise(latents, noise, time)
        there = None if mask is None else mask.flatten().nonzero().squeeze(1)
        conditions = self._of_candidates(conditioning, candidates)
        inputs = self.family.inputs(
            _chosen(noised.sample.flatten(0, 1), there).to(self.network.dtype),
            _chosen(noised.timestep.repeat_interleave(candidates), there),
            {name: _chosen(value, there) for name, value in conditions.items()},
        )
        output = self.family.prediction(self.network(**inputs, return_dict=False)).float()
        if there is not None:
            output = noised.target.flatten(0, 1).index_copy(0, there, output)
        prediction = output.view_as(noised.target)
        return self.score(Denoised(noised, prediction, latents, time, conditioning, mask))

    def score(self, denoised: Denoised) -> Scored:
        """The scores of what was denoised."""
        residual = denoised.prediction - denoised.noised.target
        error = residual.square().mean(dim=(2, 3, 4))
        return Scored(-error, error, residual)

    def _of_candidates(self, conditioning: Mapping[str, Tensor], candidates: int) -> dict[str, Tensor]:
        """The conditioning of every candidate, (batch * k, ...), in the network's precision."""
        return {
            name: self._cast(value).flatten(0, 1)
            if name in self.family.per_candidate
            else self._cast(value).repeat_interleave(candidates, dim=0)
            for name, value in conditioning.items()
        }

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.network.dtype) if value.is_floating_point() else value

    # For the trainer

    @property
    def _no_split_modules(self) -> list[str] | None:
        """The classes of blocks that FSDP gathers one at a time, as the network's library names them."""
        return self.network._no_split_modules

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """LoRA as `load_lora_weights` reads it, or all weights as `from_pretrained` reads a sub-folder.

        The scaling is part of the LoRA's tensors: see `lora.save_weights`.
        """
        save_weights(self.network, self.family.component, folder, self._own(state_dict), fold=True)

    def save_weights(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """The same files, the LoRA's tensors as they are."""
        save_weights(self.network, self.family.component, folder, self._own(state_dict))

    def _own(self, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        state = self.state_dict() if state_dict is None else state_dict
        return {name: value for name, value in state.items() if name.startswith(f"{self.family.component}.")}

    def load_weights(self, folder: str | Path) -> None:
        """Load what `save_weights` wrote, bit for bit; what does not fit is an InputError."""
        load_weights(self.network, self.family.component, folder)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Trade compute for memory in the network's blocks."""
        self.network.enable_gradient_checkpointing()

    activation_checkpointing_enable = gradient_checkpointing_enable


def _chosen(values: Tensor, there: Tensor | None) -> Tensor:
    return values if there is None else values[there]


def denoising_metrics(
    batch: Mapping[str, Tensor], scores: Tensor, schedule: DiscreteSchedule
) -> dict[str, tuple[Tensor, Tensor]]:
    """The denoising errors of a batch, over all times and by quartile of the schedule (q1: least noise).

    Of lists, those of the best-ranked candidates and of the worst.
    """
    pair = best_and_worst(-scores, batch["ranks"])
    errors = {"chosen": pair.chosen} | ({"rejected": pair.rejected} if scores.shape[1] > 1 else {})
    metrics = {}
    for side, error in errors.items():
        metrics[f"error/{side}"] = (error, torch.ones_like(error))
        for quartile in range(4):
            inside = (schedule.times.share(batch["time"]) * 4).floor() == quartile
            metrics[f"error/{side}/q{quartile + 1}"] = (error, inside.to(error.dtype))
    return metrics
