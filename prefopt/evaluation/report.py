"""The report of a comparison, from its summary.json and results.jsonl.

report.html is one self-contained file. blind.html, on which people vote, and enlarged pictures load the files
of `images/` beside them, at their full size. prompts.csv has the scores by prompt.
"""

import base64
import hashlib
import io
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from rich.table import Table

from prefopt.errors import InputError
from prefopt.evaluation import words
from prefopt.evaluation.charts import charts_of
from prefopt.evaluation.prompt_table import prompt_table
from prefopt.evaluation.summary import deciding_metric, gaps_to_first, headlines
from prefopt.evaluation.training_runs import TrainingRun, settings_table, training_runs
from prefopt.evaluation.votes import system_identity
from prefopt.files import content_key, reporting_write_errors, write_atomically
from prefopt.images import read_saved
from prefopt.runs import VALIDATION_STRIPS

_LONGEST_SIDE = 320  # pixels of an embedded image
_SMALL = 160  # pixels up to which an image is shown enlarged, its pixels as squares


def page_templates(folder: Path) -> Environment:
    """The Jinja templates of a folder: what they show is escaped, and a name they do not know is an error.

    The filter `sha256` gives a script's hash as a content security policy has it.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _sha256
    return environment


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def write_report(
    output_dir: str | Path, *, runs: Sequence[str | Path] = (), shown: int = 24, title: str = ""
) -> Path:
    """Write report.html, blind.html and prompts.csv beside what `compare` left; return the report's path.

    Settings and curves are shown of the training runs that the systems come from, and of the folders `runs`.
    `shown` bounds the rows of images: a third each of the worst changes, the best, and a random sample.
    """
    folder = Path(output_dir)
    if not (folder / "summary.json").is_file():
        raise InputError(f"no comparison in {folder}: it holds no summary.json; run the comparison first")
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    headline = headlines(summary)
    families = list(dict.fromkeys(system["family"] for system in summary["systems"].values()))
    trained = training_runs(
        {one["family"]: one["adapter"] or one["model"] for one in summary["systems"].values()}, runs
    )
    templates = page_templates(Path(__file__).parent)
    page = templates.get_template("report.html.jinja").render(
        title=title or f"{' and '.join(families[1:])} against {families[0]}",
        summary=summary,
        headline=headline,
        titles={metric: told["title"] for metric, told in headline.items()},
        shown_metrics=headline | summary["metrics"],
        gaps=gaps_to_first(summary),
        of="prompts",
        look_at="pictures",
        figures=charts_of(summary, {run.name: run.lines for run in trained if run.has_losses}),
        runs=trained,
        training=settings_table(trained),
        strips=_strips(trained),
        shown=_shown(summary),
        galleries=_galleries(summary, rows, shown),
        embedded=lambda image: _embedded_file(folder / image),
        words=words,
    )
    blind = templates.get_template("blind.html.jinja").render(
        title="Which image is better?", comparison=_blind_comparison(summary, rows)
    )
    with reporting_write_errors(folder):
        write_atomically(folder / "prompts.csv", prompt_table(rows, list(summary["metrics"])))
        write_atomically(folder / "blind.html", blind)
        write_atomically(folder / "report.html", page)
    return folder / "report.html"


def terminal_table(summary: dict) -> Table:
    """Each system's means, its change to the first, and how often it wins; above it, if they are too few."""
    headline = headlines(summary)
    won = {metric: told["title"] for metric, told in headline.items() if told["kind"] == "score"}
    gaps = gaps_to_first(summary)
    titles = [told["title"] for told in headline.values()]
    wins = [f"wins without ties ({title})" for title in won.values()]
    shown = Table("system", *titles, *wins, title=words.too_few(summary["groups"]))
    for name, system in summary["systems"].items():
        cells = []
        for metric, told in headline.items():
            kind = told["kind"]
            cells.append(words.value(system["means"][metric], kind))
            if name in gaps and metric in gaps[name]:
                gap = gaps[name][metric]["difference"]
                cells[-1] += f"  {words.change(gap['mean'], kind)}"
                cells[-1] += f" ({words.bare(gap['low'], kind)} to {words.bare(gap['high'], kind)})"
        won_by = [gaps.get(name, {}).get(metric) for metric in won]
        rates = [words.percent(gap["wins"]["rate_without_ties"]) if gap else "" for gap in won_by]
        shown.add_row(name, *cells, *rates)
    return shown


