"""The consensus filter: which pairs judges keep, their soft labels, and what a second run does not repeat."""

import io
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny
from builds import build_of, calls, check_is_a_dataset, kept, kill_at, table
from datasets import load_dataset
from launching import launch, torchrun
from pictures import cell, encoded, picture, png, write_pairs, write_ranked, write_table
from PIL import Image
from scipy.stats import binomtest

from data_builders.consensus_pairs import ConsensusConfig, main
from data_builders.images.agreement import Rule, decide
from prefopt import pocket
from prefopt.diffusion.tables import read_preferences
from prefopt.errors import InputError
from prefopt.judges.questions import NO, YES, Answer
from prefopt.loading import Lazy

PAIRS = pocket.folder("pairs")
COUNT = 192
NAMES = ("red", "green", "blue")


def logistic(reward: float) -> Answer:
    yes = 1 / (1 + math.exp(-reward))
    return Answer({YES: yes, NO: 1 - yes})


class Colour:
    """In place of a reward model: how much of a colour a picture has, less a half, in logits."""

    def __init__(self, channel: int):
        self.channel, self.identity, self.seen = channel, f"colour {channel}", []

    def reward(self, image: Image.Image) -> float:
        return float(np.asarray(image)[..., self.channel].mean()) / 255 - 0.5

    def answer(self, cases):
        self.seen += [(case.prompt, case.image.tobytes()) for case in cases]
        return [[logistic(self.reward(case.image)) for _ in case.questions] for case in cases]


class Told(Colour):
    """Gives each picture of `png` the reward that it is told, by the picture's seed."""

    def __init__(self, identity: str, rewards: list[float]):
        self.identity, self.seen = identity, []
        self.rewards = {picture(seed).tobytes(): reward for seed, reward in enumerate(rewards)}

    def reward(self, image: Image.Image) -> float:
        return self.rewards[image.tobytes()]


def settings(folder: Path, **changes) -> ConsensusConfig:
    options = {"dataset_name": str(PAIRS), "judges": list(NAMES), "output_dir": str(folder)}
    return ConsensusConfig(**options | {"judge_batch_size": 4, "block_size": 10} | changes)


def build(config: ConsensusConfig, *judges: Colour) -> None:
    """Build with these, or with a judge of each colour."""
    main(config, [lazy(judge) for judge in judges or map(Colour, range(3))])


def lazy(judge: Colour) -> Lazy:
    return Lazy(judge.identity, lambda: judge)


def never(identity: str) -> Lazy:
    def load():
        raise AssertionError(f"{identity} was loaded, with nothing left to do")

    return Lazy(identity, load)


@pytest.fixture(scope="module")
def votes() -> np.ndarray:
    """The votes (192, 3) on the pocket's pairs, from the pictures themselves."""
    source = read_preferences(str(PAIRS))
    rewards = [
        [Colour(c).reward(Image.open(io.BytesIO(content)).convert("RGB")) for c in range(3)]
        for index in range(COUNT)
        for content in source.images(index)
    ]
    gaps = -np.diff(np.array(rewards).reshape(COUNT, 2, 3), axis=1)[:, 0]
    return (np.sign(gaps) + 1) / 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("consensus") / "whole"
    build(settings(folder))
    return folder


# What is kept


