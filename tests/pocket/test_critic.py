"""The pocket's critic: it is taught what is true, in the words of critics; how well it grades and chooses."""

import json

import numpy as np
import pytest
from pretraining import critic, critic_quality
from pretraining.critic import PREDICATES, Prompts, all_asked
from pretraining.critic_answers import RIGHT, Facts, draw_answer, facts_of, one_off, right_answer
from pretraining.llava_text import Words
from transformers import AutoProcessor

from prefopt import pocket
from prefopt.judges.critic import QUALITY, TypedCritic
from prefopt.judges.critic_cases import PairCase, ScoreCase
from prefopt.judges.loading import load_critic, load_judge
from prefopt.judges.questions import Case
from prefopt.pocket.questions import Asked, Duo, answers_to, duos
from prefopt.pocket.world import Scene

FOLDER = pocket.folder("critic")
PROVENANCE = json.loads((FOLDER.parent.parent / "PROVENANCE.json").read_text(encoding="utf-8"))
DUO = Duo(Scene("lion", "red", 2, "night"), Scene("zebra", "blue", 1, "night"))
ASKED = Asked(DUO, 0, "colour", "Which colour are the lions?", "two red lions at night")
ABSENT = Asked(DUO, 0, "absent", "How many giraffes are there?", "No giraffes at night")


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(Words(AutoProcessor.from_pretrained(FOLDER)))


@pytest.fixture(scope="module")
def exams() -> list[critic_quality.Exam]:
    return critic_quality.make_exams(100)


@pytest.fixture(scope="module")
def typed() -> TypedCritic:
    critic = load_critic(str(FOLDER), typed=True, batch_size=16)
    assert isinstance(critic, TypedCritic)
    return critic


# What it is taught


def test_facts_are_read_off_every_answer():
    assert facts_of("two red lions at night") == Facts(2, "red", "lion", "night")
    assert facts_of("No giraffes on the savanna") == Facts(0, None, "giraffe", "savanna")
    facts = [facts_of(answer) for answer in answers_to("Which animals are with the lions?")]
    assert len(set(facts)) == len(facts) == 30


def test_all_questions_about_a_picture_are_those_of_the_pocket():
    asked = all_asked(DUO)
    assert len({one.question for one in asked}) == 10 and {one.duo for one in asked} == {DUO}
    assert (ASKED.question, ASKED.answer) in {(one.question, one.answer) for one in asked}
    assert all(one.answer in answers_to(one.question) for one in asked)


@pytest.mark.parametrize("asked", [ASKED, ABSENT])
def test_one_wrong_fact_is_one(asked):
    rng, truth = np.random.default_rng(0), facts_of(asked.answer)
    wrong = [one_off(rng, asked) for _ in range(200)]
    for graded in wrong:
        said = facts_of(graded.text)
        assert sum(a != b for a, b in zip(said, truth, strict=True)) == 1
        assert graded.level == 2 and not graded.truths["right"] and graded.truths["steerability"]
        assert sum(not true for _, true in graded.words) == 1
    changed = {n for g in wrong for n in Facts._fields if getattr(facts_of(g.text), n) != getattr(truth, n)}
    assert changed == {"count", "place"} | ({"colour"} if asked is ASKED else set())
    assert right_answer(rng, asked).level == RIGHT


def test_what_is_to_be_said_follows_from_the_answer():
    rng = np.random.default_rng(1)
    seen = {graded.text: graded for graded in (draw_answer(rng, ASKED) for _ in range(4000))}
    cut, other = seen["two red lions"], seen["one blue zebra at night"]
    assert cut.level == 3 and cut.truths["correctness"] and not cut.truths["steerability"]
    assert other.level == 0 and not other.truths["hallucination"], "the picture shows it, nobody asked"
    assert seen["two pink lions at night"].truths["hallucination"]
    assert not seen["two blue lions at night"].truths["hallucination"], "there is something blue"
    assert seen["I cannot tell."].truths["refusal"] and seen["I cannot tell."].level == 0
    assert [text for text, graded in seen.items() if graded.level == RIGHT] == [ASKED.answer]
    assert seen["two lions, red, night"].level == 3 and seen["D"].level == 0
    assert {name for graded in seen.values() for name in graded.truths} <= {q.name for q in PREDICATES}


def test_words_of_an_answer_are_marked_where_they_end(prompts):
    graded = next(g for g in iter(lambda: one_off(np.random.default_rng(3), ASKED), None))
    tokens, truth = prompts.described(ScoreCase([], ASKED.question, graded.text), graded)
    marked = [
        prompts.words.tokenizer.decode([token]).strip()
        for token, t in zip(tokens, truth, strict=True)
        if t >= 0
    ]
    assert marked == [word for word in graded.text.split() if word not in ("in", "on", "by", "at", "the")]
    assert [t for t in truth if t >= 0] == [int(true) for _, true in graded.words]
    right = right_answer(np.random.default_rng(0), ASKED)
    _, both = prompts.described(PairCase([], ASKED.question, right.text, graded.text), right, graded)
    assert [t for t in both if t >= 0] == [1, 1, 1, 1, *(int(true) for _, true in graded.words)]


def test_a_pair_is_asked_in_both_orders_so_that_a_place_tells_nothing(prompts):
    rng, words = np.random.default_rng(0), prompts.words
    letters = [words.answer(letter)[0] for letter in "AB"]
    lesson = critic.Lesson(asked=0, compared=1)
    rows = [critic.make_row(rng, DUO, lesson, prompts) for _ in range(50)]
    told = [[letters.index(target) for target in row.target if target in letters] for row in rows]
    assert 40 <= sum(sorted(both) == [0, 1] for both in told) < 50, "one in twenty is a tie, told by chance"


def test_it_is_taught_the_tokens_that_its_judge_is_shown(prompts):
    """Guards: a critic that is trained in one format and asked in another."""
    words = prompts.words
    image = critic.render_duo(DUO, 1)
    for case in (
        ScoreCase([image], ASKED.question, "one red lion at night", "two red lions at night"),
        PairCase([image], ASKED.question, "one red lion at night", "Yes"),
    ):
        description = prompts.described(case)[0]
        asked = Case(image, prompts.templates.words(case), (QUALITY,))
        ((inputs, _),) = load_judge(str(FOLDER)).answerer.prompts(asked)
        assert inputs["input_ids"][0].tolist() == [*words.picture, *description, *words.question(QUALITY)]


def test_its_pictures_are_no_pictures_of_others():
    assert not set(duos("critic")) & {*duos("train"), *duos("test")}


# How good it is


def test_it_tells_right_from_wrong(exams):
    found = critic_quality.judged(load_judge(str(FOLDER), batch_size=16), exams)
    assert found["balanced"] >= 0.8 and min(found.values()) >= 0.7


def test_it_grades_and_prefers_the_right_answer(exams, typed):
    found = critic_quality.graded(typed, exams, with_reference=False)
    assert found["mean_score_right"] > 80 > 70 > found["mean_score_wrong"]
    assert found["prefers_right"] >= 0.85 and found["consistent"] >= 0.8
    assert typed.readings.unreadable == 0


def test_provenance_says_how_often_it_is_right():
    quality = PROVENANCE["critic"]["quality"]
    assert quality["is_it_right"]["balanced"] >= 0.85
    found = quality["without_reference"]
    assert found["prefers_right"] >= 0.9 and found["consistent"] >= 0.85
