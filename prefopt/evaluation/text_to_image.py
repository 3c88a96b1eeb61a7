"""Text-to-image systems on the same prompts and the same seeds: generate, score, and compare.

Everything is kept by content. An image's key holds the weights, the adapter and its scale, the prompt, the
seed and the sampler's settings; a score's key holds the image's key and the scorer's identity. A rerun, after
a crash or with one more system, generates and scores only what is new. With several processes each generates
its share; they must share the folder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import gather_object
from PIL import Image

from prefopt.diffusion.generator import Generator, Sampler
from prefopt.diffusion.lora import set_adapter_scale
from prefopt.diffusion.sampling import load_generator, sample
from prefopt.evaluation.scorers import Scorer
from prefopt.evaluation.scoring import Scores, kept_scores, processes, quiet, write_results
from prefopt.evaluation.summary import summarise
from prefopt.evaluation.systems import check_each_once
from prefopt.evaluation.votes import Ballot, check_votes, system_identity
from prefopt.files import content_key, remove_partials, reporting_write_errors
from prefopt.images import read_saved, save_image
from prefopt.ledger import Ledger
from prefopt.progress import progress_bar

SEEDS_APART = 1000  # from a prompt's seeds to the next prompt's


@dataclass(frozen=True)
class _Job:
    """One image to generate."""

    generator: Generator
    prompt: str
    seed: int


def compare(
    systems: Mapping[str, Generator],
    prompts: Sequence[str],
    seeds: Sequence[int],
    scorers: Sequence[Scorer],
    output_dir: str | Path,
    *,
    families: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
    ballots: Sequence[Ballot] = (),
    tie: float = 0.01,
    device: str | torch.device | None = None,
    batch_size: int = 8,
) -> dict:
    """Generate and score every (system, prompt, seed); write images, results.jsonl and summary.json.

    `seeds` are those of the first prompt; the prompt after it has the same ones plus `SEEDS_APART`, and so
    on. One noise for all prompts would make their images alike in what the noise decides, and an interval
    over prompts says nothing of other noise.

    Returns the summary, in which the systems are compared with the first. `families` names of each system
    what it is a variant of, at another guidance or scale; the families are then also compared each at its
    best. `groups` names of each prompt what it asks for, where several ask for the same. `ballots` are
    people's votes about these images. Raises InputError for fewer than two systems or prompts, for repeated
    ones, and for votes about other images.
    """
    _check(systems, prompts, seeds, scorers)
    state = processes()
    folder = Path(output_dir)
    with reporting_write_errors(folder):
        (folder / "images").mkdir(parents=True, exist_ok=True)
    weights = {name: generator.weights for name, generator in systems.items()}
    described = {
        name: _described(name, generator, weights[name]) | {"family": (families or {}).get(name, name)}
        for name, generator in systems.items()
    }
    keys, jobs = _plan(systems, weights, prompts, seeds)
    check_votes(ballots, {name: system_identity(one) for name, one in described.items()}, keys)
    with state.split_between_processes(list(jobs)) as mine:
        own = {key: jobs[key] for key in cast(list[str], mine)}
        _generate(own, folder, torch.device(device or state.device or "cpu"), batch_size)
        scored = _score(own, folder, scorers)
    scores: dict[str, dict[str, Scores]] = dict(gather_object(list(scored.items())))
    if state.is_main_process:  # all images are there
        remove_partials(folder / "images")
    first = next(iter(scores.values()))
    metrics = {m: told for s in scorers for m, told in s.describe(list(first[s.name])).items()}
    rows = [
        {
            "system": name,
            "prompt": prompt,
            "seed": seed,
            "image": f"images/{key}.webp",
            "scores": {m: scores[key][told["scorer"]][told["part"]] for m, told in metrics.items()},
        }
        for (name, prompt, seed), key in keys.items()
    ]
    summary = summarise(rows, described, metrics, tie, groups, ballots)
    write_results(folder, rows, summary)
    return summary


def _described(name: str, generator: Generator, weights: Mapping) -> dict:
    """A system in summary.json."""
    return {
        "name": name,
        "model": generator.model,
        "adapter": generator.adapter,
        "scale": generator.adapter_scale,
        "revision": generator.revision,
        "settings": generator.settings,
        "identity": weights,
    }


def _plan(
    systems: Mapping[str, Generator], weights: Mapping, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[dict[tuple[str, str, int], str], dict[str, _Job]]:
    """The image key of each (system, prompt, seed), in the table's order; and each key's job, once."""
    keys, jobs = {}, {}
    for name, generator in systems.items():
        for place, prompt in enumerate(prompts):
            for seed in (first + SEEDS_APART * place for first in seeds):
                key = content_key(json.dumps([weights[name], prompt, seed, generator.settings]))
                keys[name, prompt, seed] = key
                # The base and an adapter at scale 0 share their images.
                jobs.setdefault(key, _Job(generator, prompt, seed))
    return keys, jobs


def _check(
    systems: Mapping[str, Generator], prompts: Sequence[str], seeds: Sequence[int], scorers: Sequence[Scorer]
) -> None:
    check_each_once("systems", list(systems), least=2)
    check_each_once("prompts", prompts, least=2)
    check_each_once("seeds", seeds)
    check_each_once("scorers", [scorer.name for scorer in scorers])


def _generate(jobs: Mapping[str, _Job], folder: Path, device: torch.device, batch_size: int) -> None:
    """Generate the images that are not there yet, one system after the other.

    An image's last bits depend on its batch, so a batch that lacks any image is generated again as a whole.
    """
    missing = {key: job for key, job in jobs.items() if not _image_path(folder, key).exists()}
    pipeline, loaded = None, None
    progress = progress_bar(total=len(missing), desc="images", unit="image", disable=not missing or quiet())
    for generator in dict.fromkeys(job.generator for job in missing.values()):
        every = [key for key, job in jobs.items() if job.generator == generator]
        batches = [every[start : start + batch_size] for start in range(0, len(every), batch_size)]
        keys = [key for batch in batches if not missing.keys().isdisjoint(batch) for key in batch]
        adapter = generator.adapter if generator.adapter_scale != 0 else None
        # Another scale or guidance needs no other weights.
        needed = replace(generator, adapter=adapter, adapter_scale=1.0, sampler=Sampler())
        if loaded != needed:
            pipeline = None  # the last system's memory is freed before the next one is loaded
            pipeline, loaded = load_generator(needed, device), needed
        if adapter is not None:
            set_adapter_scale(pipeline, generator.adapter_scale)
        images = sample(
            pipeline,
            [jobs[key].prompt for key in keys],
            [jobs[key].seed for key in keys],
            generator.sampler,
            batch_size=batch_size,
        )
        for key, image in zip(keys, images, strict=True):
            if key in missing:
                save_image(image, _image_path(folder, key))
                progress.update()
    progress.close()


def _image_path(folder: Path, key: str) -> Path:
    return folder / "images" / f"{key}.webp"


def _score(jobs: Mapping[str, _Job], folder: Path, scorers: Sequence[Scorer]) -> dict[str, dict[str, Scores]]:
    """Each image's scores by scorer and part: those kept from earlier runs, and the new ones."""
    ledger = Ledger(folder, "scores", processes().process_index)

    def images_and_prompts(keys: Sequence[str]) -> tuple[list[Image.Image], list[str]]:
        images = [read_saved(_image_path(folder, key)) for key in keys]
        return images, [jobs[key].prompt for key in keys]

    found = {scorer.name: kept_scores(scorer, list(jobs), images_and_prompts, ledger) for scorer in scorers}
    return {key: {name: scores[key] for name, scores in found.items()} for key in jobs}
