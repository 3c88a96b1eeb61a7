"""From answers and preferences between them to ranks and pairs, and why an answer is in none."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

from data_builders.engine.stages import (
    INVALID,
    NOT_SELECTED,
    Group,
    Pair,
    Record,
    Stage,
    by_prompt,
    is_valid,
    mark_invalid,
)
from data_builders.images.selection import PairRule
from prefopt.judges.critic_cases import Preference
from prefopt.vlm.generate import Generated
from prefopt.vlm.messages import PLACEHOLDER

UNFINISHED = "unfinished answer"
EMPTY = "empty answer"
SHOWS_IMAGE = "image placeholder in the answer"
UNREADABLE = "critic unreadable"
IDENTICAL = "identical answers"
TOO_FEW = "no second answer"
ABSTAINED = "abstained"
UNPAIRED = "in no pair"
BALANCE = "length balance"
# Of a prompt without a pair, the first of these that one of its answers has.
REASONS = (BALANCE, ABSTAINED, UNREADABLE, IDENTICAL, UNFINISHED, EMPTY, SHOWS_IMAGE, TOO_FEW)
SENTENCES = {
    UNFINISHED: "the answer was cut off at the most tokens allowed",
    EMPTY: "the answer is empty",
    SHOWS_IMAGE: "the answer holds the placeholder of an image",
    UNREADABLE: "the critic's reply could not be read",
    IDENTICAL: "another answer has the same words",
    TOO_FEW: "there is no second valid answer to compare with",
    ABSTAINED: "the critic is not sure enough which answer is better",
    UNPAIRED: "the pairs of this prompt were made of other answers",
    BALANCE: "left out so that chosen answers are longer as often as shorter",
}

Compare = Callable[[Record, str, str], Preference | None]


class PairOptions(NamedTuple):
    """Which of a prompt's ranked answers become pairs."""

    rule: PairRule
    margin: float  # what the better one's probability has to exceed 0.5 by


def flaw(answer: Generated) -> str:
    """Why an answer cannot be used; empty if it can."""
    if not answer.finished:
        return UNFINISHED
    if not answer.text:
        return EMPTY
    # A table of pairs with it could not be read: only a prompt shows images.
    return SHOWS_IMAGE if PLACEHOLDER in answer.text else ""


def contenders(answers: Iterable[Generated]) -> list[str]:
    """The different texts of the answers that can be used, in their order."""
    return list(dict.fromkeys(answer.text for answer in answers if not flaw(answer)))


def drop_identical(records: Iterable[Record]) -> Iterator[Record]:
    """Of valid answers with the same text, the first alone is compared."""
    for group in by_prompt(records):
        texts = set()
        for record in group:
            if is_valid(record) and record["answer"] in texts:
                record = record | {NOT_SELECTED: IDENTICAL}
            elif is_valid(record):
                texts.add(record["answer"])
            yield record


def compare(preference: Compare) -> Stage:
    """The stage that gives each answer its comparisons, and their mean as its `score`.

    Of an answer with a number in `compared_with`, the probability that it is the better one of the two, and
    whether both orders agree. An answer of which no comparison could be read is invalid.
    """

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for group in by_prompt(records):
            rivals = [record for record in group if _competes(record)]
            for record in group:
                others = [other for other in rivals if other is not record] if _competes(record) else []
                found = [(other, preference(record, record["answer"], other["answer"])) for other in others]
                read = [(other["candidate"], each) for other, each in found if each is not None]
                p = [each.p_first for _, each in read]
                record = record | {
                    "compared_with": [number for number, _ in read],
                    "p_better": p,
                    "consistent": [each.consistent for _, each in read],
                    "unreadable": len(found) - len(read),
                    "score": sum(p) / len(p) if p else None,
                }
                yield mark_invalid(record, UNREADABLE) if found and not read else record

    return stage


def rank(records: Iterable[Record]) -> Iterator[Record]:
    """Rank the compared answers of each prompt by score: 1 is the best, equal scores have equal ranks."""
    for group in by_prompt(records):
        scores = [record["score"] for record in group if record["score"] is not None]
        for record in group:
            score = record["score"]
            yield record | {"rank": None if score is None else 1 + sum(other > score for other in scores)}


