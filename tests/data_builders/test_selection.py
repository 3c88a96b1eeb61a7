"""Ranks, the optimal image, pairs and lists; and what a detector answers of a rubric."""

import numpy as np
import pytest
from PIL import Image

from data_builders.engine.reasons import LESS_SURE, LOWER, UNDETECTED
from data_builders.engine.stages import Group, Pair, flow
from data_builders.export.tables import EXPORTS
from data_builders.images.detector_checks import UNCLEAR, check, expected_colour, expected_count
from data_builders.images.selection import (
    PairOptions,
    combine,
    pairs,
    rank,
    ranked,
    select_optimal,
)
from prefopt.detectors import Box
from prefopt.judges.questions import NO, YES
from prefopt.pocket.world import Scene, caption, render, silhouette


def candidates(rows):
    """Records of one prompt from (hard, soft, confidence); None: invalid before."""
    records = []
    for i, row in enumerate(rows):
        record = {"prompt_id": "p", "prompt": "p", "candidate": i, "seed": i, "pixels_sha256": f"{i:x}" * 8}
        record |= {"image": {"bytes": bytes([i]), "path": None}}
        if row is None:
            record |= {"invalid_reason": "black"}
        else:
            record |= dict(zip(("hard_score", "soft_score", "confidence"), row, strict=True))
        records.append(record)
    return records


def decided(rows, threshold=0.6, **options):
    return list(flow(candidates(rows), [rank, select_optimal(threshold, **options)]))


def test_the_best_score_and_then_the_surest_detection():
    """The paper's path: images 5, 7, 8, 10 tie at 8; of them the surest detection is the optimal one."""
    hard = [7, 5, 7, 5, 8, 7, 8, 8, 5, 8]
    confidence = [0.99, 0.9, 0.9, 0.9, 0.7, 0.9, 0.95, 0.61, 0.9, 0.2]
    group = decided([(h, h, c) for h, c in zip(hard, confidence, strict=True)])
    assert [row["candidate"] + 1 for row in group if row["selected"]] == [7]
    reasons = [row["not_selected_reason"] for row in group]
    assert [i + 1 for i, reason in enumerate(reasons) if reason == LESS_SURE] == [5, 8, 10]
    assert reasons.count(LOWER) == 6


def test_a_prompt_without_a_detection_yields_nothing_and_says_so():
    group = decided([(8, 8, 0.59), (8, 7, 0.0), (3, 3, 0.99)])
    assert [row["selected"] for row in group] == [False] * 3
    assert [row["not_selected_reason"] for row in group] == [UNDETECTED, UNDETECTED, LOWER]


def test_without_a_detector_the_soft_score_decides():
    group = decided([(8, 7.0, 0.0), (8, 7.5, 0.0), (7, 9.0, 0.0)], threshold=None)
    assert [row["selected"] for row in group] == [False, True, False]
    assert [row["not_selected_reason"] for row in group] == [LOWER, "", LOWER]


def test_of_one_question_the_soft_score_decides_among_all_that_are_detected():
    """A reward model's yes is everybody's: the surest detection would have chosen, whatever the reward."""
    rows = [(1, 7.0, 0.9), (1, 9.0, 0.5), (1, 8.0, 0.7), (-1, -2.0, 0.99)]
    group = decided(rows, soft_decides=True)
    assert [row["selected"] for row in group] == [False, False, True, False]
    assert [row["not_selected_reason"] for row in group] == [LOWER, UNDETECTED, "", LOWER]
    assert [row["selected"] for row in decided(rows)] == [True, False, False, False]
    unseen = decided(rows, threshold=0.995, soft_decides=True)
    assert [row["not_selected_reason"] for row in unseen] == [UNDETECTED] * 4
    alone = decided([None, *rows], threshold=None, soft_decides=True)
    assert [row["candidate"] for row in alone if row["selected"]] == [2]


def test_invalid_candidates_keep_their_reason_and_have_no_rank():
    group = decided([None, (8, 2.0, 0.9), (7, 2.0, 0.9), None])
    assert [row["rank"] for row in group] == [None, 1, 1, None]
    assert group[0]["invalid_reason"] == "black" and not group[0]["selected"]
    assert decided([None, None])[0]["selected"] is False


def made(rows, rule="best_worst", min_margin=0.0, cap=None):
    found = pairs(decided(rows), PairOptions(rule, min_margin, cap))
    return [(pair.chosen["candidate"], pair.rejected["candidate"]) for pair in found]


SCORES = [(5, 3.0, 0.9), (5, 5.0, 0.9), (5, 3.0, 0.9), (5, 1.0, 0.9)]


def test_pairs_by_each_rule():
    assert made(SCORES) == [(1, 3)]
    assert made(SCORES, "adjacent") == [(1, 0), (0, 3)]
    assert made(SCORES, "all") == [(1, 3), (1, 0), (1, 2), (0, 3), (2, 3)]
    assert made(SCORES, "all", cap=2) == [(1, 3), (1, 0)]
    assert made(SCORES, "all", min_margin=3.0) == [(1, 3)]


@pytest.mark.parametrize("rule", ["best_worst", "adjacent", "all"])
def test_when_all_tie_there_is_no_pair(rule):
    """Guards against AGFSync's pairs of one image with itself, and against ties written as wins."""
    assert made([(5, 3.0, 0.9)] * 4, rule) == []
    assert made([(5, 3.0, 0.9)], rule) == []
    assert made([None], rule) == []


