"""Typed questions about an image and its prompt, and a judge's answers to them as probabilities.

The three types are those of the System One API: a predicate (it calls them `noul`), a choice, a score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import inf, log
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from prefopt.errors import InputError
from prefopt.images import open_image

YES, NO = "yes", "no"


@dataclass(frozen=True)
class Question:
    """One question; the options of a predicate are yes and no, those of a score its levels, lowest first."""

    name: str
    text: str
    type: Literal["predicate", "choice", "score"] = "predicate"
    options: tuple[str, ...] = (YES, NO)


@dataclass(frozen=True)
class Case:
    """One image with the prompt it was made for, and what is asked about it."""

    image: Image.Image
    prompt: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answer:
    """A judge's answer to one question, as a probability for each option."""

    probabilities: dict[str, float]  # option -> p; they sum to 1
    # The share of the next token's probability on anything but the options; 0 if unknown.
    other_mass: float = 0.0

    @property
    def log_odds(self) -> float:
        """The natural logarithm of p(yes) / p(no) of a predicate."""
        yes, no = self.probabilities[YES], self.probabilities[NO]
        return (log(yes) if yes else -inf) - (log(no) if no else -inf)

    @property
    def verdict(self) -> str | None:
        """The likeliest option; None ('Nan') if it ties, or if most of the mass is on other tokens."""
        if self.other_mass > 0.5:
            return None
        best = max(self.probabilities.values())
        winners = [option for option, p in self.probabilities.items() if p == best]
        return winners[0] if len(winners) == 1 else None


def system_one(questions: Sequence[Question], prompt: str, image: object) -> dict[str, Any]:
    """The System One request: the image, then `Description:` and the prompt, then each question.

    Two questions of one name, or two equal options, are an InputError.
    """
    names = [question.name for question in questions]
    if len(set(names)) < len(names):
        raise InputError(f"of the questions {', '.join(names)} two share a name; name each once")
    # A text that holds the placeholder would show the image wherever it likes.
    texts = "\n".join([prompt, *(f"{q.text}\n{q.options}" for q in questions)])
    placeholder = next(p for n in count() if (p := f"<image-{n}>") not in texts)
    return {
        "state": f"{placeholder}\nDescription: {prompt}",
        "questions": {question.name: _system_one_question(question) for question in questions},
        "assets": {placeholder: image},
    }


def _system_one_question(question: Question) -> dict[str, Any]:
    if question.type == "predicate":
        return {"type": "noul", "instructions": question.text}
    if len(set(question.options)) < len(question.options):
        raise InputError(f"{question.name} has two equal options: {', '.join(question.options)}")
    named = question.type == "choice"
    criteria = dict.fromkeys(question.options) if named else list(question.options)
    return {"type": question.type, "instructions": question.text, "criteria": criteria}


class Judge(Protocol):
    """Anything that answers questions; `identity` changes with all that its answers depend on."""

    identity: str

    def answer(self, cases: Sequence[Case]) -> list[list[Answer]]:
        """The answers of each case, in the order of its questions."""
        ...


def ask(
    judge: Judge,
    image: Image.Image | str | Path,
    questions: str | Question | Sequence[str | Question],
    prompt: str = "",
) -> dict[str, Answer]:
    """A judge's answers about one image, by question: by the text of a yes/no question, or a Question's name.

    The image is in RGB, or a file. `prompt` is what it was made for; the judge reads it as a description.
    """
    if not isinstance(image, Image.Image):
        try:
            content = Path(image).read_bytes()
        except OSError as error:
            raise InputError(f"no image could be read from {image}: {error}; name an image file") from error
        image = open_image(content, str(image))
    several = [questions] if isinstance(questions, str | Question) else questions
    asked = tuple(one if isinstance(one, Question) else Question(one, one) for one in several)
    (answers,) = judge.answer([Case(image, prompt, asked)])
    return {question.name: answer for question, answer in zip(asked, answers, strict=True)}
