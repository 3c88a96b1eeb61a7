"""Reward models behind the judges' interface: CLIP, PickScore, ImageReward, a trained discriminator.

A reward model gives an image and its prompt one number r in logits, after Bradley and Terry: for one prompt,
sigmoid(r_a - r_b) is the probability that a is preferred over b. A judge answers questions: r becomes the
log-odds of yes to the one question of the rubric `reward`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from scipy.special import expit

from prefopt.diffusion.discriminator import MODEL_TYPE as DISCRIMINATOR
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.judges.clip import ClipScorer
from prefopt.judges.discriminator import DiscriminatorScorer
from prefopt.judges.image_reward import CONVERTER, MODEL_TYPE, ImageRewardScorer
from prefopt.judges.questions import NO, YES, Answer, Case, Question
from prefopt.judges.rubric import Rubric
from prefopt.loading import files_identity, model_config, own_memory

RUBRIC = "reward"


class RewardModel(Protocol):
    """Anything that gives images rewards for their prompts."""

    model: Any  # the nn.Module

    def rewards(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Rewards (n,) in logits of n images, each for the prompt at its place."""
        ...


REWARD_MODELS: dict[str, Callable[..., RewardModel]] = {
    "clip": ClipScorer,
    MODEL_TYPE: ImageRewardScorer,
    DISCRIMINATOR: DiscriminatorScorer,
}


def reward_type(name_or_path: str, revision: str | None = None) -> str | None:
    """The `model_type` in the config.json of a folder or hub id if it is a reward model's, else None."""
    if Path(name_or_path).suffix == ".pt":
        raise InputError(f"{name_or_path} is a pickle, which can run any code: convert it with {CONVERTER}")
    if name_or_path == "pocket":  # as a judge, the pocket's VLM
        return None
    kind = model_config(name_or_path, revision).get("model_type")
    return kind if kind in REWARD_MODELS else None


def reward_identity(name: str, revision: str | None = None) -> str:
    """What the rewards depend on, from the model's files: nothing is loaded."""
    return content_key(f"reward {files_identity(name, revision)}")


def check_questions(name: str, questions: Sequence[Question]) -> None:
    """InputError unless these questions can all be answered by one reward: the one of the rubric `reward`."""
    (reward,) = Rubric.load(RUBRIC).questions("", "")
    for question in questions:
        if (question.name, question.type) != (reward.name, reward.type):
            raise InputError(
                f"{name} is a reward model, which gives an image one number and reads no question: it "
                f"answers the {reward.type} {reward.name!r}, not the {question.type} {question.name!r}; take "
                f"--rubric {RUBRIC}"
            )
    if len(questions) > 1:
        raise InputError(
            f"{name} is a reward model, which gives an image one number: {len(questions)} questions would "
            f"all get the same answer; take --rubric {RUBRIC}, which has one"
        )


class RewardJudge:
    """Answers the question of the rubric `reward` with a reward r as the log-odds of yes.

    The rubric takes its soft score from r less the reward of the prompt's empty image, as it is: the margin
    of a pair is r_a - r_b, and its sigmoid the probability that a is preferred. Other rubrics take
    tanh((r - r_empty) / 2), which would be 2 P(preferred over the empty image) - 1: that is 1 to the last bit
    of a float64 from r - r_empty = 38 on, where the pocket's CLIP has its best images, and would tie them.
    """

    def __init__(self, model: str, revision: str | None = None, **loading: Any):
        kind = reward_type(model, revision)
        if kind is None:
            raise InputError(
                f"{model} is no folder or hub id of a reward model; those have a config.json that says "
                f"{' or '.join(map(repr, REWARD_MODELS))} ({CONVERTER} makes the latter)"
            )
        self.name, self.scorer = model, REWARD_MODELS[kind](model, revision, **loading)
        own_memory(self.scorer.model)
        self.identity = reward_identity(model, revision)

    def answer(self, cases: Sequence[Case]) -> list[list[Answer]]:
        """The answer of each case, if it has a question."""
        for case in cases:
            check_questions(self.name, case.questions)
        asked = [case for case in cases if case.questions]
        rewards = self.scorer.rewards([case.image for case in asked], [case.prompt for case in asked])
        # Both sides by themselves: 1 - p has no digits left at r = 37.
        answers = iter([Answer({YES: float(expit(r)), NO: float(expit(-r))}) for r in rewards])
        return [[next(answers)] if case.questions else [] for case in cases]
