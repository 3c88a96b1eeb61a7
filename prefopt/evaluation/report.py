"""One self-contained report.html from a comparison's summary.json and results.jsonl."""

import base64
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from rich.table import Table

from prefopt.errors import InputError
from prefopt.evaluation import figures, words
from prefopt.files import reporting_write_errors, write_atomically
from prefopt.runs import METRICS_FILE, VALIDATION_STRIPS, read_metrics

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
    headline = headlines(summary)
    families = list(dict.fromkeys(system["family"] for system in summary["systems"].values()))
    page = (
        page_templates(Path(__file__).parent)
        .get_template("report.html.jinja")
        .render(
            title=title or f"{' and '.join(families[1:])} against {families[0]}",
            summary=summary,
            headline=headline,
            titles={metric: told["title"] for metric, told in headline.items()},
            shown_metrics=headline | summary["metrics"],
            gaps=gaps_to_first(summary),
            of="prompts",
            look_at="pictures",
            figures=_figures(summary, [Path(run) for run in runs]),
            strips=_strips([Path(run) for run in runs]),
            shown=_shown(summary),
            galleries=_galleries(summary, rows, shown),
            embedded=lambda image: _embedded_file(folder / image),
            words=words,
        )
    )
    path = folder / "report.html"
    with reporting_write_errors(path):
        write_atomically(path, page)
    return path


def terminal_table(summary: dict) -> Table:
    """Each system's means, its change to the first, and how often it wins by each score."""
    headline = headlines(summary)
    won = {metric: told["title"] for metric, told in headline.items() if told["kind"] == "score"}
    gaps = gaps_to_first(summary)
    titles = [told["title"] for told in headline.values()]
    shown = Table("system", *titles, *(f"wins without ties ({title})" for title in won.values()))
    for name, system in summary["systems"].items():
        cells = []
        for metric, told in headline.items():
            kind = told["kind"]
            cells.append(words.value(system["means"][metric], kind))
            if name in gaps and metric in gaps[name]:
                gap = gaps[name][metric]["difference"]
                cells[-1] += f"  {words.change(gap['mean'], kind)}"
                cells[-1] += f" ({words.bare(gap['low'], kind)} to {words.bare(gap['high'], kind)})"
        wins = [gaps.get(name, {}).get(metric) for metric in won]
        rates = [words.percent(gap["wins"]["rate_without_ties"]) if gap else "" for gap in wins]
        shown.add_row(name, *cells, *rates)
    return shown


def notes(summary: dict) -> list[str]:
    """Every two systems, each at its best, a line per metric; and what there is to warn of."""
    warning = words.unread_warning(summary)
    if not summary["best"]:
        return [warning] if warning else []
    lines = [
        f"{contrast['system']} against {contrast['against']}, each at its best: "
        + words.difference_sentence(told["title"], told["kind"], contrast["metrics"][metric])
        for contrast in summary["best"]["contrasts"]
        for metric, told in headlines(summary).items()
        if metric in contrast["metrics"]
    ]
    return [*lines, *filter(None, [words.edge_warning(summary["best"]), warning])]


def headlines(summary: Mapping) -> dict[str, dict]:
    """What the summary says of the metrics that stand for their scorers."""
    return {metric: told for metric, told in summary["metrics"].items() if told["is_headline"]}


def gaps_to_first(summary: Mapping) -> dict[str, Mapping]:
    """Each further system compared with the first, by metric."""
    return {contrast["system"]: contrast["metrics"] for contrast in summary["contrasts"]}


def _shown(summary: Mapping) -> list[str]:
    """The systems whose images are shown: of each family the variant that was its best most often."""
    if summary["best"]:
        return [max(shares, key=shares.get) for shares in summary["best"]["chosen"].values()]
    return list(summary["systems"])


