"""Text-to-image systems on the same prompts and the same seeds: draw, score, and say what differs.

Everything is kept by content. An image's key holds the weights, the adapter and its scale, the prompt, the
seed and the sampler's settings; a score's key holds the image's key and the scorer's identity. A rerun, after
a crash or with one more system, draws and scores only what is new. With several processes each draws its
share; they must share the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from prefopt.diffusion.sampling import (
    Sampler,
    System,
    load_pipeline,
    sample,
    set_adapter_scale,
    system_identity,
)
from prefopt.evaluation.summary import summarise
from prefopt.records import InputError
from prefopt.store import Ledger, content_key, replacing, write_atomically, writing

# Images and their prompts to one number each (n,), or to several named ones; booleans are read as right or
# wrong. A scorer with an attribute `identity` (a string that changes with its weights) has its scores kept;
# others are asked anew each run.
Scorer = Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray | Mapping[str, np.ndarray]]
Scores = dict[str, float | bool]  # metric -> score of one image

_SCORED_AT_ONCE = 64


@dataclass(frozen=True)
class _Job:
    """One image to draw."""

    system: System
    prompt: str
    seed: int


def compare(
    systems: Sequence[System],
    prompts: Sequence[str],
    seeds: Sequence[int],
    scorers: Mapping[str, Scorer],
    output_dir: str | Path,
    *,
    sampler: Sampler,
    tie: float = 0.01,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    batch_size: int = 8,
) -> dict:
    """Draw and score all (system, prompt, seed); write images, results.jsonl, summary.json; return the last.

    Every other system is set against the first. Raises InputError for fewer than two systems or prompts, or
    repeated ones.
    """
    _check(systems, prompts, seeds, scorers)
    state = processes()
    folder = Path(output_dir)
    with writing(folder):
        (folder / "images").mkdir(parents=True, exist_ok=True)
    settings = asdict(sampler) | {"dtype": str(dtype).removeprefix("torch.")}
    identity = {system.name: system_identity(system) for system in systems}
    keys, jobs = _plan(systems, identity, prompts, seeds, settings)
    with state.split_between_processes(list(jobs)) as mine:
        own = {key: jobs[key] for key in cast(list[str], mine)}
        _draw(own, folder, sampler, dtype, torch.device(device or state.device or "cpu"), batch_size)
        scored = _score(own, folder, scorers)
    scores: dict[str, Scores] = dict(gather_object(list(scored.items())))
    rows = [
        {"system": name, "prompt": prompt, "seed": seed, "image": f"images/{key}.webp", "scores": scores[key]}
        for (name, prompt, seed), key in keys.items()
    ]
    described = {system.name: {**asdict(system), "identity": identity[system.name]} for system in systems}
    summary = summarise(rows, described, settings, tie)
    if state.is_main_process:
        with writing(folder):
            write_atomically(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_atomically(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    state.wait_for_everyone()
    return summary


def _plan(
    systems: Sequence[System],
    identity: Mapping,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping,
) -> tuple[dict[tuple[str, str, int], str], dict[str, _Job]]:
    """The image key of each (system, prompt, seed), in the table's order; and each key's job, once."""
    keys, jobs = {}, {}
    for system in systems:
        for prompt in prompts:
            for seed in seeds:
                key = content_key(json.dumps([identity[system.name], prompt, seed, settings]))
                keys[system.name, prompt, seed] = key
                jobs.setdefault(key, _Job(system, prompt, seed))  # the base and an adapter at 0 share images
    return keys, jobs


def processes() -> PartialState:
    """Which of how many processes this is; without `cpu`, those on CPUs would each believe to be one."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _check(systems: Sequence[System], prompts: Sequence[str], seeds: Sequence[int], scorers: Mapping) -> None:
    for what, items, least in (
        ("systems", [s.name for s in systems], 2),
        ("prompts", prompts, 2),
        ("seeds", seeds, 1),
    ):
        if len(items) < least:
            raise InputError(f"a comparison needs {least} {what} or more, not {len(items)}")
        if len(set(items)) < len(items):
            twice = next(item for item in items if list(items).count(item) > 1)
            raise InputError(f"{twice!r} is named twice among the {what}; name each once")
    if not scorers:
        raise InputError("a comparison needs a scorer")


