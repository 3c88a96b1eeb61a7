"""How many pairs a second a step of Diffusion-DPO trains: encoding in the step, against cached encodings.

    python scripts/bench/diffusion_dpo.py --size half-sd15
    python scripts/bench/diffusion_dpo.py --size sdxl --batch 4 --dtype bfloat16

Three steps take turns in one run, on the same model, LoRA, batch and precision:
  plain            VAE and text encoder in the step, reference computed in the step: what today's scripts do
  cached encodings latents and embeddings from the store on disk, reference computed in the step
  cached reference the same, with the reference's scores from the store as well
The plain step is given decoded pixels, contiguous as those scripts make them, so reading images counts for
neither side. Prints JSON, of medians; a ratio is taken turn by turn, so that a machine that slows down slows
both.
"""

import argparse
import io
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from shapes import RESOLUTION, build
from torch.utils.data import DataLoader
from turns import DTYPES, device_name, take_turns

from prefopt.adapters import lora_config
from prefopt.config import LoraArguments
from prefopt.diffusion.candidates import EncodedCandidates
from prefopt.diffusion.denoiser import Denoiser
from prefopt.diffusion.latents import Encoder, prepare_image
from prefopt.diffusion.lora import add_lora
from prefopt.diffusion.tables import Table, read_preferences
from prefopt.diffusion.training import DenoisingScore
from prefopt.draws import draw
from prefopt.losses import Pair, dpo_loss
from prefopt.reference import adapters_off
from prefopt.runs import versions

BETA = 2500.0


