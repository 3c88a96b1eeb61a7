"""summary.json in words: metrics' names, numbers with units, and the sentences a report begins with."""

from __future__ import annotations

from collections.abc import Mapping

MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
PERCENT = "\N{NO-BREAK SPACE}%"

_NAMES = {"clip": "CLIP score"}


def metric_name(metric: str) -> str:
    """`clip` -> CLIP score, `oracle/all` -> oracle accuracy, `oracle/count` -> oracle: count."""
    scorer, _, part = metric.partition("/")
    if not part:
        return _NAMES.get(metric, metric)
    return f"{scorer} accuracy" if part == "all" else f"{scorer}: {part}"


def is_headline(metric: str) -> bool:
    """Whether a metric stands for its scorer; the others are its parts."""
    return metric.partition("/")[2] in ("", "all")


def value(number: float, kind: str) -> str:
    """0.41 as a proportion -> 41.0 %; as a score -> 0.41."""
    return f"{100 * number:.1f}{PERCENT}" if kind == "proportion" else signed(f"{number:.2f}")


def bare(number: float, kind: str) -> str:
    """A value without its unit."""
    return signed(f"{100 * number:.1f}" if kind == "proportion" else f"{number:.2f}")


def change(number: float, kind: str) -> str:
    """0.165 of a proportion -> +16.5 points; of a score -> +0.17."""
    text = f"{100 * number:+.1f} points" if kind == "proportion" else f"{number:+.2f}"
    return signed(text)


def signed(text: str) -> str:
    """The text with a minus sign for a hyphen, and no sign before a zero."""
    if not text.strip("+-0. points"):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def percent(rate: float | None) -> str:
    return "none decided" if rate is None else f"{100 * rate:.1f}{PERCENT}"


def difference_sentence(metric: str, kind: str, contrast: Mapping) -> str:
    """`oracle accuracy 41.0 % -> 57.5 %, +16.5 points, 95 % interval 9.0 to 24.1.`"""
    gap = contrast["difference"]
    return (
        f"{metric_name(metric)} "
        f"{value(contrast['mean_against'], kind)} {ARROW} {value(contrast['mean'], kind)}, "
        f"{change(gap['mean'], kind)}, {100 * gap['level']:.0f}{PERCENT} interval "
        f"{bare(gap['low'], kind)} to {bare(gap['high'], kind)}."
    )


def win_sentence(system: str, contrast: Mapping) -> str:
    """Counts, and the rate among the decided pairs with its interval."""
    wins = contrast["wins"]
    total = wins["wins"] + wins["ties"] + wins["losses"]
    counts = f"Of {total} pairs {system} wins {wins['wins']}, ties {wins['ties']}, loses {wins['losses']}"
    if wins["rate_without_ties"] is None:
        return f"{counts}."
    return (
        f"{counts}: {percent(wins['rate_without_ties'])} of the decided ones "
        f"({100 * wins['low']:.1f} to {100 * wins['high']:.1f}{PERCENT}), "
        f"{percent(wins['rate'])} with a tie as one half."
    )


def verdict(contrast: Mapping, prompts: int) -> str:
    """What may be claimed, and if nothing may, how many prompts would be needed."""
    gap = contrast["difference"]
    if gap["low"] > 0:
        return "A gain: the whole interval is above 0."
    if gap["high"] < 0:
        return "A loss: the whole interval is below 0."
    needed = contrast["prompts_for_power"]
    if needed is None:
        return "No difference."
    if needed <= prompts:
        return "No claim: the interval holds 0."
    return f"No claim: the interval holds 0. About {needed:,} prompts would show a difference of this size."


def disagreement(contrast: Mapping) -> str | None:
    """A warning when one headline metric surely rose and another fell: the mark of a judge being pleased."""
    headline = {metric: c["difference"] for metric, c in contrast["metrics"].items() if is_headline(metric)}
    up = [metric_name(metric) for metric, gap in headline.items() if gap["low"] > 0]
    down = [metric_name(metric) for metric, gap in headline.items() if gap["high"] < 0]
    if not (up and down):
        return None
    return f"The measures disagree: {', '.join(up)} rose while {', '.join(down)} fell. Look at the pictures."
