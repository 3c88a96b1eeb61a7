"""What a critic grades and compares, in which words it is asked, and what comes back.

The words are text files of a folder: `score.txt` and `compare.txt`, and for cases with a reference answer
`score_with_reference.txt` and `compare_with_reference.txt`. A place such as {question} is filled in with the
case's text, once: nothing in a text is read as a place or as code.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from typing import Protocol, Self

from PIL import Image

from prefopt.errors import InputError

CRITICS = Path(__file__).with_name("critics")
PLACES = {"score": ("question", "answer"), "compare": ("question", "first", "second")}
REFERENCE = "reference"
PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class ScoreCase:
    """An answer to grade; `reference` is an answer known to be right."""

    images: Sequence[Image.Image]
    question: str
    answer: str
    reference: str | None = None


@dataclass(frozen=True)
class PairCase:
    """Two answers to compare; `reference` is an answer known to be right."""

    images: Sequence[Image.Image]
    question: str
    first: str
    second: str
    reference: str | None = None

    @property
    def swapped(self) -> Self:
        """The same in the other order."""
        return replace(self, first=self.second, second=self.first)


@dataclass(frozen=True)
class Preference:
    """How likely the first answer is the better one, over both orders of the two."""

    p_first: float  # in 0..1, by the mean log-odds of both orders: a liking for one place cancels out
    consistent: bool  # both orders prefer the same answer, or neither of the two

    @classmethod
    def of(cls, straight: float | None, swapped: float | None) -> Self | None:
        """The preference from the p of whatever answer stood first, in each order; None without both.

        A verdict of 0 or 1 has no log-odds: with one, it is the mean of both orders' p.
        """
        if straight is None or swapped is None:
            return None
        one, other = straight - 0.5, 0.5 - swapped  # both towards the case's first answer
        agree = (one > 0) == (other > 0) and (one < 0) == (other < 0)
        if not (0 < straight < 1 and 0 < swapped < 1):
            return cls(0.5 + (one + other) / 2, agree)
        log_odds = (log(straight / (1 - straight)) - log(swapped / (1 - swapped))) / 2
        return cls(1 / (1 + exp(-log_odds)), agree)


class Critic(Protocol):
    """Grades and compares answers; `identity` changes with all that its judgement depends on."""

    identity: str

    def score(self, cases: Sequence[ScoreCase]) -> list[float | None]:
        """A score in 0..100 of each answer; None where the critic's own could not be read."""
        ...

    def compare(self, cases: Sequence[PairCase]) -> list[Preference | None]:
        """Which answer of each pair is better, asked in both orders; None where one could not be read."""
        ...


@dataclass(frozen=True)
class Templates:
    """The words of a critic, by the names of their files without `.txt`."""

    folder: Path
    texts: Mapping[str, str]

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder's templates; InputError for a file or a place of an unknown name, or one missing."""
        folder = Path(folder)
        known = {f"{kind}{end}" for kind in PLACES for end in ("", f"_with_{REFERENCE}")}
        try:
            texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the templates of {folder} cannot be read: {error}") from error
        names = ", ".join(f"{name}.txt" for name in sorted(known))
        if not texts:
            raise InputError(f"{folder} is no folder of templates; those are {names}")
        for name, text in texts.items():
            if name not in known:
                raise InputError(f"{folder / name}.txt is no template of a critic; those are {names}")
            _check_places(f"{folder / name}.txt", text, _places(name))
        return cls(folder, texts)

    def words(self, case: ScoreCase | PairCase) -> str:
        """What a critic is told about a case; InputError if there is no template for it."""
        name = "score" if isinstance(case, ScoreCase) else "compare"
        name += "" if case.reference is None else f"_with_{REFERENCE}"
        if name not in self.texts:
            raise InputError(
                f"{self.folder} has no {name}.txt, which this case needs: {case.question[:60]!r}; add that "
                f"file{'' if case.reference is None else ', or leave the reference answer out'}"
            )
        return PLACE.sub(lambda place: str(getattr(case, place[1])), self.texts[name]).strip()


def _places(name: str) -> set[str]:
    kind, _, with_reference = name.partition("_with_")
    return {*PLACES[kind], *([REFERENCE] if with_reference else [])}


def _check_places(file: str, text: str, places: set[str]) -> None:
    found, listed = set(PLACE.findall(text)), ", ".join(f"{{{place}}}" for place in sorted(places))
    if unknown := sorted(found - places):
        raise InputError(f"{file} has the place {{{unknown[0]}}}; its places are {listed}")
    if missing := sorted(places - found):
        raise InputError(f"{file} has no place {{{missing[0]}}}; its places are {listed}")