def test_pairs_are_kept_on_which_all_judges_agree_with_the_label(whole, votes):
    agreement = votes.mean(axis=1)
    rows, source = table(whole, "pairs"), read_preferences(str(PAIRS))
    expected = np.flatnonzero(agreement == 1).tolist()
    assert 0 < len(expected) < COUNT
    assert [row["chosen_row"] for row in rows] == [row["rejected_row"] for row in rows] == expected
    for row in rows:
        assert row["prompt"] == source.facts[row["chosen_row"]]["prompt"]
        assert [row[side]["bytes"] for side in ("chosen", "rejected")] == source.images(row["chosen_row"])
        assert row["p_chosen"] == row["agreement"] == 1.0
        gaps = np.subtract(row["chosen_scores"], row["rejected_scores"])
        assert len(gaps) == 3 and (gaps > 0).all()
    dropped = build_of(whole)["dropped"]
    assert dropped == {
        "pairs": {
            "judges disagree": int(((agreement >= 0.5) & (agreement < 1)).sum()),
            "judges prefer the rejected": int((agreement < 0.5).sum()),
        },
        "reading": {},
    }
    assert build_of(whole)["rows"] == {"pairs": {"train": len(expected)}}
    assert len(expected) + sum(dropped["pairs"].values()) == build_of(whole)["figures"]["pairs"] == COUNT


def test_the_table_is_read_with_soft_labels_by_its_readers(whole):
    read = read_preferences(str(whole), config="pairs")
    assert read.soft_labels and len(read) == len(table(whole, "pairs")) and not read.dropped
    assert load_dataset(str(whole), "pairs", split="train").num_rows == len(read)


def test_how_often_judges_agree_with_the_labels_and_with_each_other(whole, votes, capsys):
    figures = build_of(whole)["figures"]
    for place, name in enumerate(NAMES):
        found, of_judge = figures["agreement_with_label"][name], votes[:, place]
        wins, losses = int((of_judge == 1).sum()), int((of_judge == 0).sum())
        assert (found["wins"], found["losses"], found["ties"]) == (wins, losses, COUNT - wins - losses)
        interval = binomtest(wins, wins + losses).proportion_ci(method="wilson")
        assert (found["low"], found["high"]) == pytest.approx(tuple(interval))
    between = {tuple(pair["judges"]): pair["agreement"] for pair in figures["agreement_between_judges"]}
    for (i, one), (j, other) in combinations(enumerate(NAMES), 2):
        assert between[one, other] == pytest.approx(1 - np.abs(votes[:, i] - votes[:, j]).mean())
    build(settings(whole))
    said, card = capsys.readouterr().out, (whole / "README.md").read_text()
    rate = figures["agreement_with_label"]["red"]["rate_without_ties"]
    for text in (said, card):
        assert f"{100 * rate:.1f}\N{NO-BREAK SPACE}% of " in text and f"192, {figures['kept']} kept" in text


def test_the_pairs_that_are_kept_are_a_dataset_of_the_hub(whole, tmp_path):
    check_is_a_dataset(whole, tmp_path / "copy", "pairs")
    card = (whole / "README.md").read_text()
    assert "| judge 1 | " in card and "## What judge 1 was asked" in card and "weight: 1.0" in card


# One pair by hand


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("chosen", "rejected", "label", "rule", "agreement", "p_chosen", "reason"),
    [
        ([2, 3], [1, 0], None, Rule(1.0, "votes"), 1.0, 1.0, ""),
        ([2, 3], [1, 0], 0.7, Rule(1.0, "votes"), 1.0, 2.7 / 3, ""),
        ([2, 3], [1, 0], 0.7, Rule(1.0, "margin"), 1.0, (sigmoid(1) + sigmoid(3)) / 2, ""),
        ([2, 3], [2, 0], None, Rule(0.75, "votes"), 0.75, 0.75, ""),
        ([2, 3], [2, 0], None, Rule(1.0, "votes"), 0.75, 0.75, "judges disagree"),
        ([2, 2], [2, 2], None, Rule(0.6, "votes"), 0.5, 0.5, "judges disagree"),
        ([2, 0, 0], [1, 1, 1], None, Rule(0.6, "votes"), 1 / 3, 1 / 3, "judges prefer the rejected"),
        ([2, 0, 0], [1, 1, 1], None, Rule(0.3, "votes"), 1 / 3, 1 / 3, ""),
        ([2, 1, 1, 1, 0], [1, 0, 0, 0, 9], None, Rule(0.8, "votes"), 0.8, 0.8, ""),
        ([0.1, 0.1, 0], [0, 0, 9], None, Rule(0.6, "margin"), 2 / 3, None, "judges prefer the rejected"),
        ([0.1, 0.1, 0], [0, 0, 9], None, Rule(0.5, "margin"), 2 / 3, None, ""),
        ([1, 1, 1, 0], [0, 0, 0, 1], 0.0, Rule(0.75, "votes"), 0.75, 0.6, ""),
        ([2000.0], [-2000.0], None, Rule(1.0, "margin"), 1.0, 1.0, ""),
        ([2, math.nan], [1, 0], None, Rule(0.0, "votes"), math.nan, math.nan, "not finite"),
        ([2, 1], [-math.inf, 0], None, Rule(0.0, "votes"), math.nan, math.nan, "not finite"),
    ],
)
def test_a_pair_by_hand(chosen, rejected, label, rule, agreement, p_chosen, reason):
    found = decide(chosen, rejected, label, rule)
    assert found.reason == reason and found.agreement == pytest.approx(agreement, nan_ok=True)
    if p_chosen is not None:
        assert found.p_chosen == pytest.approx(p_chosen, nan_ok=True)


