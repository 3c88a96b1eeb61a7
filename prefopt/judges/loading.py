"""Judges by name: the one door. What a judge's answers depend on is known before it is loaded."""

from __future__ import annotations

import logging
from functools import partial

import torch

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.judges.decision import DecisionJudge, VlmAnswerer, vlm_identity
from prefopt.judges.endpoint import EndpointJudge
from prefopt.judges.questions import Judge
from prefopt.judges.reward import RUBRIC as REWARD_RUBRIC
from prefopt.judges.reward import RewardJudge, check_questions, reward_identity, reward_type
from prefopt.judges.rubric import Rubric
from prefopt.judges.shared_prefix import SharedPrefixJudge, cannot_share
from prefopt.loading import Lazy, own_memory

logger = logging.getLogger(__name__)


def load_judge(
    model_name_or_path: str = "pocket",
    revision: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    batch_size: int = 4,
    attn_implementation: str = "sdpa",
    bare_labels: bool = False,
) -> SharedPrefixJudge | DecisionJudge | RewardJudge:
    """A judge of a folder, a hub id or `pocket`: all questions in one row if the model can, else one by one.

    The log says why not. `bare_labels` counts only `Yes` and `No` themselves, as DecisionPipeline does. A
    reward model becomes a RewardJudge, for which only device and batch size can be chosen.
    """
    if reward_type(model_name_or_path, revision):
        _check_dtype(model_name_or_path, dtype)
        return RewardJudge(model_name_or_path, revision, device=device, batch_size=batch_size)
    answerer = VlmAnswerer(
        model_name_or_path,
        revision,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        bare_labels=bare_labels,
    )
    if reason := cannot_share(answerer):
        logger.warning("%s is asked one question at a time: %s", answerer.name, reason)
        return DecisionJudge(answerer)
    return SharedPrefixJudge(answerer, batch_size=batch_size)


def lazy_judge(
    model_name_or_path: str,
    revision: str | None,
    rubric: Rubric,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    batch_size: int,
    url: str | None = None,
) -> Lazy[Judge]:
    """The same for a rubric, behind `url` if one is given, loaded at its first answer.

    For the rubric `reward`, `pocket` is its CLIP. InputError now, not after hours of other work, for a judge
    that cannot answer the rubric.
    """
    if model_name_or_path == pocket.NAME and rubric.name == REWARD_RUBRIC:
        model_name_or_path = str(pocket.folder("clip"))
    if url:
        endpoint = EndpointJudge(url, model_name_or_path)
        return Lazy(endpoint.identity, lambda: endpoint)
    identity = partial(vlm_identity, dtype=dtype)
    if reward_type(model_name_or_path, revision):
        _check_dtype(model_name_or_path, dtype)
        check_questions(model_name_or_path, rubric.questions("", ""))
        identity = reward_identity

    def load() -> Judge:
        judge = load_judge(model_name_or_path, revision, dtype=dtype, device=device, batch_size=batch_size)
        own_memory(judge.scorer.model if isinstance(judge, RewardJudge) else judge.answerer.model)
        return judge

    return Lazy(identity(model_name_or_path, revision), load)


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        raise InputError(
            f"{name} is a reward model, which is run in float32, not in {dtype}: the digits by which two "
            "images differ would be lost; leave --judge_dtype out"
        )
