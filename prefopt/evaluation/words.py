"""summary.json in words: numbers with units, and the sentences that a report begins with."""

from collections.abc import Mapping

MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
PERCENT = "\N{NO-BREAK SPACE}%"
ENOUGH = 20  # prompts, for a bootstrap interval to be as wide as it says
SIGNIFICANT = 0.05  # a p below it, where p is corrected for the number of comparisons
DIGITS = {"score": 2, "loss": 3}


def value(number: float | None, kind: str) -> str:
    """0.41 as a proportion -> 41.0 %; as a score -> 0.41; as a loss -> 0.410; None -> unread."""
    if number is None:
        return "unread"
    return f"{bare(number, kind)}{PERCENT if kind == 'proportion' else ''}"


def bare(number: float, kind: str) -> str:
    """A value without its unit."""
    return signed(f"{100 * number:.1f}" if kind == "proportion" else f"{number:.{DIGITS[kind]}f}")


def change(number: float, kind: str) -> str:
    """0.165 of a proportion -> +16.5 points; of a score -> +0.17."""
    text = f"{100 * number:+.1f} points" if kind == "proportion" else f"{number:+.{DIGITS[kind]}f}"
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


def share(found: Mapping) -> str:
    """`62.5 % (55.0 to 70.0)`: a share with its interval, if there is one."""
    if found["share"] is None:
        return "none decided"
    if found["low"] is None:
        return percent(found["share"])
    return f"{percent(found['share'])} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def votes_sentence(pair: Mapping) -> str:
    """`Of 40 votes dpo against base wins 22, ties 6, loses 12: 62.5 % (50.0 to 74.0) ...`"""
    votes = "1 vote" if pair["votes"] == 1 else f"{pair['votes']} votes"
    sentence = (
        f"Of {votes} {pair['system']} against {pair['against']} wins {pair['wins']}, ties {pair['ties']}, "
        f"loses {pair['losses']}: {share(pair)} with a tie as one half."
    )
    if pair["groups"] < ENOUGH:
        return f"{sentence} Too few to claim: {pair['groups']} prompts."
    if pair["low"] <= 0.5 <= pair["high"]:
        return f"{sentence} No claim: the interval holds 50{PERCENT}."
    return f"{sentence} People prefer {pair['system' if pair['low'] > 0.5 else 'against']}."


def agreement_sentence(title: str, found: Mapping) -> str:
    """`CLIP score agrees with people in 71.0 % (60.0 to 81.0) of 34 votes.`"""
    if not found["votes"]:
        return f"{title} has no preference in any of {found['undecided']} votes."
    return (
        f"{title} agrees with people in {share(found)} of {found['votes']} votes; in {found['undecided']} "
        "more it has no preference."
    )


def at_best(best: Mapping, family: str) -> str:
    """Which variants were the family's best, with the share of the prompts: `dpo, guidance 3 (80 %)`."""
    return ", ".join(
        name if share == 1 else f"{name} ({percent(share)})" for name, share in best["chosen"][family].items()
    )


def at_their_best(best: Mapping, metric: str) -> Mapping[str, Mapping | None]:
    """Of each family its `mean` by a metric, at its best; of all but the first its contrast with that one."""
    first, *others = best["chosen"]
    to_first = {
        contrast["system"]: contrast["metrics"].get(metric)
        for contrast in best["contrasts"]
        if contrast["against"] == first
    }
    base = next((found["mean_against"] for found in to_first.values() if found), None)
    return {first: None if base is None else {"mean": base}} | {name: to_first.get(name) for name in others}


def best_sentence(best: Mapping, titles: Mapping[str, str], told: Mapping[str, Mapping]) -> str:
    """Which system is surely better than the first by what the best was chosen by, and by how much most."""
    metric = best["chosen_by"]
    first, *others = best["chosen"]
    found = {name: entry for name, entry in at_their_best(best, metric).items() if name != first and entry}
    gains = {name: entry for name, entry in found.items() if _direction(entry) > 0}
    if not gains:
        return f"By {titles[metric]}, none of {', '.join(others)} is surely better than {first}."
    most = max(gains, key=lambda name: gains[name]["better"] * gains[name]["difference"]["mean"])
    also = [name for name in gains if name != most]
    sentence = difference_sentence(titles[metric], told[metric]["kind"], gains[most])
    return f"{most} gains most over {first}: {sentence}" + (
        f" So do, by less: {', '.join(also)}." if also else ""
    )


