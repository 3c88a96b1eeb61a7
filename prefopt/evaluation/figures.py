"""Figures as inline SVG, in the colours of the page's CSS: they follow its light, dark and print styles."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# matplotlib knows no CSS: these stand-ins are replaced in the SVG's text.
INK, RULE, WIN, TIE, LOSS, MORE = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_STYLES = {
    INK: "currentColor",
    RULE: "var(--rule)",
    WIN: "var(--win)",
    TIE: "var(--tie)",
    LOSS: "var(--loss)",
    MORE: "var(--more)",
}
_LINES = (WIN, LOSS, TIE, MORE, INK)

_WIDTH = 4.4  # inches; narrow, so that the type stays legible on a phone
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prefopt",
    "text.parse_math": False,  # a system may be named $x$
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
_DASHES = (0, (3, 2))
_PANELS = (  # training curves: title, and the metrics drawn in it, the second one dashed
    ("loss", ("loss", "eval_loss")),
    ("implicit accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("reward margin", ("rewards/margins", "eval_rewards/margins")),
    ("error of winner (line) and loser (dashed)", ("error/chosen", "error/rejected")),
)
_QUARTILES = {  # training curves of the errors: title of a panel, and the metrics drawn in it
    title: (f"error/chosen/q{i}", f"error/rejected/q{i}")
    for i, title in enumerate(("least noise (q1)", "q2", "q3", "most noise (q4)"), start=1)
}


class Curve(NamedTuple):
    """A system's mean at several settings; `is_base` if it is what the others are compared with."""

    system: str
    is_base: bool
    points: Sequence[tuple[float, float, float, float]]  # setting, mean, and the interval's low and high


class Chart(NamedTuple):
    """A figure for a page."""

    title: str  # plain text
    svg: Markup  # an <svg> element, its texts escaped


