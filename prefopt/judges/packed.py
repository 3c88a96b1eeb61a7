"""All questions about an image from one reading of it, at little more than the price of one forward pass."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from prefopt.judges.decision import DecisionJudge, Respondent
from prefopt.judges.questions import Answer, Case, Question
from prefopt.judges.reward import RewardJudge, reward_type
from prefopt.records import InputError
from prefopt.vlm.packed import Forked, fork, next_token_logits, unpackable

logger = logging.getLogger(__name__)


class PackedJudge:
    """Reads image and description once and then all questions in one pass, `batch_size` images at a time.

    `model` is a Respondent, or what makes one: a name or folder, and `loading` the rest. InputError if the
    model is none that can be asked so; DecisionJudge asks any.
    """

    def __init__(self, model: str | Respondent = "pocket", *, batch_size: int = 4, **loading: Any):
        self.respondent = model if isinstance(model, Respondent) else Respondent(model, **loading)
        if reason := _unpackable(self.respondent):
            raise InputError(f"{self.respondent.name} cannot answer several questions at once: {reason}")
        self.identity = self.respondent.identity
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
            row, questions = _forked(self.respondent, case)
            rows.append(row)
            parsed.append(questions)
        logits = next_token_logits(self.respondent.model, rows)
        return [
            self.respondent.read(case.questions, questions, scores)
            for case, questions, scores in zip(cases, parsed, logits, strict=True)
        ]


def load_judge(
    model_name_or_path: str = "pocket",
    revision: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    batch_size: int = 4,
    attn_implementation: str = "sdpa",
    bare_labels: bool = False,
) -> PackedJudge | DecisionJudge | RewardJudge:
    """A judge of a folder, a hub id or `pocket`: packed if the model can be, else one question at a time.

    The log says why not. `bare_labels` counts only `Yes` and `No` themselves, as DecisionPipeline does. A
    reward model becomes a RewardJudge, for which only device and batch size are to be chosen.
    """
    if reward_type(model_name_or_path, revision):
        if dtype != torch.float32:
            raise InputError(
                f"{model_name_or_path} is a reward model, which is run in float32, not in {dtype}: the "
                "digits by which two images differ would be lost; leave --judge_dtype out"
            )
        return RewardJudge(model_name_or_path, revision, device=device, batch_size=batch_size)
    respondent = Respondent(
        model_name_or_path,
        revision,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        bare_labels=bare_labels,
    )
    if reason := _unpackable(respondent):
        logger.warning("%s is asked one question at a time: %s", respondent.name, reason)
        return DecisionJudge(respondent)
    return PackedJudge(respondent, batch_size=batch_size)


def _forked(respondent: Respondent, case: Case) -> tuple[Forked, list[Any]]:
    """A case's prompts, taken apart where they differ, and its questions as transformers parsed them."""
    prompts = respondent.prompts(case)
    texts = [{name: value for name, value in inputs.items() if name != "marks"} for inputs, _ in prompts]
    row = fork(texts, respondent.model.config.image_token_id)
    return row, [question for _, questions in prompts for question in questions]


def _unpackable(respondent: Respondent) -> str | None:
    """Why not, as far as model, template and processor tell."""
    if reason := unpackable(respondent.model.config):
        return reason
    if respondent.decision.chat_template is not None:
        return "it has a decision template of its own"
    questions = Question("first", "One?"), Question("second", "Two?")
    row, _ = _forked(respondent, Case(Image.new("RGB", (64, 64)), "", questions))
    if any((suffix == respondent.model.config.image_token_id).any() for suffix in row.suffixes):
        return "its chat template writes the question before the image, so that no beginning is shared"
    return None
