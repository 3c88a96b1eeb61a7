"""What a self-rewarding build amounts to: BUILD.json, the dataset card, and a sentence for the terminal."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_builders.export import reasons
from data_builders.stages import REASON, Record
from prefopt.judges.rubric import Rubric
from prefopt.records import InputError
from prefopt.runs import versions
from prefopt.store import write_atomically, writing

NOTHING = "no candidate"


class Summary:
    """Counts over the candidates themselves, so a build that was resumed counts the same."""

    def __init__(self, rubric: Rubric):
        self.rubric = rubric
        self.candidates = 0
        self.prompts, self.optimal = Counter[str](), Counter[str]()  # by class
        self.without: Counter[str] = Counter()  # prompts without an optimal image, by reason
        self.dropped: Counter[str] = Counter()  # candidates, by reason
        self.verdicts: dict[str, Counter[str]] = defaultdict(Counter)  # by question
        self.scores: list[float] = []
        self.optimal_scores: list[float] = []
        self.detected = 0  # candidates with a box
        self.seconds = 0.0

    def add(self, group: list[Record]) -> None:
        """Count the candidates of one prompt."""
        self.candidates += len(group)
        self.prompts[group[0]["class"]] += 1
        self.dropped.update(row[REASON] for row in group if row[REASON])
        self.seconds += sum(row["seconds"] for row in group)
        judged = [row for row in group if row["rank"] is not None]
        self.scores += [row["hard_score"] for row in judged]
        self.detected += sum(bool(row["boxes"]) for row in judged)
        for row in judged:
            for name, verdict in zip(row["questions"], row["verdicts"], strict=True):
                self.verdicts[name][verdict or "unclear"] += 1
        chosen = [row for row in group if row["selected"]]
        if chosen:
            self.optimal[group[0]["class"]] += 1
            self.optimal_scores.append(chosen[0]["hard_score"])
        else:
            best = max(judged, key=lambda row: row["hard_score"], default=None)
            self.without[best[REASON] if best else NOTHING] += 1

    def figures(self) -> dict:
        """The figures as BUILD.json holds them."""
        return {
            "prompts": dict(self.prompts),
            "candidates": self.candidates,
            "judged": len(self.scores),
            "optimal": dict(self.optimal),
            "mean_hard_score": _mean(self.scores),
            "mean_hard_score_of_optimal": _mean(self.optimal_scores),
            "highest_possible": sum(item.weight for item in self.rubric.items),
            "with_a_box": self.detected,
            "verdicts": {name: dict(sorted(counts.items())) for name, counts in self.verdicts.items()},
            "seconds_drawing": round(self.seconds, 1),
        }

    def facts(self, counts: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
        """A few lines for the gallery and the card."""
        figures = self.figures()
        rows = {name: sum(by_split.values()) for name, by_split in counts.items() if name != "candidates"}
        return {
            "prompts": ", ".join(f"{count} {name}" for name, count in self.prompts.items()),
            "candidates": f"{figures['candidates']}, {figures['judged']} judged, {self.detected} with a box",
            "optimal images": f"{sum(self.optimal.values())} (none: {reasons(self.without)})",
            "mean hard score": f"{figures['mean_hard_score']} of at most {figures['highest_possible']:g}; "
            f"of the optimal images {figures['mean_hard_score_of_optimal']}",
            "candidates not optimal": reasons(self.dropped),
            "rows": ", ".join(f"{count} {name}" for name, count in rows.items()),
        }


def _mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


CARD = """---
configs:
{configs}
---

# Images that {model} drew and {judge} judged

{table}

Prompts for {classes}; {per_prompt} candidates of each. The judge answered the rubric `{rubric}` about every
candidate; clear answers make points, their sum is the hard score, and how sure the answers are makes the soft
score{calibrated}.

`sft`: {optimal} (from {threshold}).
`pairs` and `ranked`: by soft score; pairs by the rule `{pair_rule}`. Splits are by prompt.

`candidates` has every image with its seed, answers, boxes, rank, and why it was not selected.
"""


def write_build(
    folder: Path,
    settings: dict,
    identities: Mapping[str, str],
    summary: Summary,
    counts: Mapping[str, Mapping[str, int]],
    run: Mapping,
) -> str:
    """Write BUILD.json and README.md; a sentence. A build without any row is an InputError that says why."""
    build = {
        "figures": summary.figures(),
        "rows": {name: dict(by_split) for name, by_split in counts.items()},
        "dropped": {"prompts": dict(summary.without), "candidates": dict(summary.dropped)},
        "run": run,
        "settings": settings,
        "identity": identities,
        "versions": versions(),
    }
    with writing(folder):
        write_atomically(folder / "BUILD.json", json.dumps(build, indent=2) + "\n")
        write_atomically(folder / "README.md", card(settings, summary, counts))
    made = {name: sum(by_split.values()) for name, by_split in counts.items() if name != "candidates"}
    said = "; ".join(f"{name}: {fact}" for name, fact in summary.facts(counts).items())
    if not any(made.values()):
        raise InputError(
            f"{folder}: nothing was selected ({said}). See BUILD.json for each question's answers; lower "
            "--detection_threshold or --min_margin, or name another judge or detector"
        )
    return f"{folder}: {said}"


def card(settings: dict, summary: Summary, counts: Mapping[str, Mapping[str, int]]) -> str:
    """The README.md of a dataset: figures, and where its tables are."""
    configs = []
    for name, by_split in counts.items():
        if name == "imagefolder" or not by_split:
            continue
        files = [f'  - split: {split}\n    path: "{name}/{split}-*.parquet"' for split in by_split]
        configs.append(f"- config_name: {name}\n  data_files:\n" + "\n".join(files))
    table = "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in summary.facts(counts).items())])
    optimal = f"of the best hard scores, the image on which {settings['detector']} is surest of the class"
    if summary.rubric.soft_decides:
        optimal = f"the best soft score of the images on which {settings['detector']} finds the class"
    return CARD.format(
        configs="\n".join(configs),
        table=table,
        model=" and ".join(settings["sources"]) or settings["model_name_or_path"],
        judge=settings["judge_url"] or settings["judge_model_name_or_path"],
        classes=", ".join(settings["classes"]),
        per_prompt=settings["candidates"],
        rubric=settings["rubric"],
        calibrated=", less what it says about an empty image" if settings["calibrate"] else "",
        optimal=optimal,
        threshold=settings["detection_threshold"],
        pair_rule=settings["pair_rule"],
    )
