"""Judges by name: the one door. What a judge's answers depend on is known before it is loaded."""

import logging
from functools import partial
from typing import Any

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


def load_judge(model_name_or_path: str = "pocket", revision: str | None = None, **options: Any) -> Any:
    """The judge of `lazy_judge`, loaded."""
    return lazy_judge(model_name_or_path, revision, **options).load()


def lazy_judge(
    model_name_or_path: str,
    revision: str | None = None,
    *,
    rubric: Rubric | None = None,
    url: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    batch_size: int = 4,
    **reading: Any,
) -> Lazy[Judge]:
    """A judge of a folder, a hub id or `pocket`, or behind `url`, loaded at its first answer.

    A VLM answers all questions in one row if it can, else one by one, and the log says why; `reading` are
    VlmAnswerer's `attn_implementation` and `bare_labels`. Of a reward model only device and batch size can be
    chosen. For the rubric `reward`, `pocket` is its CLIP. InputError now, not after hours of other work, for
    a judge that cannot answer the rubric.
    """
    name = model_name_or_path
    if url:
        endpoint = EndpointJudge(url, name)
        return Lazy(endpoint.identity, lambda: endpoint)
    if name == pocket.NAME and rubric and rubric.name == REWARD_RUBRIC:
        name = str(pocket.folder("clip"))
    if reward_type(name, revision):
        if dtype != torch.float32:
            raise InputError(
                f"{name} is a reward model, which is run in float32, not in {dtype}: the digits by which two "
                "images differ would be lost; leave --judge_dtype out"
            )
        if rubric:
            check_questions(name, rubric.questions("", ""))
        reward = partial(RewardJudge, name, revision, device=device, batch_size=batch_size)
        return Lazy(reward_identity(name, revision), reward)
    bare = bool(reading.get("bare_labels"))
    answerer = partial(VlmAnswerer, name, revision, dtype=dtype, device=device, **reading)
    identity = vlm_identity(name, revision, dtype=dtype, bare_labels=bare)
    return Lazy(identity, lambda: _vlm_judge(answerer(), batch_size))


def _vlm_judge(answerer: VlmAnswerer, batch_size: int) -> SharedPrefixJudge | DecisionJudge:
    own_memory(answerer.model)
    if reason := cannot_share(answerer):
        logger.warning("%s is asked one question at a time: %s", answerer.name, reason)
        return DecisionJudge(answerer)
    return SharedPrefixJudge(answerer, batch_size=batch_size)
