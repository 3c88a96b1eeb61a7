"""Stages from a prompt to its judged candidates: expand, draw, encode, score, rank, select."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from time import perf_counter

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from data_builders.stages import Record, Stage, batched, by_prompt, drop, in_threads, kept
from prefopt.diffusion.sampling import Sampler, sample_arrays, to_image

BLACK = 8  # an image whose brightest value, of 255, is under this shows nothing
BETWEEN = "neither best nor worst"
NO_MARGIN = "no margin"
SAME_IMAGE = "same image twice"
TOO_FEW = "no second image"

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]


def candidate_seed(seed: int, prompt: str, candidate: int) -> int:
    """The seed of one candidate, in [0, 2^32): a function of these three and nothing else."""
    # torch's generator on the CPU reads no more than 32 bits of a seed.
    return int.from_bytes(hashlib.sha256(f"{seed} {candidate} {prompt}".encode()).digest()[:4])


def expand(candidates: Iterable[int], seed: int) -> Stage:
    """The stage that makes of each prompt the candidates of these numbers, each with its own seed."""
    numbers = list(candidates)

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            for i in numbers:
                yield record | {"candidate": i, "seed": candidate_seed(seed, record["prompt"], i)}

    return stage


def draw(pipeline: DiffusionPipeline, sampler: Sampler, batch_size: int) -> Stage:
    """The stage that draws `pixels` (height, width, 3) in 0..1 for each (prompt, seed).

    `seconds` is the image's share of the time that its batch took.
    """

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for batch in batched(records, batch_size):
            start = perf_counter()
            prompts, seeds = [r["prompt"] for r in batch], [r["seed"] for r in batch]
            arrays = list(sample_arrays(pipeline, prompts, seeds, batch_size=batch_size, **asdict(sampler)))
            seconds = (perf_counter() - start) / len(batch)
            for record, array in zip(batch, arrays, strict=True):
                yield record | {"pixels": array, "seconds": seconds}

    return stage


def encode(threads: int, ahead: int) -> Stage:
    """The stage that turns `pixels` into a picture and a file, and drops what is black or not finite."""
    return in_threads(encoded, threads=threads, ahead=ahead)


def encoded(record: Record) -> Record:
    """The record with its picture, the lossless WebP of it, its size, and the SHA-256 of its pixels."""
    record = dict(record)
    array = record.pop("pixels")
    height, width = array.shape[:2]
    if not np.isfinite(array).all():
        return drop(record | {"height": height, "width": width}, "not finite")
    picture, file = to_image(array), io.BytesIO()
    # Method 0 takes a seventh of PNG's time at a similar size.
    picture.save(file, format="WEBP", lossless=True, method=0)
    record |= {
        "picture": picture,
        "image": {"bytes": file.getvalue(), "path": None},
        "height": height,
        "width": width,
        "pixels_sha256": hashlib.sha256(f"{width} x {height} ".encode() + picture.tobytes()).hexdigest(),
    }
    return drop(record, "black") if np.asarray(picture).max() < BLACK else record


def score(scorer: Scorer, batch_size: int, column: str = "clip_score") -> Stage:
    """The stage that scores each picture against its own prompt and drops it if the score is not finite."""

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for batch in batched(records, batch_size):
            whole = [record for record in batch if kept(record)]
            pictures, prompts = [r["picture"] for r in whole], [r["prompt"] for r in whole]
            scores = iter(scorer(pictures, prompts) if whole else ())
            for record in batch:
                if kept(record):
                    record = record | {column: float(next(scores))}
                    record = record if np.isfinite(record[column]) else drop(record, "score not finite")
                yield record

    return stage


def rank(records: Iterable[Record], column: str = "clip_score") -> Iterator[Record]:
    """Rank the candidates of each prompt: 1 is the best, equal scores have equal ranks."""
    for group in by_prompt(records):
        scores = [record[column] for record in group if kept(record)]
        for record in group:
            place = 1 + sum(other > record[column] for other in scores) if kept(record) else None
            yield record | {"rank": place}


def select(min_margin: float, column: str = "clip_score") -> Stage:
    """The stage that selects the best and the worst ranked candidate of each prompt and drops the others.

    A prompt gives a pair if the two differ by `min_margin` at least, and at all, and in their pixels; of
    two bests the first counts, of two worsts the last. Guards against AGFSync's pairs of an image with
    itself. What an earlier selection decided is decided anew, so records read from disk may pass.
    """

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for group in by_prompt(records):
            ranked = [record for record in group if record["rank"] is not None]
            ordered = sorted(ranked, key=lambda record: -record[column])
            reason = _no_pair(ordered, min_margin, column)
            for record in group:
                selected = not reason and (record is ordered[0] or record is ordered[-1])
                decided = record | {"selected": selected}
                if record["rank"] is not None:
                    decided = drop(decided, "" if selected else reason or BETWEEN)
                yield decided

    return stage


def _no_pair(ordered: list[Record], min_margin: float, column: str) -> str:
    """Why the first and the last of these are no pair; empty if they are one."""
    if len(ordered) < 2:
        return TOO_FEW
    best, worst = ordered[0], ordered[-1]
    margin = best[column] - worst[column]
    if margin <= 0 or margin < min_margin:
        return NO_MARGIN
    return SAME_IMAGE if best["pixels_sha256"] == worst["pixels_sha256"] else ""
