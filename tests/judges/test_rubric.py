"""Rubrics: the points of arXiv 2405.13473, and the faults of the system that goes with it (SRT2I)."""

import math

import pytest

from prefopt.errors import InputError
from prefopt.judges.questions import NO, YES, Answer
from prefopt.judges.rubric import Rubric, best

RUBRIC = Rubric.load("class_conditional")
NAMES = [item.name for item in RUBRIC.items]


def verdicts(points):
    """The answers that give these points: a clear one for +1 or -1, none for 0."""
    answers = {}
    for item, point in zip(RUBRIC.items, points, strict=True):
        answers[item.name] = None if point == 0 else YES if point * item.sign > 0 else NO
    return answers


def sure(p):
    return Answer({YES: p, NO: 1 - p})


# The paper's worked rows, as points of the ten questions.
ROWS = {
    (1, -1, 1, 1, 1, 0, 1, 1, 1, 1): 7,
    (1, 0, 0, 0, 0, 0, 1, 1, 1, 1): 5,
    (1, 0, 1, 1, 1, 0, 1, 1, 1, 1): 8,
}


@pytest.mark.parametrize(("points", "total"), ROWS.items())
def test_the_paper_s_worked_rows(points, total):
    made = RUBRIC.points(verdicts(points))
    assert [made[name] for name in NAMES] == list(points)
    assert sum(made.values()) == total


def test_the_paper_s_choice_of_the_best_images():
    """Ten images of one prompt: the four that reach 8 go on, ties and all."""
    seven, five, eight = ROWS
    images = [seven, five, seven, five, eight, seven, eight, eight, five, eight]
    totals = [sum(RUBRIC.points(verdicts(points)).values()) for points in images]
    assert [place + 1 for place in best(totals)] == [5, 7, 8, 10]


def test_the_highest_score_is_ten_and_an_always_yes_judge_is_far_from_it():
    """Guards against SRT2I: an always-yes judge nearly ties a perfect image there."""
    perfect = {item.name: YES if item.sign > 0 else NO for item in RUBRIC.items}
    assert sum(RUBRIC.points(perfect).values()) == 10
    assert sum(RUBRIC.points(dict.fromkeys(NAMES, YES)).values()) == 4


def test_log_odds_count_as_they_are_where_the_rubric_says_so(tmp_path):
    """tanh is flat beyond 38: two images that a reward model tells apart would tie."""
    rubric = Rubric.load("reward")
    assert rubric.soft_decides and not RUBRIC.soft_decides
    answers = [Answer({YES: 1.0, NO: math.exp(-r)}) for r in (60.0, 52.0)]
    empty = {"preferred": Answer({YES: math.exp(-10), NO: 1.0})}
    soft = [rubric.soft_points({"preferred": answer}, empty)["preferred"] for answer in answers]
    assert soft == pytest.approx([70, 62]) and math.tanh(35) == math.tanh(31)
    text = "- {name: a, polarity: negative, weight: 2, soft: log_odds, text: Ask}\n"
    (tmp_path / "mine.yaml").write_text(text + "- {name: b, polarity: positive, text: Ask}\n")
    mine = Rubric.load(str(tmp_path / "mine.yaml")).soft_points(dict.fromkeys("ab", sure(0.9)))
    assert mine == pytest.approx({"a": -2 * math.log(9), "b": 0.8})


def test_a_detector_s_check_needs_no_answer_about_an_empty_image(tmp_path):
    text = "- {name: a, polarity: positive, text: Ask}\n- {name: b, polarity: positive, check: count}\n"
    (tmp_path / "mine.yaml").write_text(text)
    answers = {"a": sure(0.9), "b": Answer({YES: 1.0, NO: 0.0})}
    soft = Rubric.load(str(tmp_path / "mine.yaml")).soft_points(answers, {"a": sure(0.9)})
    assert soft == {"a": 0.0, "b": 1.0}


def test_what_a_judge_says_of_an_empty_image_counts_nothing():
    """Guards against SRT2I's bias to yes: the soft score subtracts it, so an always-yes judge scores 0."""
    always = dict.fromkeys(NAMES, sure(0.95))
    assert sum(RUBRIC.soft_points(always, always).values()) == 0
    soft = RUBRIC.soft_points(always)
    assert soft["realistic"] == pytest.approx(math.tanh(math.log(0.95 / 0.05) / 2))
    assert soft["realistic"] == pytest.approx(2 * 0.95 - 1), "tanh of half the log-odds is 2p - 1"


def test_a_question_whose_need_was_answered_no_counts_nothing():
    answers = verdicts([1] * 10) | {"class_visible": NO}
    points = RUBRIC.points(answers)
    dependent = [item.name for item in RUBRIC.items if item.needs]
    assert len(dependent) == 4
    assert {points[name] for name in dependent} == {0}
    assert points["class_visible"] == -1
    assert sum(points.values()) == 10 - 4 - 2


def test_needs_are_followed_through_and_in_any_order(tmp_path):
    rubric = written(tmp_path, [("c", ["b"]), ("b", ["a"]), ("a", [])])
    assert rubric.points({"a": NO, "b": YES, "c": YES}) == {"c": 0, "b": 0, "a": -1}
    assert rubric.points({"a": None, "b": YES, "c": YES}) == {"c": 1, "b": 1, "a": 0}


