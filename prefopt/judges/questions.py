"""Typed questions about an image and its prompt, and a judge's answers to them as probabilities.

The three types are those of the System One API: a predicate (it calls them `noul`), a choice, a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Literal, Protocol

from PIL import Image

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


class Judge(Protocol):
    """Anything that answers questions; `identity` changes with all that its answers depend on."""

    identity: str

    def answer(self, cases: Sequence[Case]) -> list[list[Answer]]:
        """The answers of each case, in the order of its questions."""
        ...
