"""What every pocket training shares: renders, the learning rate, averaged weights, exact checkpoints."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from prefopt.pocket.world import PHRASINGS, Scene, caption, render, train_scenes


@dataclass
class Run:
    """One training: how long, how fast, from which seed, and where its checkpoint lies."""

    work: Path
    seed: int
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    average: float = 0.998


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB pictures as (n, 3, height, width) float32 in -1..1."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """The inverse of `to_tensor`, clamped."""
    arrays = pixels.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def fresh_items(rng: np.random.Generator, size: int) -> list[tuple[Scene, int]]:
    """Training scenes drawn at random, each with a render seed below 2**31."""
    scenes = train_scenes()
    return [(scenes[i], int(seed)) for i, seed in rng.integers((0, 0), (len(scenes), 2**31), size=(size, 2))]


def fresh_batch(rng: np.random.Generator, size: int) -> tuple[list[Scene], list[Image.Image]]:
    """Training scenes drawn at random and a new picture of each."""
    items = fresh_items(rng, size)
    return [scene for scene, _ in items], [render(scene, seed) for scene, seed in items]


def captions(rng: np.random.Generator, scenes: list[Scene]) -> list[str]:
    """A caption of each scene, in any phrasing."""
    return [
        caption(scene, int(p))
        for scene, p in zip(scenes, rng.integers(PHRASINGS, size=len(scenes)), strict=True)
    ]


def cosine(run: Run) -> Callable[[int], float]:
    """The learning rate's factor: linear warm-up, then half a cosine down to 1 %."""

    def factor(step: int) -> float:
        if step < run.warmup:
            return (step + 1) / run.warmup
        progress = (step - run.warmup) / max(1, run.steps - run.warmup)
        return 0.01 + 0.495 * (1 + float(np.cos(np.pi * min(1.0, progress))))

    return factor


class Training:
    """Optimizer, schedule and averaged weights of `modules`, in one safetensors checkpoint to go on from.

    Step k draws from `generator(k)`, so a resumed training sees the same batches as an uninterrupted one.
    """

    def __init__(self, run: Run, modules: torch.nn.ModuleDict):
        self.run, self.modules, self.path = run, modules, run.work / "checkpoint.safetensors"
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3
        )
        self.average = {name: tensor.detach().clone() for name, tensor in modules.state_dict().items()}
        self.step, self.losses = 0, ""
        if self.path.exists():
            self._load()

    def generator(self, step: int) -> np.random.Generator:
        """The draws of one step; torch's own generator is reseeded with it."""
        torch.manual_seed((self.run.seed << 24) + step)
        return np.random.default_rng([self.run.seed, step])

    def batches(self, every: int = 100) -> Iterator[np.random.Generator]:
        """The remaining steps; the caller hands each one's loss to `update`."""
        factor, began, first = cosine(self.run), time.monotonic(), self.step
        while self.step < self.run.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.run.learning_rate * factor(self.step)
            yield self.generator(self.step)
            if self.step % every == 0 or self.step == self.run.steps:
                rate = (time.monotonic() - began) / max(1, self.step - first)
                print(f"step {self.step}/{self.run.steps}  {rate:.3f} s a step  {self.losses}", flush=True)
            if self.step % 500 == 0 or self.step == self.run.steps:
                self.save()

    def update(self, loss: torch.Tensor, **shown: float) -> None:
        """One optimizer step, then the average follows; stops at a loss that is no number."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step} of {self.run.work.name}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.run.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, tensor in self.modules.state_dict().items():
                if tensor.is_floating_point():
                    self.average[name].lerp_(tensor, 1 - decay)
                else:
                    self.average[name].copy_(tensor)
        self.losses = "  ".join(f"{k} {v:.4f}" for k, v in {"loss": loss.item(), **shown}.items())

    def save(self) -> None:
        """All that a resumed training needs, written beside the old checkpoint and then put in its place."""
        tensors = {f"weights.{k}": v.contiguous() for k, v in self.modules.state_dict().items()}
        tensors |= {f"average.{k}": v.contiguous() for k, v in self.average.items()}
        for i, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{i}.{key}"] = value.contiguous()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.path.with_suffix(".new"), metadata={"step": str(self.step)})
        self.path.with_suffix(".new").replace(self.path)

    def _load(self) -> None:
        tensors = load_file(self.path)
        parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "average": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        self.modules.load_state_dict(parts["weights"])
        self.average = parts["average"]
        for name, tensor in parts["optimizer"].items():
            i, key = name.split(".", 1)
            self.optimizer.state[self.parameters[int(i)]][key] = tensor
        # Not every parameter takes part in every step.
        self.step = int(max(s.item() for k, s in parts["optimizer"].items() if k.endswith(".step")))

    def finished(self) -> torch.nn.ModuleDict:
        """The modules with their averaged weights, in eval mode."""
        self.modules.load_state_dict(self.average)
        return self.modules.eval()
