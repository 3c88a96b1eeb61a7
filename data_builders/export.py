"""From the candidates table to pairs, to the figures of BUILD.json, and to the dataset card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_builders.candidates import TOO_FEW
from data_builders.shards import PAIRS, Export, write_exports
from data_builders.stages import REASON, Record, by_prompt
from prefopt.records import InputError
from prefopt.runs import versions
from prefopt.store import write_atomically, writing


@dataclass
class Figures:
    """What a build amounts to, counted over the table itself: a build that was resumed counts the same."""

    prompts: int = 0
    candidates: int = 0
    pairs: Counter[str] = field(default_factory=Counter)  # by split
    dropped_prompts: Counter[str] = field(default_factory=Counter)  # by reason
    dropped_candidates: Counter[str] = field(default_factory=Counter)
    scores: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    largest_margin: float = 0.0  # of all prompts, pair or not
    model_seconds: float = 0.0

    def add(self, group: list[Record]) -> None:
        """Count the candidates of one prompt."""
        self.prompts += 1
        self.candidates += len(group)
        self.dropped_candidates.update(row[REASON] for row in group if row[REASON])
        self.model_seconds += sum(row["seconds"] for row in group)
        scores = [row["clip_score"] for row in group if row["rank"] is not None]
        self.scores += scores
        self.largest_margin = max(self.largest_margin, max(scores, default=0.0) - min(scores, default=0.0))

    def summary(self) -> dict:
        """The figures as BUILD.json holds them."""
        return {
            "prompts": self.prompts,
            "candidates": self.candidates,
            "pairs": dict(sorted(self.pairs.items())),
            "mean_margin": _mean(self.margins),
            "largest_margin": round(self.largest_margin, 4),
            "mean_score": _mean(self.scores),
            "seconds_drawing": round(self.model_seconds, 1),
        }


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def export_pairs(rows: Iterable[Record], folder: Path, *, test_fraction: float, max_bytes: int) -> Figures:
    """Write each prompt's selected rows as a pair, in the split its text falls to; `folder` is replaced."""
    figures = Figures()

    def pair(group: list[Record]) -> list[Record]:
        figures.add(group)
        selected = sorted((row for row in group if row["selected"]), key=lambda row: row["rank"])
        if not selected:
            reasons = [row[REASON] for row in group if row["rank"] is not None]
            figures.dropped_prompts[reasons[0] if reasons else TOO_FEW] += 1
            return []
        made = make_pair(*selected)
        figures.margins.append(made["margin"])
        return [made]

    export = Export(folder.name, PAIRS, pair)
    counts = write_exports(
        by_prompt(rows), folder.parent, [export], test_fraction=test_fraction, max_bytes=max_bytes
    )
    figures.pairs = counts[folder.name]
    return figures


def make_pair(chosen: Record, rejected: Record) -> Record:
    """One row of the pairs table."""
    return {
        "prompt": chosen["prompt"],
        "chosen": chosen["image"],
        "rejected": rejected["image"],
        "margin": chosen["clip_score"] - rejected["clip_score"],
        "chosen_score": chosen["clip_score"],
        "rejected_score": rejected["clip_score"],
        "prompt_id": chosen["prompt_id"],
        "chosen_seed": chosen["seed"],
        "rejected_seed": rejected["seed"],
    }


CARD = """---
configs:
- config_name: pairs
  default: true
  data_files:
{splits}
- config_name: candidates
  data_files: candidates/*.parquet
---

# Preference pairs drawn by {model}

{pairs} pairs of {prompts} prompts. Each prompt was drawn {per_prompt} times by {drawer}; the candidate with
the best CLIP score ({scorer}) is the chosen image, the one with the worst is the rejected one. They differ by
{mean_margin} points in the mean.

| | |
|---|---|
| candidates | {candidates}, mean score {mean_score} |
| sampler | {num_inference_steps} steps, guidance {guidance_scale}, seed {seed} |
| smallest margin allowed | {min_margin} |
| prompts without a pair | {dropped_prompts} |
| candidates not used | {dropped_candidates} |

`candidates/` has a row for every image, with its seed: it can be drawn again alone. `pairs/` is made from it.
BUILD.json has the settings, the identities of the models, and the versions.
"""


def write_build(folder: Path, settings: dict, identity: dict, figures: Figures, run: dict) -> str:
    """Write BUILD.json and README.md; return the counts in words. A build without a pair is an InputError."""
    build = {
        "figures": figures.summary(),
        "dropped": {
            "prompts": dict(sorted(figures.dropped_prompts.items())),
            "candidates": dict(sorted(figures.dropped_candidates.items())),
        },
        "run": run,
        "settings": settings,
        "identity": identity,
        "versions": versions(),
    }
    with writing(folder):
        write_atomically(folder / "BUILD.json", json.dumps(build, indent=2) + "\n")
        if figures.pairs:
            write_atomically(folder / "README.md", card(build))
    counts = f"{figures.prompts} prompts, {figures.candidates} candidates"
    dropped = f"prompts dropped: {reasons(figures.dropped_prompts)}"
    if not figures.pairs:
        raise InputError(
            f"{folder}: {counts} and no pair ({dropped}); largest margin {figures.largest_margin:.4g}. "
            "Draw more --candidates, or lower --min_margin"
        )
    pairs = ", ".join(f"{count} {split}" for split, count in sorted(figures.pairs.items()))
    return f"{folder}: {counts}, pairs: {pairs} ({dropped}), mean margin {_mean(figures.margins)}"


def card(build: dict) -> str:
    """The README.md of a dataset, from its BUILD.json."""
    settings, figures = build["settings"], build["figures"]
    adapter = f" with {settings['adapter']} at {settings['adapter_scale']:g}" if settings["adapter"] else ""
    splits = [f'  - split: {split}\n    path: "pairs/{split}-*.parquet"' for split in figures["pairs"]]
    return CARD.format(
        **settings | figures | {"pairs": sum(figures["pairs"].values())},
        splits="\n".join(splits),
        model=settings["model_name_or_path"],
        drawer=settings["model_name_or_path"] + adapter,
        scorer=settings["clip_model_name_or_path"],
        per_prompt=settings["candidates"],
        dropped_prompts=reasons(build["dropped"]["prompts"]),
        dropped_candidates=reasons(build["dropped"]["candidates"]),
    )


def reasons(counts: Mapping[str, int]) -> str:
    """Counts of reasons in words."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"
