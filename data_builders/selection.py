"""From the scores of a prompt's candidates to ranks, to the one optimal image, and to pairs and lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, pairwise
from operator import itemgetter
from typing import Literal

from data_builders.stages import Record, Stage, by_prompt, drop, kept
from prefopt.judges.rubric import best
from prefopt.store import content_key

LOWER = "a lower score"
UNDETECTED = "no detection"
LESS_SURE = "detected less surely"

PairRule = Literal["best_worst", "adjacent", "all"]


def rank_by_score(records: Iterable[Record]) -> Iterator[Record]:
    """Rank the candidates of each prompt by soft score: 1 is the best, equal scores have equal ranks."""
    for group in by_prompt(records):
        scores = [record["soft_score"] for record in group if kept(record)]
        for record in group:
            place = 1 + sum(other > record["soft_score"] for other in scores) if kept(record) else None
            yield record | {"rank": place}


def select_optimal(threshold: float | None, *, soft_decides: bool = False) -> Stage:
    """The stage that selects each prompt's optimal image, as arXiv 2405.13473 does.

    Of the best hard scores, all if they tie, the one with the most confident detection of its class; a prompt
    without a detection over `threshold` yields none. `None`: no detector; the soft score decides. With
    `soft_decides` it also does so among all that are detected: for rubrics whose hard score tells nothing.
    """
    order = ("soft_score", "confidence") if soft_decides else ("confidence", "soft_score")

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for group in by_prompt(records):
            judged = [record for record in group if kept(record)]
            tops = judged
            if judged and not soft_decides:
                tops = [judged[place] for place in best([r["hard_score"] for r in judged])]
            found = [r for r in tops if threshold is None or r["confidence"] >= threshold]
            optimal = max(found, key=itemgetter(*order)) if found else None
            for record in group:
                if record is optimal or not kept(record):
                    yield record | {"selected": record is optimal}
                    continue
                if not any(record is top for top in tops):
                    reason = LOWER
                elif not found or (soft_decides and not any(record is one for one in found)):
                    reason = UNDETECTED
                else:
                    reason = LOWER if soft_decides else LESS_SURE
                yield drop(record | {"selected": False}, reason)

    return stage


def ranked(group: list[Record]) -> list[Record]:
    """The candidates that have a rank, the best first; equals in the order they were drawn."""
    return sorted((r for r in group if r["rank"] is not None), key=lambda r: (r["rank"], r["candidate"]))


def pairs(
    group: list[Record], *, rule: PairRule, min_margin: float, cap: int | None
) -> list[tuple[Record, Record]]:
    """Pairs (better, worse) of a prompt's candidates, never of a tie or of one image with itself.

    `best_worst` is one pair; `adjacent` sets each rank's first against the next rank's first; `all` is every
    pair. Those under `min_margin` go; of more than `cap`, those with the widest margins stay.
    """
    ordered = ranked(group)
    if rule == "best_worst":
        chances = [(ordered[0], ordered[-1])] if ordered else []
    elif rule == "adjacent":
        firsts = {record["rank"]: record for record in reversed(ordered)}
        chances = list(pairwise(firsts[place] for place in sorted(firsts)))
    else:
        chances = list(combinations(ordered, 2))
    found = [
        (better, worse)
        for better, worse in chances
        if margin(better, worse) > 0
        and margin(better, worse) >= min_margin
        and better["pixels_sha256"] != worse["pixels_sha256"]
    ]
    return sorted(found, key=lambda pair: -margin(*pair))[:cap]


def margin(better: Record, worse: Record) -> float:
    """By how much the soft scores differ."""
    return better["soft_score"] - worse["soft_score"]


def pair_row(chosen: Record, rejected: Record) -> Record:
    """One row of the pairs table."""
    return {
        "prompt": chosen["prompt"],
        "chosen": chosen["image"],
        "rejected": rejected["image"],
        "margin": margin(chosen, rejected),
        "chosen_score": chosen["soft_score"],
        "rejected_score": rejected["soft_score"],
        "prompt_id": chosen["prompt_id"],
        "chosen_seed": chosen["seed"],
        "rejected_seed": rejected["seed"],
    }


def pickapic_row(chosen: Record, rejected: Record) -> Record:
    """One row in Pick-a-Pic's columns; which side the winner stands on is drawn from the images' hashes."""
    order = content_key(chosen["pixels_sha256"] + rejected["pixels_sha256"])
    first = int(order[0], 16) < 8
    left, right = (chosen, rejected) if first else (rejected, chosen)
    return {
        "jpg_0": left["image"]["bytes"],
        "jpg_1": right["image"]["bytes"],
        "label_0": float(first),
        "label_1": float(not first),
        "caption": chosen["prompt"],
    }


def ranked_row(group: list[Record]) -> Iterator[Record]:
    """The row of the ranked table, if two or more candidates have a rank."""
    ordered = ranked(group)
    if len(ordered) > 1:
        yield {
            "prompt": ordered[0]["prompt"],
            "images": [record["image"] for record in ordered],
            "ranks": [record["rank"] for record in ordered],
            "scores": [record["soft_score"] for record in ordered],
            "prompt_id": ordered[0]["prompt_id"],
        }
