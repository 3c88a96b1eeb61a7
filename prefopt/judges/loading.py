"""Judges and critics by name: the one door. What their answers depend on is known before they are loaded."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.judges.critic import TEXT, TYPED, TextCritic, TypedCritic, critic_identity, typed_identity
from prefopt.judges.critic_cases import Templates
from prefopt.judges.decision import DecisionJudge, VlmAnswerer, vlm_identity
from prefopt.judges.endpoint import EndpointJudge
from prefopt.judges.questions import Judge
from prefopt.judges.reward import RUBRIC as REWARD_RUBRIC
from prefopt.judges.reward import RewardJudge, check_questions, reward_identity, reward_type
from prefopt.judges.rubric import Rubric
from prefopt.judges.shared_prefix import SharedPrefixJudge, cannot_share
from prefopt.judges.writers import LONGEST, EndpointWriter, LocalWriter, local_identity
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
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    batch_size: int = 4,
    **reading: Any,
) -> Lazy[Judge]:
    """A judge of a folder, a hub id or `pocket`, or behind `url`, loaded at its first answer.

    A VLM, with the LoRA `adapter` if one is named, answers all questions in one row if it can, else one by
    one, and the log says why; `reading` are VlmAnswerer's `attn_implementation` and `bare_labels`. Of a
    reward model only device and batch size can be chosen. For the rubric `reward`, `pocket` is its CLIP.
    InputError now, not after hours of other work, for a judge that cannot answer the rubric.
    """
    name = model_name_or_path
    if url:
        _check_no_adapter(adapter, f"{name} behind {url}")
        endpoint = EndpointJudge(url, name)
        return Lazy(endpoint.identity, lambda: endpoint)
    if name == pocket.NAME and rubric and rubric.name == REWARD_RUBRIC:
        name = str(pocket.folder("clip"))
    if reward_type(name, revision):
        _check_no_adapter(adapter, f"the reward model {name}")
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
    answerer = partial(VlmAnswerer, name, revision, adapter=adapter, dtype=dtype, device=device, **reading)
    identity = vlm_identity(name, revision, adapter=adapter, dtype=dtype, bare_labels=bare)
    return Lazy(identity, lambda: _vlm_judge(answerer(), batch_size))


def _check_no_adapter(adapter: str | None, model: str) -> None:
    if adapter:
        raise InputError(
            f"the adapter {adapter} is for a vision-language model that is loaded here, not for {model}; "
            "leave it out"
        )


def _vlm_judge(answerer: VlmAnswerer, batch_size: int) -> SharedPrefixJudge | DecisionJudge:
    own_memory(answerer.model)
    if reason := cannot_share(answerer):
        logger.warning("%s is asked one question at a time: %s", answerer.name, reason)
        return DecisionJudge(answerer)
    return SharedPrefixJudge(answerer, batch_size=batch_size)


def load_critic(
    model_name_or_path: str, revision: str | None = None, **options: Any
) -> TextCritic | TypedCritic:
    """The critic of `lazy_critic`, loaded."""
    return lazy_critic(model_name_or_path, revision, **options).load()


def lazy_critic(
    model_name_or_path: str,
    revision: str | None = None,
    *,
    url: str | None = None,
    templates: str | Path | None = None,
    typed: bool = False,
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    batch_size: int = 4,
    max_new_tokens: int = LONGEST,
) -> Lazy[TextCritic | TypedCritic]:
    """A critic of a folder, a hub id or `pocket`, or behind `url`, loaded at its first judgement.

    It writes at most `max_new_tokens` a reply, or, if `typed`, answers typed questions as the judge of
    `lazy_judge`, with `adapter` if one is named. `templates` is a folder of its words (see critic_cases), by
    default ours. InputError for a critic that writes, with an adapter. `pocket` is its critic, which was
    taught to answer typed questions and does not write.
    """
    words = Templates.load(templates or (TYPED if typed else TEXT))
    name = model_name_or_path if url else pocket.resolve(model_name_or_path, "critic")
    if name != model_name_or_path and not typed:
        raise InputError(
            "the critic `pocket` answers typed questions and does not write: add --critic_typed (typed=True)"
        )
    if typed:
        options: Any = {"url": url, "dtype": dtype, "device": device, "batch_size": batch_size}
        judge = lazy_judge(name, revision, adapter=adapter, **options)
        return Lazy(typed_identity(judge.identity, words), lambda: TypedCritic(judge.load(), words))
    _check_no_adapter(adapter, f"{name}, which writes")
    if url:
        critic = TextCritic(EndpointWriter(url, name, max_new_tokens=max_new_tokens), words)
        return Lazy(critic.identity, lambda: critic)
    options = {"dtype": dtype, "device": device, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    identity = critic_identity(local_identity(name, revision, dtype, max_new_tokens), words)
    return Lazy(identity, lambda: TextCritic(LocalWriter(name, revision, **options), words))