def test_no_pair_has_a_soft_label_below_a_half_unless_half_of_the_judges_may_disagree():
    chance = np.random.default_rng(0)
    below = 0
    for _ in range(3000):
        judges = int(chance.integers(1, 6))
        chosen, rejected = chance.integers(0, 4, (2, judges)) * chance.choice([0.1, 5.0], judges)
        label = None if chance.random() < 0.5 else float(chance.random())
        for least in (0.0, 0.5, 0.51, 0.8, 1.0):
            for kind in ("votes", "margin"):
                found = decide(chosen, rejected, label, Rule(least, kind))
                if not found.reason:
                    assert found.agreement >= least
                    below += found.p_chosen < 0.5
                    assert found.p_chosen >= 0.5 - 1e-12 or least <= 0.5
    assert below > 0


# Any table


def test_a_ranked_list_becomes_its_pairs_and_each_image_is_judged_once(tmp_path):
    source = write_ranked(tmp_path / "p", [[0, 1, 2, 3], [4, 5], [6, 6]], [[2, 1, 2, 3], [1, 2], [1, 2]])
    rewards = [0.5, 2.0, 3.0, -1.0, 1.0, 1.0]
    judge, same = Told("one", rewards), Told("two", [-r for r in rewards])
    config = settings(tmp_path / "out", dataset_name=source, judges=["one"], p_chosen="margin")
    build(config, judge)
    assert len(judge.seen) == len(set(judge.seen)) == 6
    rows = table(tmp_path / "out", "pairs")
    seeds = [(1, 0), (1, 3), (0, 3), (2, 3)]
    assert [tuple(row[side]["bytes"] for side in ("chosen", "rejected")) for row in rows] == [
        (png(better), png(worse)) for better, worse in seeds
    ]
    assert [row["p_chosen"] for row in rows] == pytest.approx(
        [sigmoid(rewards[better] - rewards[worse]) for better, worse in seeds]
    )
    built = build_of(tmp_path / "out")
    assert built["figures"]["pairs"] == 6 and built["figures"]["examples"] == 2
    assert built["dropped"] == {
        "reading": {"same image twice": 1},
        "pairs": {"judges disagree": 1, "judges prefer the rejected": 1},
    }
    build(
        settings(tmp_path / "out", dataset_name=source, judges=["one", "two"], min_agreement=0.5), judge, same
    )
    assert len(judge.seen) == 6 and len(same.seen) == 6, "another judge is asked alone"
    assert {row["p_chosen"] for row in table(tmp_path / "out", "pairs")} == {0.5}
    assert build_of(tmp_path / "out")["figures"]["agreement_between_judges"] == [
        {"judges": ["one", "two"], "agreement": pytest.approx(1 / 6)}
    ]


