"""All questions about an image in one row, which is read once: little more than one forward pass."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from prefopt.errors import InputError
from prefopt.judges.decision import VlmAnswerer
from prefopt.judges.questions import Answer, Case, Question
from prefopt.vlm.rows import SharedPrefix, next_token_logits, split_prefix, unshareable


class SharedPrefixJudge:
    """Reads image and description once and then all questions in one pass, `batch_size` images at a time.

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
        asked = [place for place, case in enumerate(cases) if case.questions]
        for start in range(0, len(asked), self.batch_size):
            places = asked[start : start + self.batch_size]
            for place, found in zip(places, self._batch([cases[place] for place in places]), strict=True):
                answers[place] = found
        return answers

    def _batch(self, cases: Sequence[Case]) -> list[list[Answer]]:
        rows, parsed = [], []
        for case in cases:
            row, questions = _row(self.answerer, case)
            rows.append(row)
            parsed.append(questions)
        logits = next_token_logits(self.answerer.model, rows)
        return [
            self.answerer.read(case.questions, questions, scores)
            for case, questions, scores in zip(cases, parsed, logits, strict=True)
        ]


def _row(answerer: VlmAnswerer, case: Case) -> tuple[SharedPrefix, list[Any]]:
    """A case's prompts, split where they differ, and its questions as transformers parsed them."""
    prompts = answerer.prompts(case)
    texts = [{name: value for name, value in inputs.items() if name != "marks"} for inputs, _ in prompts]
    row = split_prefix(texts, answerer.model.config.image_token_id)
    return row, [question for _, questions in prompts for question in questions]


def cannot_share(answerer: VlmAnswerer) -> str | None:
    """Why model, template or processor do not allow several questions in one row; None if they do."""
    if reason := unshareable(answerer.model.config):
        return reason
    if answerer.decision.chat_template is not None:
        return "it has a decision template of its own"
    questions = Question("first", "One?"), Question("second", "Two?")
    row, _ = _row(answerer, Case(Image.new("RGB", (64, 64)), "", questions))
    if any((suffix == answerer.model.config.image_token_id).any() for suffix in row.suffixes):
        return "its chat template writes the question before the image, so that no beginning is shared"
    return None
