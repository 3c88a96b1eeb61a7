"""Rubrics: yes/no questions about an image as data, and the points that the answers make (arXiv 2405.13473).

A clear yes to a positive question and a clear no to a negative one are +weight, the opposite is -weight. An
unclear answer ('Nan'), and a question whose need was answered no, are 0. The hard score is the sum. The soft
score weighs how sure the judge is: the same sum with tanh(d / 2) in place of +-1, where d is the log-odds
minus the judge's log-odds for the same question about an empty image, so that a judge that likes to say yes
gains nothing by it. A question with `soft: log_odds` counts d itself: of a reward model the difference of two
images is what it has to say, and tanh is flat where its rewards lie (judges/reward.py).
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from graphlib import CycleError, TopologicalSorter
from math import tanh
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml

from prefopt.errors import InputError
from prefopt.judges.questions import NO, YES, Answer, Question
from prefopt.options import check_number, shown
from prefopt.yaml_files import read_yaml

RUBRICS = Path(__file__).with_name("rubrics")
Polarity = Literal["positive", "negative"]
Check = Literal["presence", "count", "colour"]  # a detector's, data_builders/images/detector_checks.py
Soft = Literal["tanh", "log_odds"]  # what is made of d
PLACEHOLDERS = ("{class}", "{prompt}")  # what a text's braces may hold
LONGEST_NAME = 100


@dataclass(frozen=True)
class Item:
    """One line of a rubric: a question to a judge (`text`) or to a detector (`check`)."""

    name: str
    polarity: Polarity
    text: str = ""
    check: Check | None = None
    weight: float = 1.0
    needs: tuple[str, ...] = ()
    soft: Soft = "tanh"

    @property
    def sign(self) -> int:
        """+1 if a yes is good."""
        return 1 if self.polarity == "positive" else -1


@dataclass(frozen=True)
class Rubric:
    """Items in order; needs come from any place of the list, but not in a circle."""

    name: str
    items: tuple[Item, ...]
    order: tuple[Item, ...] = field(init=False)  # every item after its needs

    def __post_init__(self) -> None:
        by_name = {item.name: item for item in self.items}
        if len(by_name) < len(self.items):
            names = [item.name for item in self.items]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"the rubric {self.name} names two questions {twice!r}; name each once")
        if not self.items:
            raise InputError(f"the rubric {self.name} has no questions")
        for item in self.items:
            for need in item.needs:
                if need not in by_name:
                    raise InputError(
                        f"the rubric {self.name}: {item.name!r} needs {need!r}, which is none of its "
                        f"questions; they are {', '.join(by_name)}"
                    )
        try:
            order = tuple(TopologicalSorter({i.name: i.needs for i in self.items}).static_order())
        except CycleError as error:
            circle = " -> ".join(error.args[1][:5])
            raise InputError(f"the rubric {self.name}: needs go in a circle, {circle}; cut it") from error
        object.__setattr__(self, "order", tuple(by_name[name] for name in order))

    @classmethod
    def load(cls, name_or_path: str) -> Self:
        """The rubric of a YAML file, or one of ours by its name: `class_conditional`."""
        own = {file.stem: file for file in sorted(RUBRICS.glob("*.yaml"))}
        path = own.get(name_or_path, Path(name_or_path))
        if not os.path.isfile(path):
            raise InputError(
                f"there is no rubric {shown(name_or_path)}; name a YAML file, or one of {', '.join(own)}"
            )
        entries = read_yaml(path)
        if not isinstance(entries, list):
            raise InputError(f"the rubric {path} is no list of questions, each with name, text and polarity")
        return cls(
            path.stem, tuple(_item(entry, f"{path}, question {i + 1}") for i, entry in enumerate(entries))
        )

    def as_yaml(self) -> str:
        """The rubric as the text of a file that `load` reads."""
        entries = []
        for item in self.items:
            # A weight is shown in any case, so that a reader sees what counts.
            given = {f.name: getattr(item, f.name) for f in fields(item)}
            shown = {f.name: given[f.name] for f in fields(item) if given[f.name] != f.default}
            needs = {"needs": list(item.needs)} if item.needs else {}
            entries.append({**shown, "weight": item.weight, **needs})
        return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=100)

    def weighed(self, weights: Sequence[str]) -> Self:
        """The rubric with other weights, as `whole_prompt=4`; InputError for what it has no question of."""
        parts = [text.partition("=") for text in weights]
        given = {name: weight for name, _, weight in parts}
        if len(given) < len(weights) or not all("=" in text for text in weights):
            raise InputError(f"--question_weights {' '.join(weights)}: write name=weight, each name once")
        names = [item.name for item in self.items]
        if unknown := [name for name in given if name not in names]:
            raise InputError(
                f"--question_weights: {unknown[0]!r} is no question of the rubric {self.name}: they are "
                + ", ".join(names)
            )
        weighed = {
            name: _weight(_number(text), f"--question_weights {name}={text}") for name, text in given.items()
        }
        items = (replace(item, weight=weighed.get(item.name, item.weight)) for item in self.items)
        return type(self)(self.name, tuple(items))

    def questions(self, class_name: str, prompt: str) -> tuple[Question, ...]:
        """The judge's questions about an image of this class, made for this prompt."""
        return tuple(
            Question(item.name, item.text.replace("{class}", class_name).replace("{prompt}", prompt))
            for item in self.items
            if item.check is None
        )

    @property
    def checks(self) -> tuple[Item, ...]:
        """The items that a detector answers."""
        return tuple(item for item in self.items if item.check is not None)

    @property
    def needs_class(self) -> bool:
        """Whether a question names the class of the image."""
        return any("{class}" in item.text for item in self.items)

    @property
    def soft_decides(self) -> bool:
        """Whether it has one question, so that the hard score tells yes from no and little else."""
        return len(self.items) == 1

    def points(self, verdicts: Mapping[str, str | None]) -> dict[str, float]:
        """Points by question, in the rubric's order, of the answers yes, no or None (unclear)."""
        return self._points(
            {name: {YES: 1.0, NO: -1.0, None: 0.0}[v] for name, v in verdicts.items()}, verdicts
        )

    def soft_points(
        self, answers: Mapping[str, Answer], empty: Mapping[str, Answer] | None = None
    ) -> dict[str, float]:
        """Points by question: how much surer the answers are than about nothing.

        They lie in -weight..weight, but for `soft: log_odds`, which has no bounds. What `empty` has no answer
        to, as the detector's checks, counts as it is.
        """
        nothing = {name: answer.log_odds for name, answer in (empty or {}).items()}
        strength = {name: answer.log_odds - nothing.get(name, 0.0) for name, answer in answers.items()}
        for item in self.items:
            if item.soft == "tanh" and item.name in strength:
                strength[item.name] = tanh(strength[item.name] / 2)
        return self._points(strength, {name: answer.verdict for name, answer in answers.items()})

    def _points(self, strength: Mapping[str, float], verdicts: Mapping[str, str | None]) -> dict[str, float]:
        missing = [item.name for item in self.items if item.name not in verdicts]
        if missing:
            raise ValueError(f"no answer to {', '.join(missing)}")
        # Whether a question counts: all its needs count, and none was answered no.
        asked: dict[str, bool] = {}
        for item in self.order:
            asked[item.name] = all(asked[need] and verdicts[need] != NO for need in item.needs)
        return {
            item.name: item.sign * item.weight * strength[item.name]
            if asked[item.name] and verdicts[item.name] is not None
            else 0.0
            for item in self.items
        }


