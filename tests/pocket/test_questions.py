"""The pocket's questions: pure functions, held out by picture, each with one right answer among others."""

import hashlib
import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from transformers import AutoTokenizer

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.pocket import questions, world
from prefopt.pocket.drawing import COLOURS
from prefopt.pocket.questions import Duo, answers_to, ask, duos, is_right, pair_rows, qa_rows, render_duo
from prefopt.pocket.world import Scene
from prefopt.vlm.examples import VisionExamples

DUO = Duo(Scene("elephant", "red", 1, "lake"), Scene("zebra", "blue", 2, "lake"))
# Every question about it and its right answer.
ANSWERS = {
    "Which colour are the elephants?": "one red elephant by the lake",
    "Which colour are the zebras?": "two blue zebras by the lake",
    "How many elephants are there?": "one elephant by the lake",
    "How many zebras are there?": "two zebras by the lake",
    "How many giraffes are there?": "No giraffes by the lake",
    "How many lions are there?": "No lions by the lake",
    "Which animals are with the zebras?": "one elephant by the lake",
    "Which animals are with the elephants?": "two zebras by the lake",
    "Where are the elephants?": "one elephant by the lake",
    "Where are the zebras?": "two zebras by the lake",
}


@pytest.fixture(scope="module")
def rows():
    return qa_rows("test", 50)


def row(question: str, answer: str) -> dict:
    """A row without its picture."""
    messages = {"prompt": ("user", question), "completion": ("assistant", answer)}
    return {name: [{"role": role, "content": text}] for name, (role, text) in messages.items()}


def test_rows_are_pure_in_any_process():
    code = (
        "from prefopt.pocket.questions import *; import hashlib; asked = ask('train', 7); "
        "print(asked, hashlib.sha256(render_duo(asked.duo, asked.seed).tobytes()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    asked = ask("train", 7)
    picture = render_duo(asked.duo, asked.seed)
    assert run.stdout.split("\n")[0] == f"{asked} {hashlib.sha256(picture.tobytes()).hexdigest()}"
    assert picture.size == (64, 64) and picture.mode == "RGB"
    assert picture.tobytes() != render_duo(asked.duo, asked.seed + 1).tobytes()


def test_splits_share_no_duo_and_no_picture():
    """Guards: test rows about pictures of the training set, by splitting questions."""
    for one, other in combinations(questions.ROWS, 2):
        assert len(duos(one)) == len(duos(other)) == 900
        assert not set(duos(one)) & set(duos(other))
    asked = {split: [ask(split, n) for n in range(1600)] for split in questions.ROWS}
    for split, all_asked in asked.items():
        assert {one.duo for one in all_asked} <= set(duos(split))
        assert len({(one.duo, one.seed) for one in all_asked}) == 1600
    with pytest.raises(InputError, match="no split 'validation'; they have train, test, critic"):
        duos("validation")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("split", questions.ROWS)
def test_splits_are_balanced(split):
    for name, values in world.ATTRIBUTES.items():
        counts = Counter(getattr(scene, name) for duo in duos(split) for scene in duo)
        shares = [counts[value] / 1800 for value in values]
        expected = [2 / 3, 1 / 3, 0] if name == "count" else [1 / len(values)] * len(values)
        assert shares == pytest.approx(expected)
    kinds = Counter(ask(split, n).kind for n in range(100))
    assert set(kinds) == set(questions.KINDS) and set(kinds.values()) == {20}


def test_every_answer_is_right():
    groups = DUO, DUO[::-1]
    assert dict(kind(*both) for kind in questions.KINDS.values() for both in groups) == ANSWERS


def test_a_picture_shows_both_groups():
    """One red elephant and two blue zebras: blue and red pixels, and neither where the other duo has none."""
    plain = Duo(Scene("elephant", "green", 1, "lake"), Scene("zebra", "pink", 2, "lake"))
    for seed in range(5):
        pixels = np.asarray(render_duo(DUO, seed)).reshape(-1, 3).astype(int)
        others = np.asarray(render_duo(plain, seed)).reshape(-1, 3).astype(int)
        for colour in ("red", "blue"):
            near = np.abs(pixels - COLOURS[colour]).max(1) < 25
            assert near.sum() > 60 > 20 > (np.abs(others - COLOURS[colour]).max(1) < 25).sum()


def test_rows_are_what_the_trainers_read(rows):
    examples = VisionExamples(rows, "pocket", "sft")
    for number in range(5):
        asked, example = ask("test", number), examples[number, 0]
        prompt = [{"type": "image"}, {"type": "text", "text": asked.question}]
        assert example["prompt"] == [{"role": "user", "content": prompt}]
        (completion,) = example["completions"]
        assert completion[0]["content"] == [{"type": "text", "text": asked.answer}]
        assert example["images"][0].tobytes() == render_duo(asked.duo, asked.seed).tobytes()
    assert rows[0]["images"][0].format == "PNG" and rows["kind"][:5] == list(questions.KINDS)


def test_a_question_has_other_answers_and_the_right_one_once(rows):
    for one in rows:
        right, found = one["completion"][-1]["content"], answers_to(one["prompt"][-1]["content"])
        assert found.count(right) == 1 and len(found) >= 10
        assert [answer for answer in found if is_right(one, answer)] == [right]
    # Two counts in five places; and of 12 answers with a colour as many.
    place = answers_to("Where are the zebras?")
    assert len(place) == 10 and "one zebra at night" in place and "four zebras" not in place
    assert len(answers_to("Which colour are the zebras?")) == 60
    assert len(answers_to("How many zebras are there?")) == 15
    assert answers_to("Who is there?") == ()


@pytest.mark.parametrize("answer", ["two zebras by the lake", " Two  zebras, by the lake.\n"])
def test_case_spaces_and_punctuation_do_not_count(answer):
    assert is_right(row("Where are the zebras?", "two zebras by the lake"), answer)


@pytest.mark.parametrize(
    "answer", ["", "two zebras", "two zebra by the lake", "two zebras by the lake at night"]
)
def test_all_else_counts(answer):
    assert not is_right(row("Where are the zebras?", "two zebras by the lake"), answer)


def test_answers_are_words_that_the_llava_has_learned_to_write():
    """Four to nine tokens, each of which stands in a caption or, as `No`, among a judge's answers."""
    tokenizer = AutoTokenizer.from_pretrained(pocket.folder("llava"))
    captions = [world.caption(scene, 0) for scene in world.train_scenes()]
    learned = {token for ids in tokenizer([*captions, "No"]).input_ids for token in ids}
    answers = [ask("train", number).answer for number in range(1600)]
    tokens = tokenizer(answers, add_special_tokens=False).input_ids
    assert {token for ids in tokens for token in ids} <= learned
    lengths = [len(ids) for ids in tokens]
    assert min(lengths) >= 4 and max(lengths) <= 9 and np.mean(lengths) < 7


def test_a_pair_is_the_right_answer_and_one_that_is_nearly_it():
    pairs, answers = pair_rows("test", 50), qa_rows("test", 50)
    apart = Counter()
    for pair, answer in zip(pairs, answers, strict=True):
        assert pair["prompt"] == answer["prompt"] and pair["images"] == answer["images"]
        assert pair["chosen"] == answer["completion"]
        rejected = pair["rejected"][0]["content"]
        assert rejected in answers_to(answer["prompt"][-1]["content"]) and not is_right(answer, rejected)
        apart[len(set(rejected.split()) - set(pair["chosen"][0]["content"].split()))] += 1
    assert apart[1] > 40, "one word in most of them"
    assert pair_rows("test", 3)[2] == pairs[2], "a pure function of split and number"
