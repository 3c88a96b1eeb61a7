"""From prompts to image candidates: each prompt's seeds, the generated images, their files."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from data_builders.engine.blocks import ImageBlocks
from data_builders.engine.passes import ModelPass
from data_builders.engine.reasons import BLACK, NOT_FINITE
from data_builders.engine.stages import (
    INVALID,
    Record,
    Stage,
    batched,
    counted,
    flow,
    in_threads,
    mark_invalid,
)
from prefopt.diffusion.generator import Generator, Sampler
from prefopt.diffusion.sampling import load_generator, sample_arrays, to_image
from prefopt.loading import Lazy, own_memory

DARKEST = 8  # an image whose brightest value, of 255, is under this shows nothing


class GenerateImages(ModelPass[Any]):
    """Generates the candidates of these numbers by one generator, into blocks of its own."""

    unit = "image"

    def __init__(
        self,
        name: str,
        generator: Generator,
        numbers: Iterable[int],
        blocks: ImageBlocks,
        *,
        seed: int,
        batch_size: int,
        device: Any,
    ):
        super().__init__(Lazy(str(generator.identity), partial(_loaded, generator, device)))
        self.name, self.generator, self.numbers, self.blocks = name, generator, list(numbers), blocks
        self.seed, self.batch_size = seed, batch_size
        self.made_by = generator.identity | generator.names

    def todo(self, block: int) -> int:
        """The images of a block that is not written."""
        place = self.blocks[block]
        return 0 if place.file.exists() else len(place.prompts) * len(self.numbers)

    def work(self, block: int, bar: tqdm) -> None:
        """Generate the block and write it whole."""
        place = self.blocks[block]
        stages = [
            self.candidates,
            generate(self.model, self.generator.sampler, self.batch_size),
            in_threads(encode, threads=4, ahead=2 * self.batch_size),
            counted(bar),
        ]
        rows = [{INVALID: "", **self.made_by, **row} for row in flow(place.prompts, stages)]
        self.calls += len(rows)
        self.blocks.write(place, rows)

    def candidates(self, records: Iterable[Record]) -> Iterator[Record]:
        """The candidates of prompts, each with its own seed."""
        return expand(self.numbers, self.seed)(records)


def _loaded(generator: Generator, device: Any) -> Any:
    pipeline = load_generator(generator, device)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            own_memory(part)
    return pipeline


def candidate_seed(seed: int, prompt: str, candidate: int) -> int:
    """The seed of one candidate, in [0, 2^32): a function of these three and nothing else."""
    # torch's generator on the CPU reads no more than 32 bits of a seed.
    return int.from_bytes(hashlib.sha256(f"{seed} {candidate} {prompt}".encode()).digest()[:4])


def expand(candidates: Iterable[int], seed: int) -> Stage:
    """The stage from each prompt to its candidates of these numbers, each with its own seed."""
    numbers = list(candidates)

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            for i in numbers:
                yield record | {"candidate": i, "seed": candidate_seed(seed, record["prompt"], i)}

    return stage


def generate(pipeline: Any, sampler: Sampler, batch_size: int) -> Stage:
    """The stage that generates `pixels` (height, width, 3) in 0..1 for each (prompt, seed).

    `seconds` is the image's share of its batch's time.
    """

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for batch in batched(records, batch_size):
            start = perf_counter()
            prompts, seeds = [r["prompt"] for r in batch], [r["seed"] for r in batch]
            arrays = list(sample_arrays(pipeline, prompts, seeds, sampler, batch_size=batch_size))
            seconds = (perf_counter() - start) / len(batch)
            for record, array in zip(batch, arrays, strict=True):
                yield record | {"pixels": array, "seconds": seconds}

    return stage


def encode(record: Record) -> Record:
    """The record with a lossless WebP in place of its `pixels`, their size and SHA-256.

    An image with values that are not finite, or that is all black, is invalid.
    """
    record = dict(record)
    array = record.pop("pixels")
    height, width = array.shape[:2]
    record |= {"height": height, "width": width}
    if not np.isfinite(array).all():
        return mark_invalid(record, NOT_FINITE)
    picture, file = to_image(array), io.BytesIO()
    # Method 0 takes a seventh of PNG's time at a similar size.
    picture.save(file, format="WEBP", lossless=True, method=0)
    record |= {
        "image": {"bytes": file.getvalue(), "path": None},
        "pixels_sha256": hashlib.sha256(f"{width} x {height} ".encode() + picture.tobytes()).hexdigest(),
    }
    return mark_invalid(record, BLACK) if np.asarray(picture).max() < DARKEST else record
