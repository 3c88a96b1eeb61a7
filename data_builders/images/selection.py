"""From the scores of a prompt's candidates to ranks, to the selected ones, and to pairs."""

from collections.abc import Iterable, Iterator
from itertools import combinations, pairwise
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import rankdata

from data_builders.engine.reasons import (
    LESS_SURE,
    LOWER,
    NO_MARGIN,
    SAME_IMAGE,
    TOO_FEW,
    UNDETECTED,
)
from data_builders.engine.stages import NOT_SELECTED, Pair, Record, Stage, by_prompt, is_valid
from prefopt.judges.rubric import best

PairRule = Literal["best_worst", "adjacent", "all"]


class PairOptions(NamedTuple):
    """Which of a prompt's ranked candidates become pairs."""

    rule: PairRule = "best_worst"
    min_margin: float = 0.0  # pairs of less are left out
    most: int | None = None  # those with the widest margins are kept


def combine(records: Iterable[Record]) -> Iterator[Record]:
    """Score the candidates of each prompt by judge and discriminator at once.

    Their scores have different units, so ranks are averaged: 1 is the best, equals share the mean of theirs.
    The soft score is minus that average.
    """
    for group in by_prompt(records):
        valid = [record for record in group if is_valid(record)]
        columns = [[-record[name] for record in valid] for name in ("judge_score", "discriminator_score")]
        ranks = iter(np.mean([rankdata(column) for column in columns], axis=0).tolist() if valid else [])
        for record in group:
            if is_valid(record):
                record = record | {"soft_score": -next(ranks)}
            yield record


def rank(records: Iterable[Record]) -> Iterator[Record]:
    """Rank the candidates of each prompt by soft score: 1 is the best, equal scores have equal ranks."""
    for group in by_prompt(records):
        scores = [record["soft_score"] for record in group if is_valid(record)]
        for record in group:
            place = 1 + sum(other > record["soft_score"] for other in scores) if is_valid(record) else None
            yield record | {"rank": place}


def select_optimal(threshold: float | None, *, soft_decides: bool = False) -> Stage:
    """The stage that selects each prompt's optimal image, as arXiv 2405.13473 does.

    Of the best hard scores, all if they tie, the one with the most confident detection of its class; a prompt
    without a detection over `threshold` has none. `None`: no detector; the soft score decides. With
    `soft_decides` it also does so among all that are detected: for rubrics whose hard score tells nothing.
    """
    order = ("soft_score", "confidence") if soft_decides else ("confidence", "soft_score")

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for group in by_prompt(records):
            valid = [record for record in group if is_valid(record)]
            tops = valid
            if valid and not soft_decides:
                tops = [valid[place] for place in best([r["hard_score"] for r in valid])]
            found = [r for r in tops if threshold is None or r["confidence"] >= threshold]
            optimal = max(found, key=itemgetter(*order)) if found else None
            for record in group:
                reason = ""
                if record is not optimal and is_valid(record):
                    if not any(record is top for top in tops):
                        reason = LOWER
                    elif not found or (soft_decides and not any(record is one for one in found)):
                        reason = UNDETECTED
                    else:
                        reason = LOWER if soft_decides or threshold is None else LESS_SURE
                yield _decided(record, record is optimal, reason)

    return stage


def select_pairs(options: PairOptions) -> Stage:
    """The stage that selects each prompt's best candidate, all if they tie, if the prompt has a pair.

    The best is never a pair's rejected one, so `sft` holds images to imitate alone.
    """

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for group in by_prompt(records):
            has_pair = bool(pairs(group, options))
            reason = LOWER if has_pair else _why_none(group, options)
            for record in group:
                selected = has_pair and record["rank"] == 1
                yield _decided(record, selected, "" if selected or not is_valid(record) else reason)

    return stage


def _decided(record: Record, selected: bool, reason: str) -> Record:
    return record | {"selected": selected, NOT_SELECTED: reason}


def ranked(group: list[Record]) -> list[Record]:
    """The candidates that have a rank, the best first; equals in the order they were generated."""
    return sorted((r for r in group if r["rank"] is not None), key=lambda r: (r["rank"], r["candidate"]))


def pairs(group: list[Record], options: PairOptions) -> list[Pair]:
    """Pairs of a prompt's candidates, never of a tie or of one image with itself.

    `best_worst` is one pair; `adjacent` sets each rank's first against the next rank's first; `all` is every
    pair. Guards against AGFSync's pairs of an image with itself.
    """
    found = [
        Pair(better, worse, better["soft_score"] - worse["soft_score"])
        for better, worse in _by_rule(ranked(group), options.rule)
        if better["pixels_sha256"] != worse["pixels_sha256"]
    ]
    wide = [pair for pair in found if pair.margin > 0 and pair.margin >= options.min_margin]
    return sorted(wide, key=lambda pair: -pair.margin)[: options.most]


def _by_rule(ordered: list[Record], rule: PairRule) -> list[tuple[Record, Record]]:
    if rule == "best_worst":
        return [(ordered[0], ordered[-1])] if ordered else []
    if rule == "adjacent":
        firsts = {record["rank"]: record for record in reversed(ordered)}
        return list(pairwise(firsts[place] for place in sorted(firsts)))
    return list(combinations(ordered, 2))


def _why_none(group: list[Record], options: PairOptions) -> str:
    """Why a prompt has no pair."""
    ordered = ranked(group)
    if len(ordered) < 2:
        return TOO_FEW
    margins = [a["soft_score"] - b["soft_score"] for a, b in _by_rule(ordered, options.rule)]
    return SAME_IMAGE if any(m > 0 and m >= options.min_margin for m in margins) else NO_MARGIN
