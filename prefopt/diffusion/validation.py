"""Images of the same prompts and seeds while a model trains: to see what it learns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from prefopt.diffusion.generator import Sampler
from prefopt.diffusion.sampling import sample
from prefopt.files import reporting_write_errors
from prefopt.images import save_image
from prefopt.runs import VALIDATION_STRIPS
from prefopt.strips import Picture, draw_strips

MOST_STEPS, THUMBNAIL = 12, 160  # of the strips


class ValidationImages(TrainerCallback):
    """Generates an image of each prompt at the start, every `every` steps and at the end, at one seed each.

    They go to `OUTPUT_DIR/validation/step-N`, side by side into `strips.png`, and to tensorboard and wandb.
    The first of several processes generates. What is there is not generated again.
    """

    def __init__(
        self,
        trainer: Any,
        pipeline: Any,
        parts: Sequence[str],
        prompts: Sequence[str],
        sampler: Sampler,
        *,
        every: int,
        batch_size: int,
    ):
        self.trainer, self.pipeline, self.parts = trainer, pipeline, parts  # those that only generating needs
        self.prompts, self.sampler = list(prompts), sampler
        self.every, self.batch_size = every, batch_size

    def on_train_begin(self, args, state, control, **kwargs):
        """What the model generates before its first step."""
        if state.global_step == 0:
            self._show(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        """What it generates now."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._show(state.global_step)

    def _show(self, step: int) -> None:
        if not self.trainer.is_world_process_zero():
            return
        strips = Path(self.trainer.args.output_dir, VALIDATION_STRIPS)
        folder = strips.parent
        paths = [folder / f"step-{step:06d}" / f"{number:03d}.webp" for number in range(len(self.prompts))]
        if not all(path.exists() for path in paths):
            with reporting_write_errors(folder):
                paths[0].parent.mkdir(parents=True, exist_ok=True)
            images = self._generate()
            for path, image in zip(paths, images, strict=True):
                save_image(image, path)
            self._track(images, step)
        draw_progress(folder, self.prompts, strips)

    @torch.no_grad()
    def _generate(self) -> list[Image.Image]:
        device, trained = self.trainer.args.device, self.trainer.model.training
        self.trainer.model.eval()
        self._move(device)
        with self.trainer.accelerator.autocast():
            seeds = range(len(self.prompts))
            images = list(
                sample(self.pipeline, self.prompts, seeds, self.sampler, batch_size=self.batch_size)
            )
        self._move("cpu")  # the steps have the memory for themselves
        self.trainer.model.train(trained)
        return images

    def _move(self, device: Any) -> None:
        for name in self.parts:
            part = getattr(self.pipeline, name)
            if isinstance(part, nn.Module):
                part.to(device)

    def _track(self, images: Sequence[Image.Image], step: int) -> None:
        """Hand the images to the trackers of the run that take images."""
        arrays = [np.asarray(image) for image in images]
        for callback in self.trainer.callback_handler.callbacks:
            if writer := getattr(callback, "tb_writer", None):
                for number, (prompt, array) in enumerate(zip(self.prompts, arrays, strict=True)):
                    writer.add_image(f"validation/{number:03d} {prompt[:60]}", array, step, dataformats="HWC")
            wandb = getattr(callback, "_wandb", None)
            if wandb is not None and wandb.run is not None:
                shown = [wandb.Image(array, caption=p) for p, array in zip(self.prompts, arrays, strict=True)]
                wandb.log({"validation": shown, "train/global_step": step})


def draw_progress(folder: Path, prompts: Sequence[str], path: Path) -> None:
    """Draw each prompt's images over the steps, at most `MOST_STEPS`, beside each other to a PNG."""
    steps = sorted(folder.glob("step-*"))
    if len(steps) > MOST_STEPS:
        steps = [steps[place] for place in np.linspace(0, len(steps) - 1, MOST_STEPS).round().astype(int)]
    labels = [f"step {int(step.name.partition('-')[2])}" for step in steps]
    strips = [
        [
            Picture(label, _thumbnail(step / f"{number:03d}.webp"))
            for label, step in zip(labels, steps, strict=True)
        ]
        for number in range(len(prompts))
    ]
    draw_strips(path, prompts, strips)


def _thumbnail(path: Path) -> Image.Image | None:
    if not path.exists():  # another file of prompts was there before
        return None
    with Image.open(path) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image.copy()