def test_an_unclear_answer_is_neither_yes_nor_no():
    """Guards against a parse failure that counts as a yes: mass on other tokens and exact ties are 'Nan'."""
    assert Answer({YES: 0.9, NO: 0.1}, other_mass=0.6).verdict is None
    assert sure(0.5).verdict is None
    assert sure(0.51).verdict == YES
    soft = RUBRIC.soft_points(dict.fromkeys(NAMES, Answer({YES: 0.9, NO: 0.1}, other_mass=0.6)))
    assert set(soft.values()) == {0}


def test_weights_scale_points(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("- {name: a, text: Ask, polarity: negative, weight: 2.5}\n")
    assert Rubric.load(str(file)).points({"a": NO}) == {"a": 2.5}


def test_a_rubric_is_weighed_anew():
    weighed = RUBRIC.weighed(["whole_prompt=4", "anatomy=0.5"])
    answers = dict.fromkeys(NAMES, YES)
    assert weighed.points(answers) == RUBRIC.points(answers) | {"whole_prompt": 4, "anatomy": 0.5}
    assert RUBRIC.weighed([]) == RUBRIC and weighed.questions("lion", "a") == RUBRIC.questions("lion", "a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mood=2", "'mood' is no question of the rubric class_conditional: they are realistic"),
        ("anatomy", "--question_weights anatomy: write name=weight, each name once"),
        ("anatomy=", "anatomy=: the weight is ''"),
        ("anatomy=much", "anatomy=much: the weight is 'much'; it is a number"),
        ("anatomy=0", "anatomy=0: the weight is 0.0"),
        ("anatomy=nan", "anatomy=nan: the weight is nan"),
    ],
)
def test_weights_that_cannot_be_are_named(text, said):
    with pytest.raises(InputError, match=said):
        RUBRIC.weighed([text])


def test_questions_name_class_and_prompt(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("- {name: a, text: 'Is {class} in {prompt}?', polarity: positive}\n")
    (question,) = Rubric.load(str(file)).questions("ele{x}phant", "a {class} here")
    assert question.text == "Is ele{x}phant in a {class} here?"


def written(folder, items):
    file = folder / "rubric.yaml"
    lines = [f"- {{name: {n}, text: '{n}?', polarity: positive, needs: {needs}}}" for n, needs in items]
    file.write_text("\n".join(lines))
    return Rubric.load(str(file))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("a", ["b"])], r"'a' needs 'b', which is none of its questions"),
        ([("a", ["b"]), ("b", ["c"]), ("c", ["a"])], r"needs go in a circle"),
        ([("a", ["a"])], r"needs go in a circle"),
        ([("a", []), ("a", [])], r"names two questions 'a'"),
    ],
)
def test_a_rubric_that_cannot_be_is_an_error(tmp_path, items, message):
    with pytest.raises(InputError, match=message):
        written(tmp_path, items)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b", "no list of questions"),
        ("", "no list of questions"),
        ("[]", "has no questions"),
        ("- 3", "question 1 is 3"),
        ("- {text: Ask, polarity: positive}", "question 1: the name is None"),
        ("- {name: a, polarity: positive}", "needs a text for a judge or a check"),
        ("- {name: a, text: Ask, check: count, polarity: positive}", "one of them"),
        ("- {name: a, check: smell, polarity: positive}", "the check is 'smell'"),
        ("- {name: a, text: Ask}", "polarity is None"),
        (
            "- {name: first, text: 'Of {class}?', polarity: positive}\n"
            "- {name: shown, text: 'Of {prompt}, {promt}?', polarity: positive}",
            r"broken\.yaml, question 2 \(shown\): the text has \{promt\}, .* write \{class\} or \{prompt\}",
        ),
        ("- {name: a, text: 'A { prompt }?', polarity: positive}", r"the text has \{ prompt \}"),
        ("- {name: a, text: 'Is { there?', polarity: positive}", r"the text has \{, and nothing"),
        ("- {name: a, text: Ask, polarity: good}", "polarity is 'good'"),
        ("- {name: a, text: Ask, polarity: positive, weight: -1}", "the weight is -1"),
        ("- {name: a, text: Ask, polarity: positive, wieght: 1}", "unknown entry 'wieght'"),
        ("- {name: a, text: Ask, polarity: positive, needs: b}", "needs is 'b'"),
        ("- {name: a, text: Ask, polarity: positive, soft: logit}", "soft is 'logit'"),
        (
            "- {name: a, check: count, polarity: positive, soft: log_odds}",
            "soft is 'log_odds'; it is tanh, or",
        ),
        ("- !!python/object/apply:os.system [true]", r"broken\.yaml: line 1: the tag !!python/object/apply"),
        ("[" * 2000, r"broken\.yaml: line 1: lists and mappings lie more than 30 deep"),
        (
            "- {name: a, text: Ask, polarity: positive,\n   text: Tell}",
            "'text' is given in line 1 and in line 2",
        ),
    ],
)
def test_a_broken_rubric_is_named(tmp_path, text, message):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        Rubric.load(str(file))


def test_a_rubric_that_is_not_there_is_named():
    with pytest.raises(InputError, match="name a YAML file, or one of answers, class_conditional"):
        Rubric.load("nowhere")