def test_equal_pixels_are_no_pair():
    group = decided(SCORES[:2])
    group[1]["pixels_sha256"] = group[0]["pixels_sha256"]
    assert pairs(group, PairOptions()) == []


def exported(name, group, made=()):
    return list(EXPORTS[name].rows(Group(group, ranked(group), list(made))))


def test_a_ranked_row_keeps_ties():
    (row,) = exported("ranked", decided([*SCORES, None]))
    assert row["ranks"] == [1, 2, 2, 4]
    assert row["scores"] == [5.0, 3.0, 3.0, 1.0]
    assert [image["bytes"] for image in row["images"]] == [b"\1", b"\0", b"\2", b"\3"]
    assert exported("ranked", decided([(1, 1.0, 1.0), None])) == []


def test_pickapic_rows_have_one_winner_on_either_side():
    """Guards against 'jpg_0 always wins'."""
    firsts = []
    for i in range(40):
        chosen, rejected = candidates([(1, 2.0, 1.0), (1, 1.0, 1.0)])
        chosen["pixels_sha256"] = f"{i:064x}"
        (row,) = exported("pickapic", decided([]), [Pair(chosen, rejected, 1.0)])
        assert {row["label_0"], row["label_1"]} == {0.0, 1.0}
        assert row["jpg_0" if row["label_0"] else "jpg_1"] == chosen["image"]["bytes"]
        firsts.append(row["label_0"])
    assert 8 < sum(firsts) < 32


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("two red elephants in the snow", 2),
        ("in the snow, three elephants", 3),
        ("an elephant", 1),
        ("A herd: 12 grey elephants", 12),
        ("elephants at night, 50mm", None),
        ("two lions and elephants", 2),
        ("one lion, far away from all the elephants", None),
        ("no elephant", 0),
    ],
)
def test_the_count_that_a_prompt_asks_for(prompt, count):
    assert expected_count(prompt, "Elephant") == count


def test_the_colour_that_a_prompt_asks_for():
    assert expected_colour("two Red elephants, blue sky") == "red"
    assert expected_colour("two coloured elephants, shared") is None


def test_checks_answer_yes_no_or_unclear():
    image = Image.new("RGB", (20, 20), (220, 30, 30))
    boxes = [Box("lion", 0.9, 2, 2, 10, 10), Box("lion", 0.3, 0, 0, 5, 5)]

    def ask(kind, prompt, found=boxes):
        return check(kind, image, prompt, "lion", found, 0.6)

    assert ask("presence", "a lion").verdict == YES
    assert ask("presence", "a lion", boxes[1:]).verdict == NO
    assert ask("count", "one lion").verdict == YES
    assert ask("count", "two lions").verdict == NO
    assert ask("count", "lions") is UNCLEAR
    assert ask("colour", "a red lion").verdict == YES
    assert ask("colour", "a green lion").verdict == NO
    assert ask("colour", "a lion") is UNCLEAR and ask("colour", "a red lion", []) is UNCLEAR


def test_colours_are_seen_on_crops_of_the_world():
    """Of renders with one animal in its tight box: the colour asked for is found, another one seldom."""
    right, wrong = [], []
    for animal in ("elephant", "zebra", "lion"):
        for colour, other in zip(COLOURS, (*COLOURS[1:], COLOURS[0]), strict=True):
            for place in ("savanna", "snow", "night"):
                scene = Scene(animal, colour, 1, place)
                ys, xs = np.nonzero(np.asarray(silhouette(scene, 3)) > 127)
                box = Box(animal, 1.0, xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
                image = render(scene, 3)
                right.append(check("colour", image, caption(scene, 0), animal, [box], 0.6).verdict == YES)
                asked = caption(Scene(animal, other, 1, place), 0)
                wrong.append(check("colour", image, asked, animal, [box], 0.6).verdict == YES)
    assert np.mean(right) > 0.9
    assert np.mean(wrong) < 0.1


COLOURS = ("red", "yellow", "green", "blue", "purple", "pink")


# Judge and discriminator


def test_two_rankings_are_averaged_rank_by_rank_whatever_their_units():
    records = candidates([(0, 0, 0), None, (0, 0, 0), (0, 0, 0), (0, 0, 0)])
    judge, discriminator = [40.0, None, 30.0, 30.0, -5.0], [-1.0, None, 2.0, 2.0, 9.0]
    for record, *scores in zip(records, judge, discriminator, strict=True):
        record["judge_score"], record["discriminator_score"] = scores
    group = list(flow(records, [combine, rank]))
    # Ranks by the judge 1, 2.5, 2.5, 4; by the discriminator 4, 2.5, 2.5, 1.
    assert [row.get("soft_score") for row in group] == [-2.5, None, -2.5, -2.5, -2.5]
    assert [row["rank"] for row in group] == [1, None, 1, 1, 1]
    assert pairs(group, PairOptions("all")) == [], "they contradict each other: nothing is preferred"
    group[4]["discriminator_score"] = -20.0
    again = list(flow(group, [combine, rank]))
    assert [row["rank"] for row in again] == [1, None, 1, 1, 4], "now both find it the worst"
    assert [pair.margin for pair in pairs(again, PairOptions("all"))] == [2.0, 2.0, 2.0]