def notes(summary: dict) -> list[str]:
    """The differences that the table lacks, people's votes, and what there is to warn of: a line each."""
    metrics, best, votes = headlines(summary), summary["best"], summary["votes"]
    at_best = ", each at its best" if best else ""
    lines = [
        f"{contrast['system']} against {contrast['against']}{at_best}: "
        + words.difference_sentence(told["title"], told["kind"], contrast["metrics"][metric])
        for contrast in (best["contrasts"] if best else summary["further"])
        for metric, told in metrics.items()
        if metric in contrast["metrics"]
    ]
    if votes:
        lines += [f"People: {words.votes_sentence(pair)}" for pair in votes["pairs"]]
        agreement = votes["agreement"].items()
        lines += [words.agreement_sentence(metrics[metric]["title"], found) for metric, found in agreement]
    warnings = [words.edge_warning(best) if best else None, words.unread_warning(summary)]
    return [*lines, *filter(None, warnings)]


def _shown(summary: Mapping) -> list[str]:
    """The systems whose images are shown: of each family the variant that was its best most often."""
    if summary["best"] and len(summary["best"]["chosen"]) > 1:
        return [max(shares, key=shares.get) for shares in summary["best"]["chosen"].values()]
    return list(summary["systems"])


def _galleries(summary: Mapping, rows: Sequence[Mapping], shown: int) -> list[dict]:
    """Sections of image rows: worst and best changes of the system that changed most, and a random sample."""
    metric, systems = next(iter(summary["metrics"])), summary["systems"]
    first, *others = _shown(summary)
    base = systems[first]["means"][metric]
    focus = max(others, key=lambda name: abs(systems[name]["means"][metric] - base))
    title, better = (
        summary["metrics"][metric]["title"],
        -1 if summary["metrics"][metric]["kind"] == "loss" else 1,
    )
    columns: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        columns.setdefault((row["prompt"], row["seed"]), {})[row["system"]] = row

    def gain(pair: tuple) -> float:
        ours, theirs = (columns[pair][name]["scores"][metric] for name in (focus, first))
        return 0.0 if ours is None or theirs is None else better * (ours - theirs)

    ordered, tie = sorted(columns, key=gain), summary["settings"]["tie"]
    count = max(1, shown // 3)
    worst = [pair for pair in ordered if gain(pair) < -tie][:count]
    best = [pair for pair in reversed(ordered) if gain(pair) > tie][:count]
    rest = [pair for pair in ordered if pair not in worst and pair not in best]
    picked = random.Random(0).sample(rest, min(max(0, shown - len(worst) - len(best)), len(rest)))
    measure = f"{title}, {focus} against {first}"
    sections = [
        ("Largest losses", worst, measure),
        ("Largest gains", best, measure),
        ("A random sample of the rest", picked, ""),
    ]

    def gallery_row(pair: tuple) -> dict:
        change = words.change(float(gain(pair)), summary["metrics"][metric]["kind"])
        return {"prompt": pair[0], "seed": pair[1], "change": change, "images": columns[pair]}

    return [
        {"title": name, "measure": measure, "rows": [gallery_row(pair) for pair in pairs]}
        for name, pairs, measure in sections
        if pairs
    ]


def _blind_comparison(summary: Mapping, rows: Sequence[Mapping]) -> dict:
    """The content of blind.html: the systems, their images by prompt and seed, and the pair shown first."""
    names = list(summary["systems"])
    images: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        images.setdefault((row["prompt"], row["seed"]), {})[row["system"]] = row["image"]
    systems = [{"name": name, "identity": system_identity(summary["systems"][name])} for name in names]
    first, *others = _shown(summary)
    metric = deciding_metric(summary["metrics"])
    better = -1 if summary["metrics"][metric]["kind"] == "loss" else 1
    means = {name: summary["systems"][name]["means"][metric] for name in others}
    best = max(others, key=lambda name: -math.inf if means[name] is None else better * means[name])
    return {
        "key": content_key(json.dumps(systems)),
        "systems": systems,
        "pair": [names.index(first), names.index(best)],
        "small": _SMALL,
        "rows": [
            {"prompt": prompt, "seed": seed, "images": [of_one[name] for name in names]}
            for (prompt, seed), of_one in images.items()
        ],
    }


def _strips(runs: Sequence[TrainingRun]) -> dict[str, str]:
    """The images that runs generated while they trained, as data URIs, by the run's name."""
    strips = {}
    for run in runs:
        if (path := run.folder / VALIDATION_STRIPS).is_file():
            strips[run.name] = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return strips


def _embedded_file(path: Path) -> dict:
    return embedded(read_saved(path), path.read_bytes())


def embedded(image: Image.Image, encoded: bytes | None = None) -> dict:
    """A data URI: a small image as it is (`encoded`, if it is WebP), else of at most 320 pixels a side."""
    is_small = max(image.size) <= _SMALL
    content, buffer = encoded if is_small else None, io.BytesIO()
    if content is None:
        shown, lossy = image.convert("RGB"), {} if is_small else {"quality": 82}
        shown.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
        shown.save(buffer, format="WEBP", lossless=is_small, **lossy)
        content = buffer.getvalue()
    return {"data": f"data:image/webp;base64,{base64.b64encode(content).decode()}", "is_small": is_small}
