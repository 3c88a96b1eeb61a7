"""Answers for the pocket's critic to grade: right, wrong in one respect or in more, cut off, garbled.

What is right about an answer is known, since all are made from the facts of the right one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from prefopt.pocket.questions import Asked, answers_to
from prefopt.pocket.world import ATTRIBUTES, NUMBERS, WHERE, Scene

RIGHT = 4  # the highest level
_LEVELS = (RIGHT, 2, 1, 0)  # by the number of facts that are wrong
INCOMPLETE = 3
REFUSALS = ("I cannot tell.", "I do not know.", "The picture is not clear.", "I cannot see it.", "No answer")
_COUNTS = {"No": 0, **{word: count for count, word in NUMBERS.items()}}
_PLACES = {words: place for place, words in WHERE.items()}
_SHARES = {
    "right": 0.4,
    "one_off": 0.34,
    "more_off": 0.08,
    "cut_off": 0.05,
    "reworded": 0.05,
    "garbled": 0.08,
}


class Facts(NamedTuple):
    """What an answer says."""

    count: int  # 0: there are none
    colour: str | None  # None: the question asks for no colour
    animal: str
    place: str


class Graded(NamedTuple):
    """An answer with what is to be said of it."""

    text: str
    level: int  # 0..4, the options of the critic's question for a score
    truths: dict[str, bool]  # of the predicates that count, by their names
    words: list[tuple[int, bool]]  # where a word ends that tells a fact, and whether the fact is true


def facts_of(answer: str) -> Facts:
    """The facts of an answer in the form of the pocket's questions."""
    where = next(words for words in _PLACES if answer.endswith(words))
    count, *colour, noun = answer.removesuffix(where).split()
    animal = next(animal for animal in ATTRIBUTES["animal"] if noun in (animal, f"{animal}s"))
    return Facts(_COUNTS[count], colour[0] if colour else None, animal, _PLACES[where])


def draw_answer(rng: np.random.Generator, asked: Asked) -> Graded:
    """An answer to a question, of a kind drawn at random."""
    kind = str(rng.choice(list(_SHARES), p=list(_SHARES.values())))
    return _MAKERS[kind](rng, asked)


def right_answer(_: np.random.Generator, asked: Asked) -> Graded:
    """The right one."""
    return _in_form(asked, asked.answer)


def one_off(rng: np.random.Generator, asked: Asked) -> Graded:
    """An answer that the question admits, with one wrong fact; a wrong colour is often the other group's."""
    off = answers_off(asked)
    fact = str(rng.choice(sorted(off)))
    wrong = off[fact]
    other = {scene.colour for scene in asked.duo}
    tempting = [answer for answer in wrong if fact == "colour" and facts_of(answer).colour in other]
    pool = tempting if tempting and rng.random() < 0.5 else wrong
    return _in_form(asked, pool[rng.integers(len(pool))])


def answers_off(asked: Asked) -> dict[str, list[str]]:
    """Answers that the question admits with one wrong fact, by that fact."""
    found = dict[str, list[str]]()
    for answer in answers_to(asked.question):
        wrong = wrong_facts(answer, asked.answer)
        if len(wrong) == 1:
            found.setdefault(wrong[0], []).append(answer)
    return found


def wrong_facts(answer: str, right: str) -> list[str]:
    """Which facts of an answer are not those of the right one."""
    said, truth = facts_of(answer), facts_of(right)
    return [name for name in Facts._fields if getattr(said, name) != getattr(truth, name)]


def _more_off(rng: np.random.Generator, asked: Asked) -> Graded:
    """Any answer that the question admits, or any that tells of the other group."""
    truth = facts_of(asked.answer)
    other = asked.duo[rng.integers(2)]
    told = Facts(other.count, truth.colour and other.colour, other.animal, truth.place)
    pool = [answer for answer in answers_to(asked.question) if answer != asked.answer]
    about_other = rng.random() < 0.5 and told != truth
    return _in_form(asked, _text(told) if about_other else pool[rng.integers(len(pool))])


