"""Pairs of answers by their comparisons: ranks, reasons, a balance of lengths."""

import pytest

from data_builders.answers.selection import (
    PairOptions,
    compare,
    decide,
    drop_identical,
    flaw,
    rank,
    to_balance,
    why_no_pair,
)
from data_builders.engine.stages import INVALID, NOT_SELECTED, Pair, flow
from prefopt.judges.critic_cases import Preference
from prefopt.vlm.generate import Generated


def record(prompt, candidate, text="", *, tokens=3, finished=True):
    answer = Generated(text or f"answer {candidate}", tokens, finished)
    return {
        "prompt_id": prompt,
        "candidate": candidate,
        "answer": answer.text,
        "tokens": tokens,
        INVALID: flaw(answer),
        NOT_SELECTED: "",
    }


def decided(records, p, *, rule="best_worst", margin=0.1, left_out=frozenset()):
    """Groups of records, by the p of (first, second) candidates; None cannot be read."""

    def preference(record, first, second):
        one, other = (int(text.split()[-1]) for text in (first, second))
        value = p[min(one, other), max(one, other)]
        return value if value is None else Preference(value if one < other else 1 - value, True)

    groups = flow(records, [drop_identical, compare(preference), rank])
    return list(decide(groups, PairOptions(rule, margin), left_out))


def numbers(group):
    return [(pair.chosen["candidate"], pair.rejected["candidate"]) for pair in group.pairs]


def reasons(group):
    return [row[INVALID] or row[NOT_SELECTED] for row in group.candidates]


def test_ranks_are_by_the_mean_probability():
    """Worked by hand: means 0.6, 0.65, 0.25; the second is the best, though it does not beat the first."""
    p = {(0, 1): 0.5, (0, 2): 0.7, (1, 2): 0.8}
    three = [record("a", number) for number in range(3)]
    [group] = decided(three, p)
    assert [row["score"] for row in group.candidates] == pytest.approx([0.6, 0.65, 0.25])
    assert [row["rank"] for row in group.candidates] == [2, 1, 3]
    assert numbers(group) == [(1, 2)] and group.pairs[0].margin == pytest.approx(0.3)
    assert reasons(group) == ["in no pair", "", ""]
    assert numbers(decided(three, p, rule="adjacent")[0]) == [(0, 2)]  # of the first two none is better
    assert numbers(decided(three, p, rule="all")[0]) == [(1, 2), (0, 2)]
    assert numbers(decided(three, p, margin=0.31)[0]) == []


def test_a_best_answer_that_loses_to_the_worst_is_in_no_pair_with_it():
    """Worked by hand: means 0.817, 0.5, 0.5 and 0.183, and yet the fourth is preferred to the first."""
    p = {(0, 1): 1.0, (0, 2): 1.0, (0, 3): 0.45, (1, 2): 0.5, (1, 3): 1.0, (2, 3): 1.0}
    four = [record("a", number) for number in range(4)]
    [group] = decided(four, p, margin=0.0)
    assert [row["score"] for row in group.candidates] == pytest.approx([0.8167, 0.5, 0.5, 0.1833], abs=1e-4)
    assert [row["rank"] for row in group.candidates] == [1, 2, 2, 4]
    assert not group.pairs and reasons(group) == ["abstained"] * 4
    [group] = decided(four, p, rule="all", margin=0.0)
    assert numbers(group) == [(0, 1), (0, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("answers", "p", "expected", "why"),
    [
        ([record("a", 0), record("a", 1)], 0.55, ["abstained"] * 2, "abstained"),
        ([record("a", 0), record("a", 1)], 0.5, ["abstained"] * 2, "abstained"),
        ([record("a", 0), record("a", 1)], None, ["critic unreadable"] * 2, "critic unreadable"),
        ([record("a", 0, "x 0"), record("a", 1, "x 0")], 1, ["identical answers"] * 2, "identical answers"),
        (
            [record("a", 0), record("a", 1, finished=False)],
            1,
            ["no second answer", "unfinished answer"],
            "unfinished answer",
        ),
        (
            [record("a", 0), record("a", 1, "an <image> 1")],
            1,
            ["no second answer", "image placeholder in the answer"],
            "image placeholder in the answer",
        ),
        (
            [record("a", 0), record("a", 1, "answer 0"), record("a", 2, finished=False)],
            1,
            ["identical answers", "identical answers", "unfinished answer"],
            "identical answers",
        ),
    ],
)
def test_why_there_is_no_pair(answers, p, expected, why):
    """Guards: the same answer on both sides (AGFSync), a parse failure as a win, a margin of none."""
    [group] = decided(answers, {(0, 1): p}, margin=0.0 if p == 0.5 else 0.1)
    assert (reasons(group), why_no_pair(group)) == (expected, why)
    assert not group.pairs and not any(row["selected"] for row in group.candidates)
    invalid = [bool(row[INVALID]) for row in group.candidates]
    assert invalid == [why in ("critic unreadable",) or "f" in r[:3] or "image" in r for r in expected]


def test_one_comparison_that_cannot_be_read_leaves_the_others():
    p = {(0, 1): 0.9, (0, 2): None, (1, 2): 0.9}
    [group] = decided([record("a", number) for number in range(3)], p)
    assert reasons(group) == ["critic unreadable"] * 3 and not group.pairs  # 0 and 2 are best and worst
    assert [row["unreadable"] for row in group.candidates] == [1, 0, 1]
    [group] = decided([record("a", number) for number in range(3)], p, rule="all")
    assert numbers(group) == [(0, 1), (1, 2)]


def test_lengths_are_balanced_by_the_least_margins():
    """Guards: the chosen answer is the longer one in 77 % of the pairs of a self-critique."""

    def pair(name, longer, margin):
        rows = [{"prompt_id": name, "candidate": n, "tokens": 5 + longer * (1 - n)} for n in (0, 1)]
        return Pair(*rows, margin)

    pairs = [pair("a", 2, 0.3), pair("b", 1, 0.1), pair("c", 9, 0.2), pair("d", -1, 0.1), pair("e", 0, 0.1)]
    assert to_balance(pairs) == {"b 0 1", "c 0 1"}
    assert to_balance(reversed(pairs)) == to_balance(pairs)
    assert to_balance(pairs[3:]) == {"d 0 1"} and to_balance([]) == frozenset()