def edge_warning(best: Mapping) -> str | None:
    """A warning when the best guidance of some families is the least or the most that was tried."""
    if not best["at_edge"]:
        return None
    return f"The best guidance of {', '.join(best['at_edge'])} is at the end of the sweep: try a wider one."


def part_sentence(title: str, kind: str, contrast: Mapping) -> str:
    """`place -12.1 points (p 0.003).`: one part of a metric, its p corrected for their number."""
    return f"{title} {change(contrast['difference']['mean'], kind)} ({p_holm(contrast)})"


def p_holm(contrast: Mapping) -> str:
    """The corrected p: `p 0.03`."""
    p = contrast["p_holm"]
    return f"p {p:.2g}" if p >= 0.001 else "p < 0.001"


def too_few(count: int, of: str = "prompts") -> str | None:
    """A caveat if so many prompts are too few to claim anything."""
    if count >= ENOUGH:
        return None
    return f"Too few to claim: {count} {of}, and under {ENOUGH} an interval is narrower than it says."


def verdict(contrast: Mapping, count: int, of: str = "prompts") -> str:
    """What can be claimed of so many prompts, and if nothing can, how many would be needed.

    Where p is corrected for the number of compared systems, it has to be low, too.
    """
    if caveat := too_few(count, of):
        return caveat
    if direction := _direction(contrast):
        side = "above" if contrast["difference"]["low"] > 0 else "below"
        return f"A {'gain' if direction > 0 else 'loss'}: the whole interval is {side} 0."
    needed = contrast["groups_for_power"]
    if needed is None:
        return "No difference."
    if _excludes_zero(contrast):
        return f"No claim: among so many comparisons one like this comes by chance ({p_holm(contrast)})."
    if needed <= count:
        return "No claim: the interval holds 0."
    return f"No claim: the interval holds 0. About {needed:,} {of} would show a difference of this size."


def _excludes_zero(contrast: Mapping) -> bool:
    return contrast["difference"]["low"] > 0 or contrast["difference"]["high"] < 0


def is_sure(contrast: Mapping) -> bool:
    """Whether a difference is one that can be claimed, of enough rows."""
    return _direction(contrast) != 0


def _direction(contrast: Mapping) -> int:
    """1 for a sure gain, -1 for a sure loss, 0 for neither."""
    if not _excludes_zero(contrast) or contrast.get("p_holm", 0.0) >= SIGNIFICANT:
        return 0
    return contrast["better"] if contrast["difference"]["low"] > 0 else -contrast["better"]


def disagreement(contrast: Mapping, titles: Mapping[str, str], look_at: str = "pictures") -> str | None:
    """A warning when one of the metrics with these titles surely gained and another surely lost."""
    directions = {
        title: _direction(contrast["metrics"][metric])
        for metric, title in titles.items()
        if metric in contrast["metrics"]
    }
    up = [title for title, direction in directions.items() if direction > 0]
    down = [title for title, direction in directions.items() if direction < 0]
    if not (up and down):
        return None
    return (
        f"The measures disagree: {', '.join(up)} improved, {', '.join(down)} got worse. Look at the "
        f"{look_at}."
    )


def unread_warning(summary: Mapping) -> str | None:
    """A warning if replies of a judge could not be read: of which scorer, and of which system how many."""
    found = []
    for scorer in dict.fromkeys(told["scorer"] for told in summary["metrics"].values()):
        of_scorer = {metric: told for metric, told in summary["metrics"].items() if told["scorer"] == scorer}
        counts = {
            name: sum(system["unread"].get(metric, 0) for metric in of_scorer)
            for name, system in summary["systems"].items()
        }
        if any(counts.values()):
            title = next((told["title"] for told in of_scorer.values() if told["is_headline"]), scorer)
            found.append(f"{title} ({', '.join(f'{name} {n}' for name, n in counts.items() if n)})")
    if not found:
        return None
    return (
        f"Some of the judge's replies could not be read: {'; '.join(found)}. Where two systems are compared, "
        "rows without a score on a side are left out."
    )
