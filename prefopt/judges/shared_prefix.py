"""All questions about an image in one row, which is read once: little more than one forward pass.

The questions of cases that follow one another and show the same image share its row, whatever their
descriptions are: a pair of answers in both orders costs one image.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from PIL import Image

from prefopt.errors import InputError
from prefopt.judges.decision import VlmAnswerer
from prefopt.judges.questions import Answer, Case, Question
from prefopt.vlm.rows import SharedPrefix, next_token_logits, split_prefix, unshareable

LONGEST_ROW = 32  # questions of several cases in a row: its mask grows with the square of their tokens


class SharedPrefixJudge:
    """Reads an image once and then all questions about it in one pass, `batch_size` images at a time.

    `model` is a VlmAnswerer, or the name of a model, with `loading` for the rest of VlmAnswerer's arguments.
    InputError if the model cannot read several questions in one row; DecisionJudge takes any.
    """

    def __init__(self, model: str | VlmAnswerer = "pocket", *, batch_size: int = 4, **loading: Any):
        self.answerer = model if isinstance(model, VlmAnswerer) else VlmAnswerer(model, **loading)
        if reason := cannot_share(self.answerer):
            raise InputError(f"{self.answerer.name} cannot answer several questions at once: {reason}")
        self.identity = self.answerer.identity
        self.batch_size = batch_size

    def answer(self, cases: Sequence[Case]) -> list[list[Answer]]:
        """The answers of each case, in the order of its questions."""
        answers: list[list[Answer]] = [[] for _ in cases]
        rows = _by_image(cases)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            found = self._batch([[cases[place] for place in places] for places in batch])
            for place, of_case in zip(chain(*batch), found, strict=True):
                answers[place] = of_case
        return answers

    def _batch(self, rows: Sequence[Sequence[Case]]) -> list[list[Answer]]:
        """The answers of each case of some rows."""
        shared, parsed = [], []
        for cases in rows:
            row, questions = _row(self.answerer, cases)
            shared.append(row)
            parsed += questions
        logits = torch.cat(next_token_logits(self.answerer.model, shared))
        cases = [case for row in rows for case in row]
        scores = logits.split([len(questions) for questions in parsed])
        return [
            self.answerer.read(case.questions, questions, of_case)
            for case, questions, of_case in zip(cases, parsed, scores, strict=True)
        ]


def _by_image(cases: Sequence[Case]) -> list[list[int]]:
    """The places of the cases with questions, row by row: neighbours that show the same image share one."""
    rows: list[list[int]] = []
    length = 0
    for place, case in enumerate(cases):
        if not case.questions:
            continue
        length += len(case.questions)
        if rows and cases[rows[-1][-1]].image is case.image and length <= LONGEST_ROW:
            rows[-1].append(place)
        else:
            rows.append([place])
            length = len(case.questions)
    return rows


def _row(answerer: VlmAnswerer, cases: Sequence[Case]) -> tuple[SharedPrefix, list[list[Any]]]:
    """The prompts of cases that show one image, split where they differ; each case's parsed questions."""
    prompts = [answerer.prompts(case, same_image=place > 0) for place, case in enumerate(cases)]
    texts = [
        {name: value for name, value in inputs.items() if name != "marks"}
        for of_case in prompts
        for inputs, _ in of_case
    ]
    row = split_prefix(texts, answerer.model.config.image_token_id)
    return row, [[one for _, questions in of_case for one in questions] for of_case in prompts]


def cannot_share(answerer: VlmAnswerer) -> str | None:
    """Why model, template or processor do not allow several questions in one row; None if they do."""
    if reason := unshareable(answerer.model.config):
        return reason
    if answerer.decision.chat_template is not None:
        return "it has a decision template of its own"
    image = Image.new("RGB", (64, 64))
    cases = [Case(image, text, (Question("first", f"{text}?"),)) for text in ("One", "Two")]
    row, _ = _row(answerer, cases)
    if any((suffix == answerer.model.config.image_token_id).any() for suffix in row.suffixes):
        return "its chat template writes the question before the image, so that no beginning is shared"
    return None
