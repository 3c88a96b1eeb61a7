"""A comparison of text-to-image systems on disk, from scores that a test makes up; nothing is generated."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from prefopt.evaluation.summary import summarise

SEEDS = (0, 1, 2)
METRICS = {
    "clip": {"title": "CLIP score", "kind": "score", "is_truth": False},
    "truth": {"title": "truth", "kind": "proportion", "is_truth": True},
    "error": {"title": "error", "kind": "loss", "is_truth": False},
}
for _name, _told in METRICS.items():
    _told |= {"scorer": _name, "part": "", "is_headline": True, "about": f"what {_name} says"}

Scores = Callable[[str, int], dict]  # of a system and a prompt's place


def system(name: str, family: str = "", scale: float = 1.0, guidance: float = 3.0, **more) -> dict:
    """An entry of summary.json's systems, of an adapter unless it is the base."""
    is_base = (family or name) == "base"
    return {
        "name": name,
        "family": family or name,
        "model": "pocket",
        "adapter": None if is_base else f"none/{family or name}",
        "scale": scale,
        "revision": None,
        "settings": {"guidance_scale": guidance, "num_inference_steps": 4},
        "identity": {"model": f"weights of {family or name}", "adapter": None, "scale": scale},
        **more,
    }


def rows_of(systems: Mapping[str, Mapping], prompts: Sequence[str], scores: Scores) -> list[dict]:
    """The rows of results.jsonl; a system's image is called after it."""
    names = list(systems)
    return [
        {
            "system": name,
            "prompt": prompt,
            "seed": 1000 * i + seed,
            "image": f"images/{names.index(name)}-{i}-{seed}.webp",
            "scores": scores(name, i),
        }
        for name in names
        for i, prompt in enumerate(prompts)
        for seed in SEEDS
    ]


def write_comparison(
    folder: Path, systems: Sequence[Mapping], prompts: Sequence[str], scores: Scores, ballots: Sequence = ()
) -> dict:
    """Write summary.json, results.jsonl and the images, each of a colour of its own; the summary."""
    by_name = {one["name"]: one for one in systems}
    rows = rows_of(by_name, prompts, scores)
    summary = summarise(rows, by_name, METRICS, 0.01, ballots=ballots)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        colour = (40 * list(by_name).index(row["system"]), 5 * i % 256, 200)
        Image.new("RGB", (16, 16), colour).save(folder / row["image"], lossless=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary
