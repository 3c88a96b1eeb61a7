"""One self-contained report.html from a comparison's summary.json and results.jsonl."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from rich.table import Table

from prefopt.evaluation import figures, words
from prefopt.records import InputError
from prefopt.store import write_atomically, writing

_LONGEST_SIDE = 320  # pixels of an embedded image


def page_templates(folder: Path) -> Environment:
    """The Jinja templates of a folder: what they show is escaped, and a name they do not know is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_report(
    output_dir: str | Path, *, runs: Sequence[str | Path] = (), shown: int = 24, title: str = ""
) -> Path:
    """Write report.html beside the summary.json that `compare` left; return its path.

    `runs` are folders of training runs whose metrics.jsonl is drawn. `shown` bounds the rows of images: a
    third each of the worst changes, the best, and a random sample.
    """
    folder = Path(output_dir)
    if not (folder / "summary.json").is_file():
        raise InputError(f"no comparison in {folder}: it holds no summary.json; run the comparison first")
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    page = (
        page_templates(Path(__file__).parent)
        .get_template("report.html.jinja")
        .render(
            title=title or f"{' and '.join(_changed(summary))} against {next(iter(summary['systems']))}",
            summary=summary,
            findings=[_finding(contrast, summary) for contrast in summary["contrasts"]],
            table=_table(summary),
            figures=[
                {"title": drawing.title, "svg": Markup(drawing.svg)}
                for drawing in _figures(summary, [Path(run) for run in runs])
            ],
            galleries=_galleries(folder, summary, rows, shown),
            words=words,
            clip="clip" in summary["metrics"],
        )
    )
    path = folder / "report.html"
    with writing(path):
        write_atomically(path, page)
    return path


def terminal_table(summary: dict) -> Table:
    """Each system's means, and its change to the first where there is one."""
    columns = [metric for metric in summary["metrics"] if words.is_headline(metric)]
    gaps = {contrast["system"]: contrast["metrics"] for contrast in summary["contrasts"]}
    shown = Table("system", *(words.metric_name(metric) for metric in columns), "wins without ties (CLIP)")
    for name, system in summary["systems"].items():
        cells = []
        for metric in columns:
            kind = summary["metrics"][metric]
            cells.append(words.value(system["means"][metric], kind))
            if name in gaps:
                gap = gaps[name][metric]["difference"]
                cells[-1] += f"  {words.change(gap['mean'], kind)}"
                cells[-1] += f" ({words.bare(gap['low'], kind)} to {words.bare(gap['high'], kind)})"
        wins = words.percent(gaps[name]["clip"]["wins"]["rate_without_ties"]) if name in gaps else ""
        shown.add_row(name, *cells, wins)
    return shown


def _changed(summary: Mapping) -> list[str]:
    """The compared systems, an adapter at several scales named once."""
    described = summary["systems"]
    names = [contrast["system"] for contrast in summary["contrasts"]]
    return list(
        dict.fromkeys(Path(described[n]["adapter"]).name if _is_curve(summary, n) else n for n in names)
    )


def _finding(contrast: Mapping, summary: Mapping) -> dict:
    """What one contrast says, metric by metric, in sentences."""
    kinds = summary["metrics"]
    metrics = [metric for metric in contrast["metrics"] if words.is_headline(metric)]
    return {
        "system": contrast["system"],
        "against": contrast["against"],
        "same": _same_weights(summary, contrast),
        "warning": words.disagreement(contrast),
        "sentences": [
            {
                "difference": words.difference_sentence(metric, kinds[metric], contrast["metrics"][metric]),
                "wins": words.win_sentence(contrast["system"], contrast["metrics"][metric]),
                "verdict": words.verdict(contrast["metrics"][metric], summary["prompts"]),
            }
            # Whoever knows the truth speaks before whoever was trained on.
            for metric in sorted(metrics, key=lambda metric: kinds[metric] != "proportion")
        ],
    }


def _same_weights(summary: Mapping, contrast: Mapping) -> bool:
    """Whether both sides of a contrast are one model: an adapter at scale 0, for instance."""
    systems = summary["systems"]
    return systems[contrast["system"]]["identity"] == systems[contrast["against"]]["identity"]


def _table(summary: Mapping) -> list[dict]:
    """Means of every metric (rows) and system (columns), each with its change to the first system."""
    first = next(iter(summary["systems"]))
    gaps = {contrast["system"]: contrast["metrics"] for contrast in summary["contrasts"]}
    return [
        {
            "metric": words.metric_name(metric),
            "cells": [
                {
                    "mean": words.value(system["means"][metric], kind),
                    "change": ""
                    if name == first
                    else words.change(gaps[name][metric]["difference"]["mean"], kind),
                    "sure": name != first and _excludes_zero(gaps[name][metric]["difference"]),
                }
                for name, system in summary["systems"].items()
            ],
        }
        for metric, kind in sorted(
            summary["metrics"].items(), key=lambda item: not words.is_headline(item[0])
        )
    ]


def _excludes_zero(gap: Mapping) -> bool:
    return gap["low"] > 0 or gap["high"] < 0


def _figures(summary: Mapping, runs: Sequence[Path]) -> list[figures.Drawing]:
    headline = {metric: kind for metric, kind in summary["metrics"].items() if words.is_headline(metric)}
    drawn = [figures.win_bars(summary["contrasts"], metric) for metric in headline]
    for contrasts in _curves(summary):
        scales = [summary["systems"][contrast["system"]]["scale"] for contrast in contrasts]
        drawn += [figures.scale_curve(contrasts, scales, metric, kind) for metric, kind in headline.items()]
    if runs:
        names = [run.name for run in runs]
        names = names if len(set(names)) == len(names) else [str(run) for run in runs]
        drawn += figures.training_curves(dict(zip(names, map(_read_metrics, runs), strict=True)))
    return drawn


def _curves(summary: Mapping) -> list[list[Mapping]]:
    """The contrasts of each adapter that was compared at several scales."""
    by_adapter: dict[tuple, list[Mapping]] = {}
    for contrast in summary["contrasts"]:
        system = summary["systems"][contrast["system"]]
        if system["adapter"] is not None:
            by_adapter.setdefault((system["model"], system["adapter"]), []).append(contrast)
    return [contrasts for contrasts in by_adapter.values() if len(contrasts) > 1]


def _is_curve(summary: Mapping, name: str) -> bool:
    return any(contrast["system"] == name for contrasts in _curves(summary) for contrast in contrasts)


def _read_metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{run} is no training run: it holds no metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not any("loss" in line for line in lines):
        raise InputError(f"{path} holds no losses")
    return lines


def _galleries(folder: Path, summary: Mapping, rows: Sequence[Mapping], shown: int) -> list[dict]:
    """Sections of image rows: worst and best changes of the system that changed most, and a random sample."""
    metric = next(iter(summary["metrics"]))
    focus = max(
        summary["contrasts"], key=lambda contrast: abs(contrast["metrics"][metric]["difference"]["mean"])
    )
    columns: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        columns.setdefault((row["prompt"], row["seed"]), {})[row["system"]] = row

    def gain(pair: tuple) -> float:
        row = columns[pair]
        return row[focus["system"]]["scores"][metric] - row[focus["against"]]["scores"][metric]

    ordered, tie = sorted(columns, key=gain), summary["settings"]["tie"]
    count = max(1, shown // 3)
    worst = [pair for pair in ordered if gain(pair) < -tie][:count]
    best = [pair for pair in reversed(ordered) if gain(pair) > tie][:count]
    rest = [pair for pair in ordered if pair not in worst and pair not in best]
    picked = random.Random(0).sample(rest, min(max(0, shown - len(worst) - len(best)), len(rest)))
    measure = f"{words.metric_name(metric)}, {focus['system']} against {focus['against']}"
    sections = [
        ("Largest losses", worst, measure),
        ("Largest gains", best, measure),
        ("A random sample of the rest", picked, ""),
    ]
    return [
        {
            "title": name,
            "measure": measure,
            "rows": [
                _gallery_row(folder, summary, columns[pair], pair, metric, gain(pair)) for pair in pairs
            ],
        }
        for name, pairs, measure in sections
        if pairs
    ]


def _gallery_row(
    folder: Path, summary: Mapping, row: Mapping[str, Mapping], pair: tuple, metric: str, gain: float
) -> dict:
    kind = summary["metrics"][metric]
    return {
        "prompt": pair[0],
        "seed": pair[1],
        "change": words.change(float(gain), kind),
        "cells": [
            {
                "system": name,
                **_embedded(folder / row[name]["image"]),
                "scores": [
                    {
                        "name": words.metric_name(key),
                        "text": words.value(float(score), summary["metrics"][key]),
                    }
                    for key, score in row[name]["scores"].items()
                    if summary["metrics"][key] == "score"
                ],
                "marks": _marks(row[name]["scores"]),
            }
            for name in summary["systems"]
        ],
    }


def _marks(scores: Mapping[str, float | bool]) -> list[dict]:
    """Right or wrong, for each headline metric of booleans, with the parts that are wrong."""
    marks = []
    for metric, right in scores.items():
        if not (isinstance(right, bool) and words.is_headline(metric)):
            continue
        scorer, _, part = metric.partition("/")
        parts = [
            m.partition("/")[2]
            for m, score in scores.items()
            if part and m.startswith(f"{scorer}/") and not score
        ]
        marks.append({"name": scorer, "right": right, "wrong": [name for name in parts if name != part]})
    return marks


def _embedded(path: Path) -> dict:
    """A data URI: the image as it is if it is small; else at most 320 pixels wide or high, lossy."""
    with Image.open(path) as image:
        is_small = max(image.size) <= _LONGEST_SIDE // 2
        if is_small:
            content = path.read_bytes()
        else:
            small = image.convert("RGB")
            small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.save(buffer, format="WEBP", quality=82)
            content = buffer.getvalue()
    return {"image": f"data:image/webp;base64,{base64.b64encode(content).decode()}", "is_small": is_small}
