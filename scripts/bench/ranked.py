"""What a preference pair costs as part of a ranked list, and what a step costs without a reference.

    python scripts/bench/ranked.py --size half-sd15
    python scripts/bench/ranked.py --size sdxl --dtype bfloat16 --gradient_checkpointing

A list of k images of different ranks has k (k - 1) / 2 pairs. As a list, k images go through the network (and
through the reference); as separate pairs, k (k - 1) do. These steps take turns in one run, on the same model
and LoRA:
  list of k            one ranked list
  separate pairs of k  the same pairs as a recipe on pairs trains them: in batches of at most k images, with
                       accumulated gradients and one optimizer step
  pair, list of 4      with DPO, whose reference is computed in the step, and with CPO, which has none
Latents and embeddings are random and on the device; no VAE and no text encoder run in a step. Of two images,
the list and the separate pair are the same work: how far their ratio is from 1 is the error of measurement.
Before that, in float32, loss and gradient of a list must equal those of its pairs, or nothing is measured.
Prints JSON, of medians; a ratio is taken turn by turn.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from shapes import RESOLUTION, build
from torch import Tensor
from turns import DTYPES, device_name, take_turns

from prefopt.adapters import lora_config
from prefopt.config import LoraArguments
from prefopt.diffusion.denoiser import Denoiser
from prefopt.diffusion.lora import add_lora
from prefopt.diffusion.training import DenoisingScore
from prefopt.objectives import Objective, ObjectiveOptions, objective_of
from prefopt.reference import reference_model
from prefopt.runs import versions

BETAS = {"dpo": 2500.0, "cpo": 500.0}  # the recipes' own
CHECKED = 3  # images of the list that is checked: the fewest that appear in several pairs
TOLERANCE = 1e-4
AGAINST_CPO = (2, 4)  # lengths of the lists on which DPO and CPO are compared

Batch = dict[str, Any]


class Options(ObjectiveOptions):
    """The menu's options, with a beta."""

    beta = 1.0


def objective(loss_type: str, **options: Any) -> Objective:
    """The objective of a recipe."""
    return objective_of(Options(loss_type=loss_type, **options), BETAS[loss_type])


