"""summary.json in words: numbers with units, and the sentences that a report begins with."""

from collections.abc import Mapping

MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
PERCENT = "\N{NO-BREAK SPACE}%"
ENOUGH = 20  # prompts, for a bootstrap interval to be as wide as it says


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


def difference_sentence(title: str, kind: str, contrast: Mapping) -> str:
    """`oracle accuracy 41.0 % -> 57.5 %, +16.5 points, 95 % interval 9.0 to 24.1.`"""
    gap = contrast["difference"]
    return (
        f"{title} "
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


def at_best(best: Mapping, family: str) -> str:
    """Which variants were the family's best, with the share of the prompts: `dpo, guidance 3 (80 %)`."""
    return ", ".join(
        name if share == 1 else f"{name} ({percent(share)})" for name, share in best["chosen"][family].items()
    )


def edge_warning(best: Mapping) -> str | None:
    """A warning when the best guidance of some families is the least or the most that was tried."""
    if not best["at_edge"]:
        return None
    return f"The best guidance of {', '.join(best['at_edge'])} is at the end of the sweep: try a wider one."


def part_sentence(title: str, kind: str, contrast: Mapping) -> str:
    """`place -12.1 points (p 0.003).`: one part of a metric, its p corrected for their number."""
    p = contrast["p_holm"]
    shown = f"p {p:.2g}" if p >= 0.001 else "p < 0.001"
    return f"{title} {change(contrast['difference']['mean'], kind)} ({shown})"


def verdict(contrast: Mapping, prompts: int) -> str:
    """What can be claimed, and if nothing can, how many prompts would be needed."""
    if prompts < ENOUGH:
        return (
            f"Too few to claim: {prompts} prompts, and under {ENOUGH} an interval is narrower than it says."
        )
    if direction := _direction(contrast):
        side = "above" if contrast["difference"]["low"] > 0 else "below"
        return f"A {'gain' if direction > 0 else 'loss'}: the whole interval is {side} 0."
    needed = contrast["prompts_for_power"]
    if needed is None:
        return "No difference."
    if needed <= prompts:
        return "No claim: the interval holds 0."
    return f"No claim: the interval holds 0. About {needed:,} prompts would show a difference of this size."


def _direction(contrast: Mapping) -> int:
    """1 for a sure gain, -1 for a sure loss, 0 for neither."""
    gap, better = contrast["difference"], contrast["better"]
    return better if gap["low"] > 0 else -better if gap["high"] < 0 else 0


def disagreement(contrast: Mapping, titles: Mapping[str, str]) -> str | None:
    """A warning when one of the metrics with these titles surely gained and another surely lost."""
    directions = {title: _direction(contrast["metrics"][metric]) for metric, title in titles.items()}
    up = [title for title, direction in directions.items() if direction > 0]
    down = [title for title, direction in directions.items() if direction < 0]
    if not (up and down):
        return None
    return (
        f"The measures disagree: {', '.join(up)} improved, {', '.join(down)} got worse. Look at the pictures."
    )