def decide(
    records: Iterable[Record], options: PairOptions, left_out: frozenset[str] = frozenset()
) -> Iterator[Group]:
    """The answers of each prompt with its pairs, and why an answer is in none.

    `left_out` are the keys of pairs that a balance of lengths leaves out.
    """
    for group in by_prompt(records):
        ranked = sorted(
            (record for record in group if record["rank"] is not None),
            key=lambda record: (record["rank"], record["candidate"]),
        )
        tried = _by_rule(ranked, options.rule)
        wide = [pair for pair in tried if pair.margin > 0 and pair.margin >= options.margin]
        pairs = [pair for pair in wide if pair_key(pair) not in left_out]
        paired = {record["candidate"] for pair in pairs for record in (pair.chosen, pair.rejected)}
        reason = _why_none(ranked, tried, wide, pairs)
        decided = [
            record
            | {
                "selected": record["candidate"] in paired,
                NOT_SELECTED: _reason(record, paired, group, reason),
            }
            for record in group
        ]
        yield Group(decided, ranked, pairs)


def _competes(record: Record) -> bool:
    return is_valid(record) and not record[NOT_SELECTED]


def _by_rule(ranked: list[Record], rule: PairRule) -> list[Pair]:
    """Pairs of a better and a worse answer whose comparison could be read; the margin is p - 0.5."""
    if len(ranked) < 2:
        return []
    if rule == "best_worst":
        chosen = [(ranked[0], ranked[-1])]
    else:
        chosen = list(pairwise(ranked) if rule == "adjacent" else combinations(ranked, 2))
    return [
        Pair(better, worse, p_better(better, worse) - 0.5)
        for better, worse in chosen
        if worse["candidate"] in better["compared_with"]
    ]


def p_better(one: Record, other: Record) -> float:
    """How likely the first of two compared answers is the better one."""
    return one["p_better"][one["compared_with"].index(other["candidate"])]


def is_consistent(pair: Pair) -> bool:
    """Whether the critic preferred the same answer in both orders."""
    return pair.chosen["consistent"][pair.chosen["compared_with"].index(pair.rejected["candidate"])]


def longer(pair: Pair) -> int:
    """By how many tokens the chosen answer is longer than the rejected one."""
    return pair.chosen["tokens"] - pair.rejected["tokens"]


def pair_key(pair: Pair) -> str:
    """What a pair is called among all of a build."""
    return f"{pair.chosen['prompt_id']} {pair.chosen['candidate']} {pair.rejected['candidate']}"


def to_balance(pairs: Iterable[Pair]) -> frozenset[str]:
    """The keys of pairs without which the chosen answer is the longer one as often as the shorter one.

    They are those with the least margins; of equal margins, those whose keys are the smallest.
    """
    sides: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
    for pair in pairs:
        if longer(pair):
            sides[longer(pair) > 0].append((pair.margin, pair_key(pair)))
    fewer, more = sorted(sides.values(), key=len)
    return frozenset(key for _, key in sorted(more)[: len(more) - len(fewer)])


def why_no_pair(group: Group) -> str:
    """Why a prompt has no pair; empty if it has one."""
    if group.pairs:
        return ""
    found = {record[INVALID] or record[NOT_SELECTED] for record in group.candidates}
    return next(reason for reason in REASONS if reason in found)


def _why_none(
    ranked: Sequence[Record], tried: Sequence[Pair], wide: Sequence[Pair], pairs: Sequence[Pair]
) -> str:
    """Why a compared answer is in no pair."""
    if pairs:
        return UNPAIRED
    if wide:
        return BALANCE
    return ABSTAINED if tried else UNREADABLE


def _reason(record: Record, paired: set[int], group: list[Record], of_compared: str) -> str:
    """Why an answer is in no pair; empty if it is in one, or invalid."""
    if not is_valid(record) or record["candidate"] in paired:
        return ""
    if record["rank"] is not None:
        return of_compared
    # It was compared with nothing: it repeats another answer, or there is no other one.
    alike = sum(is_valid(other) for other in group) > 1
    return record[NOT_SELECTED] or (IDENTICAL if alike else TOO_FEW)