def test_the_votes_of_a_table_are_one_vote_more(tmp_path):
    columns = {
        "prompt": ["a", "b", "c"],
        "image1": [cell(png(seed)) for seed in (0, 2, 4)],
        "image2": [cell(png(seed)) for seed in (1, 3, 5)],
        "votes_image1": [3, 1, 1],
        "votes_image2": [1, 4, 1],
    }
    source = write_table(tmp_path / "p", columns)
    judges = Told("one", [1, 0, 0, 1, 0, 0]), Told("two", [1, 0, 0, 0, 0, 0])
    config = settings(tmp_path / "out", dataset_name=source, judges=["one", "two"], min_agreement=0.75)
    build(config, *judges)
    rows = table(tmp_path / "out", "pairs")
    assert [row["p_chosen"] for row in rows] == pytest.approx([2.75 / 3, 2.3 / 3])
    assert [row["agreement"] for row in rows] == [1.0, 0.75]
    assert rows[1]["chosen"]["bytes"] == png(3) and rows[1]["chosen_row"] == 1
    assert build_of(tmp_path / "out")["dropped"] == {"reading": {"tie": 1}, "pairs": {}}


def test_imagereward_s_rows_are_those_of_their_own_table(tmp_path):
    columns = {
        "prompt": ["a", "b", "a"],
        "prompt_id": ["x", "y", "x"],
        "rank": [2, 1, 1],
        "image": [cell(png(seed)) for seed in range(3)],
    }
    source = write_table(tmp_path / "p", columns)
    build(settings(tmp_path / "out", dataset_name=source, judges=["one"]), Told("one", [0, 0, 1]))
    (row,) = table(tmp_path / "out", "pairs")
    assert (row["chosen_row"], row["rejected_row"]) == (2, 0)
    assert build_of(tmp_path / "out")["dropped"]["reading"] == {"no second image": 1}