def _cut_off(rng: np.random.Generator, asked: Asked) -> Graded:
    """The right answer without its end, but with its animal."""
    words = asked.answer.split()
    least = 3 if facts_of(asked.answer).colour else 2
    text = " ".join(words[: rng.integers(least, len(words))])
    truths = {"correctness": True, "steerability": False, "helpfulness": True}
    return Graded(text, INCOMPLETE, truths | _SINCERE | {"hallucination": False}, [])


def _reworded(rng: np.random.Generator, asked: Asked) -> Graded:
    """As the LLaVA describes pictures, right or not."""
    facts = facts_of((right_answer if rng.random() < 0.5 else one_off)(rng, asked).text)
    count = next(word for word, number in _COUNTS.items() if number == facts.count)
    noun = facts.animal if facts.count == 1 else f"{facts.animal}s"
    forms = [f"{count} {noun}, {facts.place}", f"{facts.place}: {count} {noun}"]
    if facts.colour:
        forms = [
            f"{count} {noun}, {facts.colour}, {facts.place}",
            f"{facts.place}: {count} {facts.colour} {noun}",
        ]
    graded = _in_form(asked, _text(facts))
    level = min(graded.level, INCOMPLETE)
    truths = graded.truths | {"steerability": False}
    truths.pop("right")
    return Graded(forms[rng.integers(2)], level, truths, [])


def _garbled(rng: np.random.Generator, asked: Asked) -> Graded:
    """What an undertrained model writes, or a refusal."""
    if rng.random() < 0.3:
        refused = {"right": False, "steerability": False, "helpfulness": False, "refusal": True}
        return Graded(str(rng.choice(REFUSALS)), 0, refused, [])
    words = one_off(rng, asked).text.split() if rng.random() < 0.5 else asked.answer.split()
    luck = rng.integers(4)
    if luck == 0:
        text = str(rng.choice(["Yes", "No", "A", "B", "C", "D"]))
    elif luck == 1:
        text = " ".join(words[i] for i in rng.permutation(len(words)))
    elif luck == 2:
        text = " ".join(word for word in words for _ in range(rng.integers(1, 4)))
    else:
        text = " ".join(words[: rng.integers(0, 2)]) + str(rng.choice(["Yes", "ree", "No the", " 1", ""]))
    if text == asked.answer:
        return right_answer(rng, asked)
    return Graded(text, 0, _USELESS, [])


_SINCERE = {"refusal": False}
_USELESS = {"right": False, "correctness": False, "steerability": False, "helpfulness": False, **_SINCERE}


def _in_form(asked: Asked, text: str) -> Graded:
    """An answer that has the form asked for, as far as it tells of what was asked."""
    said, wrong = facts_of(text), wrong_facts(text, asked.answer)
    right = not wrong
    truths = {"right": right, "correctness": right, "helpfulness": right}
    truths |= {
        "steerability": text in answers_to(asked.question),
        "hallucination": not _shown(said, asked.duo),
    }
    return Graded(text, _LEVELS[min(len(wrong), 3)], truths | _SINCERE, _marks(text, said, wrong))


def _shown(said: Facts, duo: tuple[Scene, Scene]) -> bool:
    """Whether the picture shows all that is named, whatever is said of it."""
    colours, animals = {scene.colour for scene in duo}, {scene.animal for scene in duo}
    there = said.animal in animals or not said.count
    return there and said.place == duo[0].place and (said.colour is None or said.colour in colours)


def _marks(text: str, said: Facts, wrong: list[str]) -> list[tuple[int, bool]]:
    names = [name for name in Facts._fields if getattr(said, name) is not None]
    ends, end = [], 0
    for word in text.split():
        end += len(word)
        ends.append(end)
        end += 1
    # The place is told by the last word.
    return [
        (end, name not in wrong) for name, end in zip(names, [*ends[: len(names) - 1], ends[-1]], strict=True)
    ]


def _text(facts: Facts) -> str:
    count = next(word for word, number in _COUNTS.items() if number == facts.count)
    noun = facts.animal if facts.count == 1 else f"{facts.animal}s"
    return " ".join(filter(None, (count, facts.colour, noun, WHERE[facts.place])))


_MAKERS: dict[str, Callable[[np.random.Generator, Asked], Graded]] = {
    "right": right_answer,
    "one_off": one_off,
    "more_off": _more_off,
    "cut_off": _cut_off,
    "reworded": _reworded,
    "garbled": _garbled,
}
