"""What a comparison measures: scorers of images and their prompts, each loaded at its first use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import isfinite, nan
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prefopt import pocket
from prefopt.files import content_key
from prefopt.judges.clip import ClipScorer, clip_identity
from prefopt.judges.critic import Readings, TextCritic, TypedCritic
from prefopt.judges.critic_cases import ScoreCase
from prefopt.judges.discriminator import DiscriminatorScorer, discriminator_identity
from prefopt.judges.questions import Answer, Case, Judge
from prefopt.judges.rubric import Rubric
from prefopt.loading import Lazy
from prefopt.pocket.oracle import Oracle

SHOWS = "Does the picture show what was asked for?"
Kind = Literal["score", "proportion", "loss"]  # higher is better; the same, of booleans; lower is better
AnyCritic = TextCritic | TypedCritic
Values = np.ndarray | Sequence[float | bool | None]


@dataclass(frozen=True)
class Scorer:
    """A measure of outputs: one number each (n,), or several named ones, of which `main` stands for all.

    `score` takes images and their prompts; of a vision-language model's answers it takes ScoreCases. None is
    a score that could not be read. Scores are kept under `identity`, which changes with all that they depend
    on; without one they are computed anew in each run.
    """

    name: str  # in results.jsonl
    title: str
    about: str  # a sentence for readers of a report
    score: Callable[..., Values | Mapping[str, Values]]
    kind: Kind = "score"
    main: str = ""
    identity: str | None = None
    is_truth: bool = False  # the ground truth, not a model's opinion
    kinds: Mapping[str, Kind] = field(default_factory=dict)  # of parts that are of another kind
    at_once: int = 64  # outputs between two writes of what is kept
    needs_images: bool = True
    remember: Callable[[Sequence[Mapping]], None] | None = None  # told what is kept, before it scores more
    release: Callable[[], object] = lambda: None  # frees the model

    def metric(self, part: str) -> str:
        """The name of a part's scores."""
        return f"{self.name}/{part}" if part else self.name

    def describe(self, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What a report has to know of each part's scores, by metric."""
        return {
            self.metric(part): {
                "title": self.title if part == self.main else f"{self.name}: {part}",
                "about": self.about,
                "kind": self.kinds.get(part, self.kind),
                "scorer": self.name,
                "part": part,
                "is_headline": part == self.main,
                "is_truth": self.is_truth,
            }
            for part in parts
        }


def clip_scorer(model_name_or_path: str, *, revision: str | None = None, device: Any = "cpu") -> Scorer:
    """The CLIP score of a CLIP, or of what is shaped like it, as PickScore, under the model's own name."""
    load = cache(lambda: ClipScorer(model_name_or_path, revision, device=device))
    is_pocket = model_name_or_path == pocket.NAME
    own = "CLIP" if is_pocket else Path(model_name_or_path).name
    return Scorer(
        name="clip" if is_pocket else own,
        title=f"{own} score",
        about=(
            f"100 times the cosine between {own}'s embedding of the image and of the prompt. It says how "
            "well picture and words agree, not how good the picture looks; a model can learn to please it."
        ),
        score=lambda images, prompts: load()(images, prompts),
        identity=clip_identity(model_name_or_path, revision),
        release=load.cache_clear,
    )


def critic_scorer(critic: Lazy[AnyCritic], name: str) -> Scorer:
    """How well a critic of this name thinks that an image shows its prompt, 0..100."""
    load = cache(critic.load)
    return Scorer(
        name="critic",
        title="critic score",
        about=(
            f"the grade of the vision-language model {name} from 0 to 100: how well the image shows what its "
            "prompt asks for. It is an opinion, and a model can learn to please it."
        ),
        score=lambda images, prompts: load().score(
            [ScoreCase([image], SHOWS, prompt) for image, prompt in zip(images, prompts, strict=True)]
        ),
        identity=content_key(f"{critic.identity} {SHOWS}"),
        at_once=16,
        remember=lambda kept: remember_readings(load().readings, kept),
        release=load.cache_clear,
    )


def remember_readings(readings: Readings, kept: Sequence[Mapping], replies: int = 1) -> None:
    """Count what was read in earlier runs, `replies` to each output.

    Else a resumed run that has nothing left but what cannot be read would take the critic for useless.
    """
    readings.asked += replies * len(kept)
    readings.unreadable += sum(scores[""] is None for scores in kept)


def discriminator_scorer(name: str, device: Any = "cpu") -> Scorer:
    """A discriminator's logit of 'real', for the image and its prompt."""
    load = cache(lambda: DiscriminatorScorer(name, device=device))
    return Scorer(
        name="discriminator",
        title="discriminator logit",
        about=(
            "the logit of 'a real image of this prompt' of the discriminator "
            f"{name}: 0 is even odds. A model that had it in its loss was trained to raise this number: "
            "look whether the other scores rise with it."
        ),
        score=lambda images, prompts: load().rewards(list(images), list(prompts)),
        identity=discriminator_identity(name),
        release=load.cache_clear,
    )


def judge_scorer(judge: Lazy[Judge], rubric: Rubric, name: str) -> Scorer:
    """A judge's soft score of a rubric, for images without a class; `name` is that of its model.

    Of a reward model it is the reward, in logits. None where no answer is clear.
    """
    load = cache(judge.load)

    def score(images: Sequence[Any], prompts: Sequence[str]) -> list[float | None]:
        asked = [rubric.questions("", prompt) for prompt in prompts]
        cases = [Case(*case) for case in zip(images, prompts, asked, strict=True)]
        named = [
            {question.name: answer for question, answer in zip(case.questions, found, strict=True)}
            for case, found in zip(cases, load().answer(cases), strict=True)
        ]
        return [_soft_score(rubric, answers) for answers in named]

    most = sum(item.weight for item in rubric.items)
    asks = "; ".join(f"'{item.text.strip()}'" for item in rubric.items)
    bounds = f", from {-most:g} to {most:g}"
    if any(item.soft == "log_odds" for item in rubric.items):
        bounds = (
            ", in logits: the sigmoid of the difference of two images of one prompt is how likely the first "
            "is to be preferred"
        )
    return Scorer(
        name="judge",
        title="judge's score",
        about=(
            f"what {name} answers to {asks}: above 0 is yes, below is no{bounds}. It is an opinion, worth "
            "most if this model chose none of the training data."
        ),
        score=score,
        identity=content_key(f"{judge.identity} {rubric}"),
        release=load.cache_clear,
    )


def _soft_score(rubric: Rubric, answers: Mapping[str, Answer]) -> float | None:
    if not all(isfinite(p) for answer in answers.values() for p in answer.probabilities.values()):
        return nan  # kept_scores says who failed
    if all(answer.verdict is None for answer in answers.values()):
        return None
    return sum(rubric.soft_points(answers).values())


def oracle_scorer(device: str = "cpu") -> Scorer:
    """Whether the pocket's oracle sees all that a caption of the pocket's world says."""
    load = cache(lambda: Oracle.load(device=device))
    return Scorer(
        name="oracle",
        title="oracle accuracy",
        about=(
            "the share of images on which a classifier of the drawn world, used in no training, finds every "
            "attribute of the prompt: animal, colour, count and place."
        ),
        score=lambda images, prompts: load().correct(list(images), list(prompts)),
        kind="proportion",
        main="all",
        is_truth=True,
    )