def win_bars(contrasts: Sequence[Mapping], metric: str, name: str) -> Chart:
    """Wins, ties and losses of every system against the first, as shares of all pairs."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(_WIDTH, 0.65 + 0.42 * len(contrasts)), layout="constrained")
        axes = figure.subplots()
        counts = {
            kind: np.array([contrast["metrics"][metric]["wins"][kind] for contrast in contrasts])
            for kind in ("wins", "ties", "losses")
        }
        left, total = np.zeros(len(contrasts)), np.sum(list(counts.values()), axis=0)
        for (kind, count), colour in zip(counts.items(), (WIN, TIE, LOSS), strict=True):
            bars = axes.barh(
                range(len(contrasts)), count / total, left=left, color=colour, label=kind, height=0.62
            )
            labels = [str(n) if n / t > 0.05 else "" for n, t in zip(count, total, strict=True)]
            axes.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
            left = left + count / total
        axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.set_yticks(range(len(contrasts)), [_short(contrast["system"]) for contrast in contrasts])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.grid(False)
        axes.tick_params(length=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    against = contrasts[0]["against"]
    return _svg(figure, f"wins-{metric}", f"Wins, ties and losses against {against} by {name}")


def mean_bars(
    first: str, mean: float, contrasts: Sequence[Mapping], metric: str, name: str, kind: str
) -> Chart:
    """A bar for each system's mean; whiskers: interval of its difference to the first system (dashed)."""
    factor = 100 if kind == "proportion" else 1
    entries = [contrast["metrics"][metric] for contrast in contrasts]
    means = factor * np.array([mean, *(entry["mean"] for entry in entries)])
    gaps = factor * np.array(
        [[0.0] * 3, *([entry["difference"][end] for end in ("mean", "low", "high")] for entry in entries)]
    )
    whiskers = np.stack([gaps[:, 0] - gaps[:, 1], gaps[:, 2] - gaps[:, 0]])
    labels = [_short(system) for system in (first, *(contrast["system"] for contrast in contrasts))]
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(_WIDTH, 0.75 + 0.36 * len(labels)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(labels)), means, color=[TIE, *[WIN] * len(entries)], height=0.62)
        axes.errorbar(
            means[1:], range(1, len(labels)), xerr=whiskers[:, 1:], fmt="none", ecolor=INK, capsize=3
        )
        axes.axvline(means[0], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(name + (" (%)" if kind == "proportion" else ""))
        axes.grid(False, axis="y")
        axes.tick_params(length=0)
    return _svg(figure, f"means-{metric}", f"{name}, and interval of its difference to {first}")


def sweep_curves(
    panels: Mapping[str, Sequence[Curve]], over: str, metric: str, name: str, kind: str
) -> Chart:
    """Each system's mean over a swept setting such as `LoRA scale`, one panel below the other: the base
    dashed, the others with the interval of their difference to it as a band."""
    factor = 100 if kind == "proportion" else 1
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(_WIDTH, 0.6 + 1.9 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (title, curves) in zip(rows, panels.items(), strict=True):
            colours = cycle(_LINES)
            for curve in curves:
                colour = INK if curve.is_base else next(colours)
                x, mean, low, high = np.array(sorted(curve.points), dtype=float).T
                axes.plot(
                    x,
                    factor * mean,
                    color=colour,
                    linestyle=(0, (4, 3)) if curve.is_base else "-",
                    marker="o",
                    markersize=4,
                    linewidth=1.4,
                    label=_short(curve.system),
                )
                if not curve.is_base:
                    axes.fill_between(x, factor * low, factor * high, color=colour, alpha=0.15, linewidth=0)
            if title:
                axes.set_title(title, loc="left")
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.grid(False, axis="x")
        settings = sorted(
            {point[0] for curves in panels.values() for curve in curves for point in curve.points}
        )
        if len(settings) <= 8:
            rows[-1].set_xticks(settings, [f"{setting:g}" for setting in settings])
        rows[-1].set_xlabel(over)
        figure.supylabel(name + (" (%)" if kind == "proportion" else ""), fontsize=9)
        figure.legend(*rows[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    return _svg(figure, f"{over}-{metric}", f"{name} against {over}")


def training_curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Chart]:
    """Loss, implicit accuracy, margin and errors, a colour for each run; long runs are smoothed.

    What was measured on held-out rows is dashed, and the legend says so.
    """
    logged = {metric for lines in runs.values() for line in lines for metric in line}
    charts = [_panel(title, metrics, runs) for title, metrics in _PANELS if logged & set(metrics)]
    if logged & {metric for metrics in _QUARTILES.values() for metric in metrics}:
        charts.append(_quartiles(runs))
    return charts


def _panel(title: str, metrics: Sequence[str], runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Chart:
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(_WIDTH, 2.0), layout="constrained")
        axes = figure.subplots()
        _run_curves(axes, metrics, runs)
        if "rewards/accuracies" in metrics:
            axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.set_xlabel("step")
        logged = {metric for lines in runs.values() for line in lines for metric in line}
        held_out = any(metric.startswith("eval_") for metric in logged.intersection(metrics))
        _run_legend(figure, axes, runs, held_out=held_out)
    return _svg(figure, f"training-{metrics[0]}", f"Training: {title}")


def _quartiles(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Chart:
    """The errors of winner and loser in a panel for each quarter of the noise schedule, each with its own
    range: under little noise the error is many times that under much noise."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True)
        for axes, (title, metrics) in zip(panels.flat, _QUARTILES.items(), strict=True):
            _run_curves(axes, metrics, runs)
            axes.set_title(title, loc="left", fontsize=8)
        for axes in panels[-1]:
            axes.set_xlabel("step")
        _run_legend(figure, panels[0, 0], runs)
    return _svg(
        figure,
        "training-error-quartiles",
        "Training: error of winner (line) and loser (dashed) by quarter of the noise schedule",
    )


def _run_curves(
    axes: Axes, metrics: Sequence[str], runs: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    """A colour for each run; its first metric as a line, its second one dashed."""
    for i, (name, lines) in enumerate(runs.items()):
        for style, metric in zip(("-", _DASHES), metrics, strict=False):
            label = name if style == "-" else None
            _curve(axes, lines, metric, color=_LINES[i % len(_LINES)], linestyle=style, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _run_legend(figure: Figure, axes: Axes, runs: Mapping, held_out: bool = False) -> None:
    """The runs by colour, if there are several, and that dashed curves are `held_out`, if they are."""
    handles, labels = axes.get_legend_handles_labels() if len(runs) > 1 else ([], [])
    if held_out:
        handles, labels = [*handles, Line2D([], [], color=INK, linestyle=_DASHES)], [*labels, "held out"]
    if handles:
        figure.legend(handles, [_short(label) for label in labels], loc="outside upper right", ncols=3)


def _curve(axes: Axes, lines: Sequence[Mapping[str, float]], metric: str, **style) -> None:
    points = np.array([(line["step"], line[metric]) for line in lines if metric in line], dtype=float)
    if len(points) == 0:
        return
    if len(points) == 1:
        style["marker"] = "."  # a line needs two points
    window = max(1, len(points) // 40)
    if window > 1:
        axes.plot(*points.T, **{**style, "label": None}, linewidth=0.5, alpha=0.35)
        points = np.stack(
            [np.convolve(column, np.ones(window) / window, mode="valid") for column in points.T], axis=1
        )
    axes.plot(*points.T, **style, linewidth=1.4)


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _svg(figure: Figure, name: str, title: str) -> Chart:
    """The figure's <svg> element: sized by the page, named for screen readers, its ids its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for stand_in, style in _STYLES.items():
        text = text.replace(stand_in, style)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    label = html.escape(title, quote=True)
    return Chart(title, Markup(f'{head} role="img" aria-label="{label}">{rest}'))
