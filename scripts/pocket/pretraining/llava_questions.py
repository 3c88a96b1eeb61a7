"""What the pocket's LLaVA is asked while it learns: the rubric in several wordings, and simple questions.

A judge's rubric is the user's to write, so the ten questions also come in other words, and a share of the
questions is about nothing but what the picture shows, some with options to choose from.
"""

from functools import cache

import numpy as np

from prefopt.judges.questions import NO, YES, Question
from prefopt.judges.rubric import Rubric
from prefopt.pocket.world import ATTRIBUTES, Scene
from pretraining.flaws import FLAWS, answers
from pretraining.llava_text import NUMBERS

RUBRIC = Rubric.load("class_conditional")
SHARE_REWORDED = 0.2
SIMPLE = 2  # questions about each picture beside those of the rubric
_HEAVIEST = 2.5

REWORDED: dict[str, tuple[str, ...]] = {
    "realistic": (
        "Does the picture look realistic?",
        "Is the picture clear, without noise, blur or darkness?",
    ),
    "odd_pattern": ("Are there unexpected patterns?", "Does an odd patch or pattern stand out?"),
    "class_visible": ("Is there a {class} in the picture?", "Does the picture show a {class}?"),
    "normal_shape": (
        "Does the {class} have a normal shape?",
        "Do the body and the posture of the {class} look normal?",
    ),
    "natural_behaviour": (
        "Does the {class} behave naturally?",
        "Is the {class} doing what it does in nature?",
    ),
    "lookalike": (
        "Is there another animal beside the {class}?",
        "Is there anything that could be mistaken for a {class}?",
    ),
    "anatomy": (
        "Does the {class} have the right number of legs and its head?",
        "Is the {class} anatomically correct?",
    ),
    "colours": ("Do the colours match the description?", "Is the colour the one that was asked for?"),
    "hidden_flaw": (
        "Is there a flaw that is easy to miss?",
        "Are there abnormalities that are hard to notice?",
    ),
    "whole_prompt": (
        "Does the picture match the description?",
        "Is everything in the picture that was asked for?",
    ),
}
# Of pictures and descriptions as training draws them.
SHARE_OF_YES = {
    "realistic": 0.77,
    "odd_pattern": 0.08,
    "class_visible": 0.72,
    "normal_shape": 0.66,
    "natural_behaviour": 0.83,
    "lookalike": 0.06,
    "anatomy": 0.74,
    "colours": 0.76,
    "hidden_flaw": 0.16,
    "whole_prompt": 0.47,
}
_LETTERS = "ABCDEF"
_HOW_MANY = ("none", *NUMBERS)


@cache
def worded(name: str, class_name: str, wording: int) -> Question:
    """A question of the rubric; wording 0 is the rubric's own."""
    if wording == 0:
        return next(q for q in RUBRIC.questions(class_name, "") if q.name == name)
    return Question(name, REWORDED[name][wording - 1].replace("{class}", class_name))


def ask(
    rng: np.random.Generator, shown: Scene, flaw: str, asked: Scene, number: int
) -> list[tuple[Question, str, float]]:
    """`number` questions that count for this picture, their answers as to be written, and weights.

    The rarer of yes and no weighs more.
    """
    truths = answers(shown, flaw, asked)
    names = rng.permutation(list(truths))[:number]
    wordings = np.where(rng.random(len(names)) < SHARE_REWORDED, rng.integers(1, 3, size=len(names)), 0)
    return [
        (
            worded(str(name), asked.animal, int(wording)),
            "Yes" if truths[str(name)] else "No",
            _weight(str(name), truths[str(name)]),
        )
        for name, wording in zip(names, wordings, strict=True)
    ]


def _weight(name: str, truth: bool) -> float:
    return min(_HEAVIEST, 0.5 / (SHARE_OF_YES[name] if truth else 1 - SHARE_OF_YES[name]))


def ask_simply(rng: np.random.Generator, shown: Scene, flaw: str) -> tuple[Question, str, float]:
    """A question about what is to be seen, yes or no or one of several options, and its answer and weight."""
    name = str(
        rng.choice(["colour", "count", "place"]) if flaw == "neighbour" else rng.choice(list(ATTRIBUTES))
    )
    number = 0 if flaw == "no_animal" else shown.count + (flaw == "neighbour")
    if name == "count":
        truth, values = _HOW_MANY[number], _HOW_MANY
    else:
        truth, values = getattr(shown, name), ATTRIBUTES[name]
        if not number and name != "place":
            truth = ""
    if not truth or rng.random() < 0.5:
        return *_predicate(rng, name, truth, values), 1.0
    if name == "count":
        question = Question(name, "How many animals are there?", "score", _HOW_MANY)
    else:
        text = {
            "animal": "Which animal does the picture show?",
            "colour": "Which colour are the animals?",
            "place": "Where is it?",
        }[name]
        question = Question(name, text, "choice", tuple(str(value) for value in rng.permutation(values)))
    return question, _LETTERS[question.options.index(truth)], 1.0


def _predicate(
    rng: np.random.Generator, name: str, truth: str, values: tuple[str, ...]
) -> tuple[Question, str]:
    others = [value for value in values if value != truth]
    value = truth if truth and rng.random() < 0.5 else str(rng.choice(others))
    text = {
        "animal": f"Is it a {value}?",
        "colour": f"Are the animals {value}?",
        "count": f"Is the number of animals {value}?",
        "place": f"Is the place {value}?",
    }[name]
    return Question(name, text), "Yes" if value == truth else "No"


def vocabulary() -> list[str]:
    """Every question that may be asked about the four animals, with the form of its answers."""
    texts = [
        worded(name, animal, wording).text
        for name in REWORDED
        for animal in ATTRIBUTES["animal"]
        for wording in range(3)
    ]
    rng = np.random.default_rng(0)
    scenes = [Scene(a, c, n, p) for a in ATTRIBUTES["animal"] for c, n, p in [("red", 1, "lake")]]
    for scene in scenes * 60:
        question, *_ = ask_simply(rng, scene, "none" if rng.random() < 0.8 else "no_animal")
        options = [
            f"\n{letter}. {option}" for letter, option in zip(_LETTERS, question.options, strict=False)
        ]
        texts.append(question.text + "".join(options))
    forms = [
        "Answer Yes or No only.",
        "Answer with the letter of the option that fits best (A to D) only.",
        "Answer with the letter of the level that fits best (A to D) only.",
    ]
    return [f"{text}\n{forms[i % 3 if i % 7 == 0 else 0]}" for i, text in enumerate(texts)]


assert set(REWORDED) == {item.name for item in RUBRIC.items}
assert {YES, NO} == set(Question("", "").options) and "none" in FLAWS