def _draw(
    jobs: Mapping[str, _Job],
    folder: Path,
    sampler: Sampler,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
) -> None:
    """Draw the images that are not there yet, one system after the other."""
    missing = {key: job for key, job in jobs.items() if not _image_path(folder, key).exists()}
    pipeline, loaded = None, None
    progress = tqdm(total=len(missing), desc="images", unit="image", disable=not missing or _quiet())
    for system in dict.fromkeys(job.system for job in missing.values()):
        keys = [key for key, job in missing.items() if job.system == system]
        adapter = system.adapter if system.scale != 0 else None
        if loaded != (system.model, system.revision, adapter):
            pipeline = None  # the last system's memory goes before the next one's comes
            pipeline = load_pipeline(
                system.model, adapter=adapter, revision=system.revision, dtype=dtype, device=device
            )
            loaded = (system.model, system.revision, adapter)
        assert pipeline is not None
        if adapter is not None:
            set_adapter_scale(pipeline, system.scale)
        images = sample(
            pipeline,
            [missing[key].prompt for key in keys],
            [missing[key].seed for key in keys],
            batch_size=batch_size,
            **asdict(sampler),
        )
        for key, image in zip(keys, images, strict=True):
            _save(image, _image_path(folder, key))
            progress.update()
    progress.close()


def _image_path(folder: Path, key: str) -> Path:
    return folder / "images" / f"{key}.webp"


def _save(image: Image.Image, path: Path) -> None:
    """Write lossless WebP whole or not at all; method 0 is several times faster than PNG."""
    with writing(path), replacing(path) as partial:
        image.save(partial, format="WEBP", lossless=True, method=0)


def _score(jobs: Mapping[str, _Job], folder: Path, scorers: Mapping[str, Scorer]) -> dict[str, Scores]:
    """Scores of each image by each scorer, those kept from earlier runs and the new ones."""
    ledger = Ledger(folder, "scores", processes().process_index)
    scores: dict[str, Scores] = {key: {} for key in jobs}
    for name, scorer in scorers.items():
        identity = getattr(scorer, "identity", None)
        entry = {key: content_key(f"{identity} {key}") for key in jobs}
        kept = {key: ledger[entry[key]] for key in jobs if identity is not None and entry[key] in ledger}
        missing = [key for key in jobs if key not in kept]
        for start in tqdm(
            range(0, len(missing), _SCORED_AT_ONCE), desc=name, disable=not missing or _quiet()
        ):
            batch = missing[start : start + _SCORED_AT_ONCE]
            images = [Image.open(_image_path(folder, key)).convert("RGB") for key in batch]
            values = scorer(images, [jobs[key].prompt for key in batch])
            kept |= dict(zip(batch, _by_image(values, len(batch), name), strict=True))
            if identity is not None:
                ledger.add({entry[key]: kept[key] for key in batch})
        for key, values in kept.items():
            scores[key] |= {f"{name}/{part}" if part else name: value for part, value in values.items()}
    return scores


def _by_image(values: np.ndarray | Mapping[str, np.ndarray], count: int, name: str) -> list[Scores]:
    """A scorer's answer as one mapping per image; the part of a lone number is ''."""
    parts = values if isinstance(values, Mapping) else {"": values}
    for part, numbers in parts.items():
        if np.shape(numbers) != (count,):
            raise ValueError(
                f"the scorer {name} gave {np.shape(numbers)} for {part or 'its score'}, not ({count},)"
            )
    return [{part: np.asarray(numbers)[i].item() for part, numbers in parts.items()} for i in range(count)]


def _quiet() -> bool:
    return not processes().is_main_process