def best(scores: Sequence[float]) -> list[int]:
    """The places of the highest score: more than one if they tie."""
    return [place for place, score in enumerate(scores) if score == max(scores)]


def _item(entry: Any, where: str) -> Item:
    known = ("name", "text", "check", "polarity", "weight", "needs", "soft")
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {shown(entry)}, not a mapping with name, text and polarity")
    if unknown := sorted(set(map(str, entry)) - set(known)):
        raise InputError(f"{where} has the unknown entry {shown(unknown[0])}; known are {', '.join(known)}")
    name, text, check = entry.get("name"), entry.get("text", ""), entry.get("check")
    if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME:
        raise InputError(
            f"{where}: the name is {shown(name)}; it is a text of 1 to {LONGEST_NAME} characters"
        )
    if not isinstance(text, str) or bool(text) == bool(check):
        raise InputError(f"{where} ({name}) needs a text for a judge or a check for a detector, one of them")
    if strange := [part for part in re.findall(r"\{[^{}]*\}|[{}]", text) if part not in PLACEHOLDERS]:
        raise InputError(
            f"{where} ({name}): the text has {strange[0]}, and nothing is filled in for it; write "
            f"{' or '.join(PLACEHOLDERS)}, or no braces"
        )
    if check is not None and check not in get_args(Check):
        raise InputError(f"{where} ({name}): the check is {shown(check)}; it is {', '.join(get_args(Check))}")
    if entry.get("polarity") not in get_args(Polarity):
        raise InputError(
            f"{where} ({name}): polarity is {shown(entry.get('polarity'))}; positive or negative"
        )
    weight, needs = _weight(entry.get("weight", 1.0), f"{where} ({name})"), entry.get("needs", [])
    if not isinstance(needs, list) or not all(isinstance(need, str) for need in needs):
        raise InputError(f"{where} ({name}): needs is {shown(needs)}; it is a list of names")
    soft = entry.get("soft", "tanh")
    if soft not in get_args(Soft) or (check and soft != "tanh"):
        raise InputError(f"{where} ({name}): soft is {shown(soft)}; it is tanh, or for a text also log_odds")
    return Item(name, entry["polarity"], text, check, weight, tuple(needs), soft)


def _weight(value: Any, where: str) -> float:
    check_number(f"{where}: the weight", value, "(0, 1e6]")
    return float(value)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
