"""Critics of answers (after arXiv 2410.02712): a score of 0..100 for one, and which of two is better.

TextCritic lets a vision-language model write and reads its text; TypedCritic asks a judge typed questions and
reads probabilities. Both compare in both orders. What cannot be read is counted and is None: never a score,
and never a win for the answer that happened to stand first.
"""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.judges.critic_cases import CRITICS, PairCase, Preference, ScoreCase, Templates
from prefopt.judges.questions import Answer, Case, Judge, Question
from prefopt.judges.replies import read_preference, read_score
from prefopt.judges.writers import Message, Reply, Writer

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

TEXT, TYPED = CRITICS / "text", CRITICS / "typed"
QUALITY = Question(
    "quality",
    "How good is the answer to the question?",
    "score",
    ("useless or entirely wrong", "mostly wrong", "partly right", "mostly right", "right and complete"),
)
BETTER = Question(
    "better",
    "Which answer to the question is better?",
    "choice",
    ("the first answer", "the second answer"),
)
EXAMPLE = 300  # characters from the end of an unread reply, for a message
P_FIRST = {"first": 1.0, "tie": 0.5, "second": 0.0}


class Readings:
    """How many replies a critic gave, and how many could not be read, with the first few of these."""

    def __init__(self, critic: str):
        self.critic = critic
        self.asked = self.unreadable = 0
        self.examples: list[str] = []

    def count(self, unread: Sequence[str | None]) -> None:
        """Count replies: None for one that was read, else its text. InputError if none ever was."""
        texts = [text for text in unread if text is not None]
        self.asked += len(unread)
        self.unreadable += len(texts)
        self.examples += texts[: 3 - len(self.examples)]
        if not texts:
            return
        if self.unreadable == self.asked:
            raise InputError(
                f"none of the {self.asked} replies of {self.critic} could be read, such as "
                f"{self.examples[0]!r}; use another critic, or templates that ask for another form"
            )
        logger.warning(
            "%s: %d of %d replies so far could not be read; they count as no score and no preference",
            self.critic,
            self.unreadable,
            self.asked,
        )


class TextCritic:
    """A critic that writes its judgement, in the words of its templates; `readings` counts what was read.

    A reply that was cut off at its longest length is not read: its score might have lost a digit.
    """

    def __init__(self, writer: Writer, templates: Templates | None = None):
        self.writer, self.templates = writer, templates or Templates.load(TEXT)
        self.identity = critic_identity(writer.identity, self.templates)
        self.readings = Readings(writer.name)

    def score(self, cases: Sequence[ScoreCase]) -> list[float | None]:
        """A score in 0..100 of each answer; None where the critic's own could not be read."""
        return self._read(cases, read_score)

    def compare(self, cases: Sequence[PairCase]) -> list[Preference | None]:
        """Which answer of each pair is better, asked in both orders; None where one could not be read."""
        verdicts = self._read(in_both_orders(cases), read_preference)
        return _preferences([P_FIRST[verdict] if verdict else None for verdict in verdicts])

    def _read(self, cases: Sequence[Any], read: Callable[[str], Value | None]) -> list[Value | None]:
        replies = self.writer.write([Message(case.images, self.templates.words(case)) for case in cases])
        values = [read(reply.text) if reply.finished else None for reply in replies]
        self.readings.count(
            [self._text(r) if v is None else None for r, v in zip(replies, values, strict=True)]
        )
        return values

    def _text(self, reply: Reply) -> str:
        cut = "" if reply.finished else f" [cut off after {self.writer.max_new_tokens} tokens]"
        return f"{reply.text[-EXAMPLE:]}{cut}"


class TypedCritic:
    """A critic that asks a judge typed questions: a score is the expected level, a preference a probability.

    `readings` counts the answers that lie on other tokens than the options. A judge sees one image.
    """

    def __init__(self, judge: Judge, templates: Templates | None = None):
        self.judge, self.templates = judge, templates or Templates.load(TYPED)
        self.identity = typed_identity(judge.identity, self.templates)
        self.readings = Readings(f"the judge {judge.identity}")

    def score(self, cases: Sequence[ScoreCase]) -> list[float | None]:
        """The expected level of each answer, from 0 for the lowest to 100; None without a clear answer."""
        step = 100 / (len(QUALITY.options) - 1)
        levels = {level: step * place for place, level in enumerate(QUALITY.options)}
        return [
            sum(p * levels[level] for level, p in answer.probabilities.items()) if answer else None
            for answer in self._answers(cases, QUALITY)
        ]

    def compare(self, cases: Sequence[PairCase]) -> list[Preference | None]:
        """How likely the first answer of each pair is the better one, asked in both orders."""
        answers = self._answers(in_both_orders(cases), BETTER)
        first = BETTER.options[0]
        return _preferences([answer.probabilities[first] if answer else None for answer in answers])

    def _answers(self, cases: Sequence[Any], question: Question) -> list[Answer | None]:
        """The judge's answers; None for one that it did not give by the options."""
        given = self.judge.answer([self._case(case, question) for case in cases])
        clear = [answer if answer.other_mass <= 0.5 else None for (answer,) in given]
        self.readings.count([str(g) if c is None else None for (g,), c in zip(given, clear, strict=True)])
        return clear

    def _case(self, case: Any, question: Question) -> Case:
        if (count := len(case.images)) != 1:
            raise InputError(
                f"a typed critic shows its judge one image, and {case.question[:60]!r} has {count}; take a "
                "critic that writes"
            )
        return Case(case.images[0], self.templates.words(case), (question,))


def critic_identity(writer: str, templates: Templates) -> str:
    """What a critic that writes depends on: its writer's identity, and the words."""
    return f"critic {content_key(json.dumps([writer, dict(templates.texts)]))}"


def typed_identity(judge: str, templates: Templates) -> str:
    """What a critic that answers typed questions depends on: its judge's identity, and all words."""
    asked = [[question.text, question.options] for question in (QUALITY, BETTER)]
    return f"typed critic {content_key(json.dumps([judge, dict(templates.texts), asked]))}"


def in_both_orders(cases: Sequence[PairCase]) -> list[PairCase]:
    """Each case, and behind it the same with its answers swapped."""
    return [ordered for case in cases for ordered in (case, case.swapped)]


def _preferences(p_first: Sequence[float | None]) -> list[Preference | None]:
    """From the p of the answer that stood first, for each case in both orders."""
    return [Preference.of(*p_first[at : at + 2]) for at in range(0, len(p_first), 2)]