def _figures(summary: Mapping, runs: Sequence[Path]) -> list[figures.Chart]:
    headline = headlines(summary)
    contrasts = summary["contrasts"]
    if summary["best"]:
        first = next(iter(summary["best"]["chosen"]))
        contrasts = [each for each in summary["best"]["contrasts"] if each["against"] == first]
    charts = win_charts(contrasts, headline)
    for contrasts in _scale_sweeps(summary):
        scales = [summary["systems"][contrast["system"]]["scale"] for contrast in contrasts]
        charts += [
            figures.scale_curve(contrasts, scales, metric, told["title"], told["kind"])
            for metric, told in headline.items()
            if all(metric in contrast["metrics"] for contrast in contrasts)
        ]
    if sweeps := _guidance_sweeps(summary):
        charts += [
            figures.guidance_curves(sweeps, metric, told["title"], told["kind"])
            for metric, told in headline.items()
            if all(v["means"][metric] is not None for variants in sweeps.values() for v in variants)
        ]
    if runs:
        names = [run.name for run in runs]
        names = names if len(set(names)) == len(names) else [str(run) for run in runs]
        charts += figures.training_curves(dict(zip(names, map(_losses, runs), strict=True)))
    return charts


def win_charts(contrasts: Sequence[Mapping], metrics: Mapping[str, Mapping]) -> list[figures.Chart]:
    """Wins, ties and losses by each metric, of the contrasts that have it."""
    return [
        figures.win_bars(having, metric, told["title"])
        for metric, told in metrics.items()
        if (having := [contrast for contrast in contrasts if metric in contrast["metrics"]])
    ]


def _scale_sweeps(summary: Mapping) -> list[list[Mapping]]:
    """The contrasts of each adapter that was compared at several scales, at one guidance each."""
    sweeps: dict[tuple, list[Mapping]] = {}
    for contrast in summary["contrasts"]:
        system = summary["systems"][contrast["system"]]
        if system["adapter"] is not None:
            guidance = system["settings"].get("guidance_scale")
            sweeps.setdefault((system["model"], system["adapter"], guidance), []).append(contrast)
    return [contrasts for contrasts in sweeps.values() if len(contrasts) > 1]


def _guidance_sweeps(summary: Mapping) -> dict[str, list[Mapping]]:
    """The systems that differ in their guidance alone, by what else they are called."""
    sweeps: dict[tuple, list[Mapping]] = {}
    for system in summary["systems"].values():
        others = {name: value for name, value in system["settings"].items() if name != "guidance_scale"}
        key = (system["family"], system["scale"], json.dumps(others))
        sweeps.setdefault(key, []).append(system)
    return {
        systems[0]["name"].partition(", guidance ")[0]: systems
        for systems in sweeps.values()
        if len(systems) > 1
    }


def _losses(run: Path) -> list[dict]:
    if not (run / METRICS_FILE).is_file():
        raise InputError(f"{run} is no training run: it holds no {METRICS_FILE}")
    lines = read_metrics(run)
    if not any("loss" in line for line in lines):
        raise InputError(f"{run / METRICS_FILE} holds no losses")
    return lines


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


def _strips(runs: Sequence[Path]) -> dict[str, str]:
    """The images that runs generated while they trained, as data URIs, by the run's name."""
    strips = {}
    for run in runs:
        if (path := run / VALIDATION_STRIPS).is_file():
            strips[run.name] = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return strips


def _embedded_file(path: Path) -> dict:
    with Image.open(path) as image:
        return embedded(image, path.read_bytes())


def embedded(image: Image.Image, encoded: bytes | None = None) -> dict:
    """A data URI: a small image as it is (`encoded`, if it is WebP), else of at most 320 pixels a side."""
    is_small = max(image.size) <= _LONGEST_SIDE // 2
    content, buffer = encoded if is_small else None, io.BytesIO()
    if content is None:
        shown, lossy = image.convert("RGB"), {} if is_small else {"quality": 82}
        shown.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
        shown.save(buffer, format="WEBP", lossless=is_small, **lossy)
        content = buffer.getvalue()
    return {"data": f"data:image/webp;base64,{base64.b64encode(content).decode()}", "is_small": is_small}