@pytest.mark.parametrize("failed", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_drops_its_pairs(tmp_path, failed):
    class Failing(Told):
        def answer(self, cases):
            return [
                [Answer({YES: failed if math.isnan(failed) else 1.0, NO: 0.0})]
                if self.reward(case.image) > 8
                else [logistic(self.reward(case.image))]
                for case in cases
            ]

    source = write_pairs(tmp_path / "p", 3)
    judges = Failing("failing", [1, 0, 1, 9, 1, 0]), Told("fine", [1, 0, 1, 0, 1, 0])
    build(settings(tmp_path / "out", dataset_name=source, judges=["failing", "fine"]), *judges)
    assert [row["chosen_row"] for row in table(tmp_path / "out", "pairs")] == [0, 2]
    built = build_of(tmp_path / "out")
    assert built["dropped"]["pairs"] == {"not finite": 1} and built["figures"]["pairs"] == 3
    assert built["figures"]["judged"] == 2


def test_pictures_are_judged_as_a_person_sees_them(tmp_path):
    """Upright, and transparent parts white, though the written bytes are the source's."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encoded(picture(0, 20, 10), "PNG", exif=exif)
    clear = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    columns = {"prompt": ["a"], "chosen": [cell(turned)], "rejected": [cell(clear)]}
    judge = Colour(0)
    judge.reward = lambda image: float(image.size == (10, 20)) - float(image.getpixel((0, 0)) == (255,) * 3)
    config = settings(tmp_path / "out", dataset_name=write_table(tmp_path / "p", columns), judges=["red"])
    build(config, judge)
    (row,) = table(tmp_path / "out", "pairs")
    assert row["chosen_scores"] == pytest.approx([1.0]) and row["rejected_scores"] == pytest.approx([-1.0])
    assert row["chosen"]["bytes"] == turned and row["rejected"]["bytes"] == clear
    broken = write_pairs(tmp_path / "q", 2, chosen=[cell(png(0)), cell(png(1)[:50])])
    with pytest.raises(InputError, match="row 1, column chosen: 50 bytes that are no readable image"):
        build(settings(tmp_path / "out", dataset_name=broken, judges=["red"]), Colour(0))


# What a second run does not repeat


def test_the_same_command_loads_no_judge_and_neither_does_another_rule(whole, votes):
    before = table(whole, "pairs")
    again = [never(f"colour {channel}") for channel in range(3)]
    for changes in (
        {},
        {"min_agreement": 0.5},
        {"p_chosen": "margin"},
        {"block_size": 7, "judge_batch_size": 1},
    ):
        main(settings(whole, **changes), again)
        assert calls(whole) == [0, 0, 0]
        if changes.get("min_agreement"):
            rows = table(whole, "pairs")
            expected = np.flatnonzero(votes.mean(axis=1) >= 0.5)
            assert [row["chosen_row"] for row in rows] == expected.tolist()
            assert [row["p_chosen"] for row in rows] == pytest.approx(votes[expected].mean(axis=1))
    main(settings(whole), again)
    assert table(whole, "pairs") == before


def test_kill_9_then_the_same_command_gives_the_same_pairs_and_repeats_no_call(tmp_path, whole):
    folder = tmp_path / "killed"
    for moment in (3, 60, 130):
        kill_at(moment, build, settings(folder))
        assert not (folder / "pairs").exists() and not (folder / "BUILD.json").exists()
    answered = len(kept(folder, "answers"))
    build(settings(folder))
    keys = kept(folder, "answers")
    assert len(keys) == len(set(keys)) == 3 * 2 * COUNT
    assert sum(calls(folder)) == len(keys) - answered
    assert table(folder, "pairs") == table(whole, "pairs")
    kill_at(0, build, settings(folder, min_agreement=0.0))  # while the new table is written
    assert table(folder, "pairs") == table(whole, "pairs"), "the old pairs stay"


def test_one_judge_is_loaded_at_a_time(tmp_path):
    alive, most = [], []

    class Counted(Colour):
        def answer(self, cases):
            return super().answer(cases)

        def __del__(self):
            alive.remove(self.channel)

    def counted(channel):
        def load():
            alive.append(channel)
            most.append(len(alive))
            return Counted(channel)

        return Lazy(f"colour {channel}", load)

    source = write_pairs(tmp_path / "p", 8)
    main(settings(tmp_path / "out", dataset_name=source, min_agreement=0.0), list(map(counted, range(3))))
    assert most == [1, 1, 1] and alive == []


# Errors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judges": []}, "--judges is missing: only the dataset `pocket` has a default"),
        ({"judges": ["a", "b", "a"]}, "--judges names 'a' twice"),
        ({"judges": [""]}, "--judges is empty"),
        ({"judges": ["rubric=reward"]}, "write the judge's name first"),
        ({"judges": ["a size=3"]}, "unknown 'size'; known are rubric, revision, dtype, url"),
        ({"judges": ["a dtype=int8"]}, "dtype is 'int8'; choose from float32"),
        ({"judges": ["a rubric=nothing"]}, "there is no rubric 'nothing'"),
        ({"judges": ["a rubric=class_conditional"]}, "rubric class_conditional does not fit"),
        ({"min_agreement": 1.1}, r"--min_agreement is 1.1; it lies in \[0, 1\]"),
        ({"min_agreement": -0.1}, r"--min_agreement is -0.1; it lies in \[0, 1\]"),
        ({"min_agreement": math.nan}, "--min_agreement is nan"),
        ({"judge_batch_size": 0}, "--judge_batch_size is 0"),
        ({"dataset_name": "./nowhere"}, "--dataset_name: there is no ./nowhere"),
        ({"dataset_name": None}, "--dataset_name is missing: only the model `pocket` has a default"),
    ],
)
def test_wrong_options_are_named(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        settings(tmp_path, **changes)


def test_a_question_that_needs_a_detector_is_named(tmp_path):
    rubric = tmp_path / "own.yaml"
    rubric.write_text("- {name: there, check: presence, polarity: positive}")
    with pytest.raises(InputError, match="own does not fit, the question 'there' needs a detector; pairs"):
        settings(tmp_path, judges=[f"a rubric={rubric}"])


def test_one_model_under_two_names_is_an_error(tmp_path):
    with pytest.raises(InputError, match="'red' and 'green' are one model with the same questions"):
        build(settings(tmp_path, judges=["red", "green"]), Colour(0), Colour(0))


def test_an_empty_result_is_an_error_that_says_why_and_loses_nothing(tmp_path):
    source = write_pairs(tmp_path / "p", 3)
    config = settings(tmp_path / "out", dataset_name=source, judges=["one"])
    with pytest.raises(InputError, match=r"no pair is left .*3 judges prefer the rejected.*--min_agreement"):
        build(config, Told("one", [0, 1] * 3))
    assert build_of(tmp_path / "out")["figures"]["kept"] == 0
    main(settings(tmp_path / "out", dataset_name=source, judges=["one"], min_agreement=0.0), [never("one")])
    assert [row["p_chosen"] for row in table(tmp_path / "out", "pairs")] == [0.0] * 3


# As a user


def test_the_pocket_s_clip_agrees_with_the_pocket_s_pairs(tmp_path):
    """They were labelled by it."""
    options = {"dataset_name": "pocket", "judges": "pocket", "p_chosen": "margin"}
    run = launch(
        "data_builders/consensus_pairs.py", options | {"output_dir": tmp_path / "out"}, tmp_path / "log"
    )
    assert run.wait() == 0, run.text()
    assert "192, 192 kept (dropped: none)" in run.text()
    rows, source = table(tmp_path / "out", "pairs"), table(PAIRS, "")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in source]
    margins = [row["chosen_scores"][0] - row["rejected_scores"][0] for row in rows]
    ratios = [margin / row["margin"] for margin, row in zip(margins, source, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * COUNT, rel=1e-3), "the source's are 100 x cosine, not logits"
    assert [row["p_chosen"] for row in rows] == pytest.approx(list(map(sigmoid, margins)), abs=1e-4)


@pytest.mark.slow
def test_two_processes_share_the_work_and_a_vlm_with_a_rubric_takes_part(tmp_path):
    """The world size is the one that the processes saw."""
    tiny.tiny_clip(tmp_path / "clip")
    (tmp_path / "asked.yaml").write_text(
        json.dumps([{"name": "fits", "text": "Does this show: {prompt}?", "polarity": "positive"}])
    )
    vlm = f"{pocket.folder('llava')} rubric={tmp_path / 'asked.yaml'}"
    options = {
        "dataset_name": write_pairs(tmp_path / "p", 6),
        "judges": [str(tmp_path / "clip"), vlm],
        "min_agreement": 0.0,
        "block_size": 2,
        "judge_batch_size": 2,
    }
    torchrun("data_builders/consensus_pairs.py", {**options, "output_dir": str(tmp_path / "two")})
    assert build_of(tmp_path / "two")["run"]["processes"] == 2 and calls(tmp_path / "two") == [12, 12]
    assert len(set(kept(tmp_path / "two", "answers"))) == 24
    assert len(list((tmp_path / "two" / "work").glob("answers-*.sqlite"))) == 2
    main(ConsensusConfig(**options, output_dir=str(tmp_path / "one")))
    one, two = table(tmp_path / "one", "pairs"), table(tmp_path / "two", "pairs")
    assert len(one) == 6 and [row["chosen"] for row in one] == [row["chosen"] for row in two]
    for row, other in zip(one, two, strict=True):
        assert row["chosen_scores"] == pytest.approx(other["chosen_scores"], abs=1e-4)
        assert row["chosen_scores"][1] != row["rejected_scores"][1]
