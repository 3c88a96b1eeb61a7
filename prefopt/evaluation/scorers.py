"""What a comparison measures: scorers of images and their prompts, each loaded at its first use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from prefopt import pocket
from prefopt.judges.clip import ClipScorer, clip_identity
from prefopt.pocket.oracle import Oracle

Kind = Literal["score", "proportion", "loss"]  # higher is better; the same, of booleans; lower is better


@dataclass(frozen=True)
class Scorer:
    """A measure of images: one number each (n,), or several named ones, of which `main` stands for all.

    Scores are kept under `identity`, which changes with all that they depend on; without one they are
    computed anew in each run.
    """

    name: str  # in results.jsonl
    title: str
    about: str  # a sentence for readers of a report
    score: Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray | Mapping[str, np.ndarray]]
    kind: Kind = "score"
    main: str = ""
    identity: str | None = None
    is_truth: bool = False  # the ground truth, not a model's opinion

    def metric(self, part: str) -> str:
        """The name of a part's scores."""
        return f"{self.name}/{part}" if part else self.name

    def describe(self, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What a report has to know of each part's scores, by metric."""
        return {
            self.metric(part): {
                "title": self.title if part == self.main else f"{self.name}: {part}",
                "about": self.about,
                "kind": self.kind,
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
    )


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