class Bench:
    """The three steps and everything they share."""

    def __init__(self, size: str, batch: int, dtype: str, device: torch.device, folder: Path):
        self.batch, self.device, self.resolution = batch, device, RESOLUTION[size]
        self.autocast = torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")
        self.pipeline: Any = build(size)
        self.table = random_pairs(folder / "pairs", 4 * batch, self.resolution)
        for part in ("vae", "text_encoder", "text_encoder_2"):
            module = getattr(self.pipeline, part, None)
            if module is not None:
                module.requires_grad_(False).eval().to(device, DTYPES[dtype])
        self.denoiser = Denoiser(self.pipeline)
        self.family = self.denoiser.family
        self.denoiser.network.to(DTYPES[dtype])
        add_lora(self.denoiser.network, lora_config(LoraArguments(), list(self.family.lora_targets)))
        self.denoiser.to(device).train()
        trained = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        encoder = Encoder(self.pipeline, folder / "cache", self.resolution, self.family, batch_size=2)
        self.examples = EncodedCandidates(
            self.table,
            encoder.images(self.table, mirrored=False),
            encoder.prompts(self.table.facts["prompt"]),
            scaling=self.family.scaling(self.pipeline),
            per_candidate=self.family.per_candidate,
            seed=0,
        )
        images = [self.table.images(row) for row in range(len(self.table))]
        self.pixels = [
            torch.stack(
                [prepare_image(image, "bench", self.resolution).pixels for image in pair]
            ).contiguous()
            for pair in images
        ]
        self.stored = [self._reference(self._cached(step)).cpu() for step in range(4)]

    def plain(self, step: int) -> None:
        """Encode, score, score the reference, and take an optimizer step."""
        rows = self._rows(step)
        pixels = torch.cat([self.pixels[row] for row in rows]).to(self.device, self.pipeline.vae.dtype)
        with torch.no_grad():
            moments = self.pipeline.vae.encode(pixels).latent_dist
            shift, factor = self.family.scaling(self.pipeline)
            latents = (moments.sample().float() - shift) * factor
            conditioning = self._encode_prompts([self.table.facts[row]["prompt"] for row in rows])
        draws = [draw(0, row, 0, shape=self.examples.shape) for row in rows]
        inputs = {
            "latents": latents.unflatten(0, (self.batch, 2)),
            "noise": torch.from_numpy(np.stack([one.noise for one in draws])),
            "time": torch.tensor(np.array([one.time for one in draws])),
            "conditioning": conditioning,
            "mask": torch.ones(self.batch, 2, dtype=torch.bool),
        }
        inputs = moved(inputs, self.device)
        self._train(inputs, self._reference(inputs))

    def cached_encodings(self, step: int) -> None:
        """The same from the stores, with the reference computed."""
        inputs = self._cached(step)
        self._train(inputs, self._reference(inputs))

    def cached_reference(self, step: int) -> None:
        """The same from the stores, the reference's scores included."""
        self._train(self._cached(step), self.stored[step % 4].to(self.device))

    def _rows(self, step: int) -> range:
        return range(step % 4 * self.batch, (step % 4 + 1) * self.batch)

    def _cached(self, step: int) -> dict[str, Any]:
        order = [(row, 0) for row in self._rows(step)]
        return moved(next(iter(DataLoader(self.examples, self.batch, sampler=order))), self.device)

    def _encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        encoded = self.family.encode_prompts(self.pipeline, prompts)
        sizes = torch.tensor([self.resolution, self.resolution, 0, 0, self.resolution, self.resolution])
        return encoded | {name: sizes.expand(self.batch, 2, 6) for name in self.family.per_candidate}

    def _reference(self, inputs: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad(), adapters_off(self.denoiser) as model, self.autocast:
            return DenoisingScore()(model, inputs).scores

    def _train(self, inputs: dict[str, Any], reference_scores: torch.Tensor) -> None:
        with self.autocast:
            policy = DenoisingScore()(self.denoiser, inputs).scores
        pair, other = Pair(*policy.unbind(1)), Pair(*reference_scores.unbind(1))
        dpo_loss(pair, other, beta=BETA).losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def random_pairs(folder: Path, count: int, resolution: int) -> Table:
    """Pairs of random images of the resolution."""
    chance = np.random.default_rng(0)

    def image() -> dict[str, Any]:
        file = io.BytesIO()
        pixels = chance.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "WEBP", lossless=True, method=0)
        return {"bytes": file.getvalue(), "path": None}

    columns = {side: [image() for _ in range(count)] for side in ("chosen", "rejected")}
    features = Features({"prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature()})
    prompts = [f"two red elephants in the snow, number {row}" for row in range(count)]
    folder.mkdir()
    Dataset.from_dict({"prompt": prompts, **columns}, features).to_parquet(folder / "train.parquet")
    return read_preferences(str(folder))


def moved(value: Any, device: torch.device) -> Any:
    """Tensors of nested dicts on a device."""
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    return value.to(device)


def measure(bench: Bench, repeats: int) -> dict[str, Any]:
    """Seconds a step and peak memory of the three steps, taking turns."""
    steps: dict[str, Callable[[int], None]] = {
        "plain": bench.plain,
        "cached encodings": bench.cached_encodings,
        "cached reference": bench.cached_reference,
    }
    seconds, memory = take_turns(steps, repeats, bench.device)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "pairs_per_second": {name: round(bench.batch / median, 3) for name, median in medians.items()},
        "times_faster_than_plain": {
            name: round(statistics.median(np.divide(seconds["plain"], taken)), 3)
            for name, taken in seconds.items()
        },
        "seconds_per_step": {name: [round(value, 4) for value in taken] for name, taken in seconds.items()},
        "peak_memory_gib": {name: round(max(peaks), 2) for name, peaks in memory.items()},
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=RESOLUTION, default="pocket")
    parser.add_argument("--batch", type=int, default=1, help="pairs a step")
    parser.add_argument("--repeats", type=int, default=10, help="turns that count; one more warms up")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.size, options.batch, options.dtype, device, Path(folder))
        figures = measure(bench, options.repeats)
    what = {**vars(options), "device": device_name(device)}
    print(json.dumps({**what, **figures, "versions": versions()}, indent=2))


if __name__ == "__main__":
    main()
