"""Figures as inline SVG, in the colours of the page's CSS: they follow its light, dark and print styles."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
_PANELS = (  # training curves: title, and the metrics drawn in it
    ("loss", ("loss",)),
    ("implicit accuracy", ("rewards/accuracies",)),
    ("reward margin", ("rewards/margins",)),
    ("error of winner (line) and loser (dashed)", ("error/chosen", "error/rejected")),
)


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


def scale_curve(
    contrasts: Sequence[Mapping], scales: Sequence[float], metric: str, name: str, kind: str
) -> Chart:
    """An adapter's mean at several scales; bars: interval of its difference to the first system (dashed)."""
    factor = 100 if kind == "proportion" else 1
    order = np.argsort(scales)
    entries = [contrasts[i]["metrics"][metric] for i in order]
    mean = factor * np.array([entry["mean"] for entry in entries])
    gap = factor * np.array(
        [[entry["difference"][end] for end in ("mean", "low", "high")] for entry in entries]
    )
    spread = np.stack([gap[:, 0] - gap[:, 1], gap[:, 2] - gap[:, 0]])
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(_WIDTH, 2.5), layout="constrained")
        axes = figure.subplots()
        axes.axhline(factor * entries[0]["mean_against"], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.errorbar(
            np.array(scales)[order],
            mean,
            spread,
            color=WIN,
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.4,
        )
        axes.set_xlabel("LoRA scale")
        axes.set_ylabel(name + (" (%)" if kind == "proportion" else ""))
        axes.grid(False, axis="x")
    system = contrasts[0]["system"].rpartition(" at ")[0]
    return _svg(figure, f"scale-{metric}", f"{system}: {name} against LoRA scale")


def guidance_curves(sweeps: Mapping[str, Sequence[Mapping]], metric: str, name: str, kind: str) -> Chart:
    """Each system's mean over its guidance, a line per system; the first one dashed."""
    factor = 100 if kind == "proportion" else 1
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(_WIDTH, 2.5), layout="constrained")
        axes = figure.subplots()
        for i, (system, variants) in enumerate(sweeps.items()):
            points = sorted((v["settings"]["guidance_scale"], factor * v["means"][metric]) for v in variants)
            style: dict[str, Any] = {"linestyle": (0, (4, 3)), "color": INK}
            if i:
                style = {"linestyle": "-", "color": _LINES[(i - 1) % len(_LINES)]}
            axes.plot(
                *zip(*points, strict=True),
                **style,
                marker="o",
                markersize=4,
                linewidth=1.4,
                label=_short(system),
            )
        axes.set_xlabel("guidance scale")
        axes.set_ylabel(name + (" (%)" if kind == "proportion" else ""))
        axes.grid(False, axis="x")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    return _svg(figure, f"guidance-{metric}", f"{name} against guidance")


def training_curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Chart]:
    """Loss, implicit accuracy, margin and errors, a colour for each run; long runs are smoothed."""
    logged = {metric for lines in runs.values() for line in lines for metric in line}
    return [_panel(title, metrics, runs) for title, metrics in _PANELS if logged & set(metrics)]


def _panel(title: str, metrics: Sequence[str], runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Chart:
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(_WIDTH, 2.0), layout="constrained")
        axes = figure.subplots()
        for i, (name, lines) in enumerate(runs.items()):
            for style, metric in zip(("-", (0, (3, 2))), metrics, strict=False):
                colour = _LINES[i % len(_LINES)]
                _curve(
                    axes, lines, metric, color=colour, linestyle=style, label=name if style == "-" else None
                )
        if "rewards/accuracies" in metrics:
            axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("step")
        if len(runs) > 1:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(
                handles, [_short(label) for label in labels], loc="outside upper right", ncols=len(runs)
            )
    return _svg(figure, f"training-{metrics[0]}", f"Training: {title}")


def _curve(axes: Axes, lines: Sequence[Mapping[str, float]], metric: str, **style) -> None:
    points = np.array([(line["step"], line[metric]) for line in lines if metric in line], dtype=float)
    if len(points) == 0:
        return
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