class Bench:
    """A denoiser with a LoRA, and the steps that train it."""

    def __init__(self, size: str, device: torch.device, gradient_checkpointing: bool):
        self.device, resolution = device, RESOLUTION[size]
        pipeline: Any = build(size)
        self.denoiser = Denoiser(pipeline)
        network, family = self.denoiser.network, self.denoiser.family
        add_lora(network, lora_config(LoraArguments(), list(family.lora_targets)))
        side = resolution // pipeline.vae_scale_factor
        self.shape = (network.config["in_channels"], side, side)
        with torch.no_grad():
            encoded = family.encode_prompts(pipeline, ["two red elephants in the snow"])
        self.conditioning = {name: torch.randn_like(value).to(device) for name, value in encoded.items()}
        self.sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], device=device)
        self.denoiser.to(device).train()
        if gradient_checkpointing:
            self.denoiser.gradient_checkpointing_enable()
        self.trained = [p for p in self.denoiser.parameters() if p.requires_grad]
        for parameter in self.trained:  # a fresh LoRA changes nothing: all margins would be 0
            torch.nn.init.normal_(parameter, std=0.02)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.autocast = torch.autocast(device.type, enabled=False)

    def use(self, dtype: torch.dtype) -> None:
        """Train in this precision: the frozen weights have it, the LoRA stays in float32."""
        for parameter in self.denoiser.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def ranked_list(self, k: int) -> Batch:
        """A batch of one list of k random images, in a random order of their ranks."""
        per_candidate = {name: self.sizes.expand(1, k, 6) for name in self.denoiser.family.per_candidate}
        return {
            "latents": torch.randn(1, k, *self.shape, device=self.device),
            "noise": torch.randn(1, *self.shape, device=self.device),
            "time": torch.rand(1, device=self.device),
            "conditioning": self.conditioning | per_candidate,
            "ranks": torch.randperm(k, device=self.device)[None] + 1,
            "mask": torch.ones(1, k, dtype=torch.bool, device=self.device),
        }

    def separate_pairs(self, batch: Batch) -> list[Batch]:
        """The pairs of a list, chosen first, in batches of at most as many images as the list has."""
        ranks = batch["ranks"][0]
        pairs = (ranks[:, None] < ranks[None, :]).nonzero()
        per_candidate = self.denoiser.family.per_candidate
        return [
            {
                "latents": batch["latents"][0, part],
                "noise": _repeated(batch["noise"], len(part)),
                "time": _repeated(batch["time"], len(part)),
                "conditioning": {
                    name: value[0, part] if name in per_candidate else _repeated(value, len(part))
                    for name, value in batch["conditioning"].items()
                },
                "ranks": torch.tensor([[1, 2]], device=self.device).repeat(len(part), 1),
                "mask": torch.ones_like(part, dtype=torch.bool),
            }
            for part in pairs.split(len(ranks) // 2)
        ]

    def step(self, objective: Objective, batches: list[Batch], _turn: int = 0) -> None:
        """A training step on the batches together."""
        self.backward(objective, batches)
        self.optimizer.step()

    def backward(self, objective: Objective, batches: list[Batch]) -> Tensor:
        """Compute the gradient of the mean loss over all examples of the batches, and that loss."""
        self.optimizer.zero_grad()
        examples = sum(len(batch["ranks"]) for batch in batches)
        losses = []
        for batch in batches:
            reference = self._reference(batch) if objective.needs_reference else None
            with self.autocast:
                scored = DenoisingScore()(self.denoiser, batch)
            loss = objective(scored, reference, batch).losses.sum() / examples
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _reference(self, batch: Batch) -> Tensor:
        with torch.no_grad(), reference_model(self.denoiser) as model, self.autocast:
            return DenoisingScore()(model, batch).scores

    def check(self, loss_type: str) -> dict[str, float]:
        """How far, relatively, loss and gradient of a list are from those of its pairs; too far: exit."""
        # The likelihood term of a list is that of its best image, and of separate pairs that of every chosen.
        compared = objective(loss_type, **({"likelihood_weight": 0.0} if loss_type == "cpo" else {}))
        ranked = self.ranked_list(CHECKED)
        found = []
        with torch.backends.cudnn.flags(allow_tf32=False):
            for batches in ([ranked], self.separate_pairs(ranked)):
                loss = self.backward(compared, batches)
                gradients = [p.grad.flatten() for p in self.trained if p.grad is not None]
                found.append((loss, torch.cat(gradients)))
        (loss, gradient), (other_loss, other_gradient) = found
        report = {
            "loss": loss.item(),
            "loss_difference": abs(1 - other_loss / loss).item(),
            "gradient_difference": ((other_gradient - gradient).norm() / gradient.norm()).item(),
        }
        if not max(report["loss_difference"], report["gradient_difference"]) <= TOLERANCE:  # nor is NaN
            sys.exit(f"{loss_type}: a list and its pairs differ by more than {TOLERANCE}: {report}")
        return report


def _repeated(value: Tensor, times: int) -> Tensor:
    return value.repeat_interleave(times, dim=0)


def measure(bench: Bench, loss_type: str, lists: list[int], repeats: int) -> dict[str, Any]:
    """Seconds a step, ratios and peak memory of all steps."""
    steps = {}
    for k in sorted({*AGAINST_CPO, *lists}):  # what is compared runs close together, the longest steps last
        ranked = bench.ranked_list(k)
        for loss in BETAS:
            if k in AGAINST_CPO or loss == loss_type:
                steps[f"{loss}: list of {k}"] = partial(bench.step, objective(loss), [ranked])
        if k in lists:
            pairs = bench.separate_pairs(ranked)
            steps[f"{loss_type}: separate pairs of {k}"] = partial(bench.step, objective(loss_type), pairs)
    seconds, memory = take_turns(steps, repeats, bench.device)

    def times_faster(slower: str, faster: str) -> float:
        return round(statistics.median(np.divide(seconds[slower], seconds[faster])), 3)

    return {
        "times_cheaper_per_pair_in_a_list": {
            f"list of {k}": times_faster(f"{loss_type}: separate pairs of {k}", f"{loss_type}: list of {k}")
            for k in lists
        },
        "times_faster_cpo_than_dpo": {
            "pair": times_faster("dpo: list of 2", "cpo: list of 2"),
            "list of 4": times_faster("dpo: list of 4", "cpo: list of 4"),
        },
        "median_seconds": {name: round(statistics.median(taken), 4) for name, taken in seconds.items()},
        "median_seconds_per_pair": {
            name: round(statistics.median(taken) / (k * (k - 1) / 2), 4)
            for name, taken in seconds.items()
            for k in [int(name.split()[-1])]
        },
        "seconds_per_step": {name: [round(value, 4) for value in taken] for name, taken in seconds.items()},
        "peak_memory_gib": {name: round(max(peaks), 2) for name, peaks in memory.items()},
    }


def main() -> None:
    """Parse, check, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=RESOLUTION, default="pocket")
    parser.add_argument("--loss_type", choices=BETAS, default="dpo", help="of lists against separate pairs")
    parser.add_argument("--lists", type=int, nargs="+", default=[2, 4, 8], help="lengths k of the lists")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count; one more warms up")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    options = parser.parse_args()
    if min(options.lists) < 2:
        parser.error("--lists: a list has 2 images or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(options.size, device, options.gradient_checkpointing)
    checks = {loss: bench.check(loss) for loss in BETAS}
    bench.use(DTYPES[options.dtype])
    figures = measure(bench, options.loss_type, options.lists, options.repeats)
    what = {**vars(options), "device": device_name(device), "check": checks}
    print(json.dumps({**what, **figures, "versions": versions()}, indent=2))


if __name__ == "__main__":
    main()
