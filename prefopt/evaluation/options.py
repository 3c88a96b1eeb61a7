"""The options of what scores in comparisons: critics, judges, and scorers of images.

Importing this imports no model library.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.judges.critic_cases import CRITICS, Templates
from prefopt.judges.rubric import Rubric
from prefopt.options import check_options, check_paths_exist, option

RUBRIC = "whole_prompt"  # one of ours: does the image show its prompt?


@dataclass
class CriticOptions:
    """Which vision-language model grades, and how it is asked."""

    critic: str | None = option(
        None, "Vision-language model that grades, 0 to 100: a folder, a hub id or `pocket` (default: none)."
    )
    critic_revision: str | None = option(None, "Revision of the critic on the hub.")
    critic_url: str | None = option(
        None, "OpenAI-compatible server that runs the critic; --critic is then its name there."
    )
    critic_templates: str | None = option(
        None, "Folder with the words that the critic is asked in (default: ours, prefopt/judges/critics)."
    )
    critic_typed: bool = option(
        False,
        "Read the grade from the critic's probabilities of five levels, not from a text that it writes.",
    )
    critic_dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the critic.")
    critic_batch_size: int = option(4, "Outputs that the critic grades at once.", within="[1, 65536]")
    critic_max_new_tokens: int = option(512, "Longest text of the critic, in tokens.", within="[1, 1e6]")

    def __post_init__(self) -> None:
        check_options(self)
        if self.critic is None:
            if self.critic_url or self.critic_templates or self.critic_typed:
                raise InputError("--critic_url, --critic_templates, --critic_typed: name the --critic, too")
            return
        if not self.critic_url:
            check_paths_exist(self, "critic")
        if self.critic_templates:
            Templates.load(self.critic_templates)

    def lazy_critic(self, device: Any, words: str) -> Any:
        """The critic, loaded at its first grade; `words` says which of our templates it is asked in."""
        import torch

        from prefopt.judges.loading import lazy_critic

        return lazy_critic(
            str(self.critic),
            self.critic_revision,
            url=self.critic_url,
            templates=self.critic_templates or Path(CRITICS, words),
            typed=self.critic_typed,
            dtype=getattr(torch, self.critic_dtype),
            device=device,
            batch_size=self.critic_batch_size,
            max_new_tokens=self.critic_max_new_tokens,
        )

    def lazy_judge(self, device: Any, rubric: Rubric) -> Any:
        """The same model as a judge that answers a rubric's questions."""
        import torch

        from prefopt.judges.loading import lazy_judge

        return lazy_judge(
            self.critic_name,
            self.critic_revision,
            rubric=rubric,
            url=self.critic_url,
            dtype=getattr(torch, self.critic_dtype),
            device=device,
            batch_size=self.critic_batch_size,
        )

    @property
    def critic_name(self) -> str:
        """The critic's folder, hub id, or name at the server; `pocket` is its part `critic`."""
        return str(self.critic) if self.critic_url else pocket.resolve(str(self.critic), "critic")


@dataclass
class JudgeOptions:
    """Which judge scores images: a VLM by a rubric, or a reward model."""

    judge_model_name_or_path: str | None = option(
        None,
        "Also score by a judge, best one that chose no training data: a VLM, or a reward model (PickScore, "
        "another CLIP, ImageReward, a discriminator); a folder, a hub id or `pocket` (default: none).",
    )
    judge_revision: str | None = option(None, "Revision of the judge on the hub.")
    judge_dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the judge.")
    rubric: str | None = option(
        None,
        "The judge's questions: a YAML file, or one of ours by name (default: `reward` for a reward model, "
        f"`{RUBRIC}` for a VLM).",
    )

    def __post_init__(self) -> None:
        check_paths_exist(self, "judge_model_name_or_path")
        if not self.judge_model_name_or_path and (self.judge_revision or self.rubric):
            raise InputError("--rubric, --judge_revision: name the --judge_model_name_or_path, too")
        if self.rubric:
            rubric = Rubric.load(self.rubric)
            if rubric.needs_class or rubric.checks:
                raise InputError(
                    f"--rubric {self.rubric}: it asks about {{class}} or needs a detector, and a comparison "
                    "has images and prompts alone"
                )

    def judge_scorer(self, device: Any) -> Any:
        """The judge as a scorer, loaded at its first answer."""
        import torch

        from prefopt.evaluation.scorers import judge_scorer
        from prefopt.judges.loading import lazy_judge
        from prefopt.judges.reward import RUBRIC as REWARD_RUBRIC
        from prefopt.judges.reward import reward_type

        name, revision = str(self.judge_model_name_or_path), self.judge_revision
        rubric = Rubric.load(self.rubric or (REWARD_RUBRIC if reward_type(name, revision) else RUBRIC))
        dtype = getattr(torch, self.judge_dtype)
        return judge_scorer(
            lazy_judge(name, revision, rubric=rubric, dtype=dtype, device=device), rubric, name
        )


@dataclass
class ImageScorerOptions(CriticOptions, JudgeOptions):
    """What scores images."""

    clip_model_name_or_path: str | None = option(
        None,
        "CLIP or PickScore that scores: a folder, a hub id or `pocket` (the default for the model `pocket`).",
    )
    discriminator_name_or_path: str | None = option(
        None,
        "Also score by a discriminator: what recipes/discriminator.py wrote, a hub id or `pocket` (default: "
        "none).",
    )
    oracle: Literal["auto", "on", "off"] = option(
        "auto", "Also score by the pocket's oracle; auto: if the prompts are the pocket's."
    )

    def __post_init__(self) -> None:
        CriticOptions.__post_init__(self)
        JudgeOptions.__post_init__(self)
        if self.critic == pocket.NAME and not self.critic_url:
            raise InputError(
                "the critic `pocket` grades answers to questions, not images for prompts: name another, or "
                "leave --critic out; the pocket's images are graded by --oracle"
            )
        check_paths_exist(self, "clip_model_name_or_path", "discriminator_name_or_path")

    def scorers(self, device: Any, *, on_pocket: bool) -> list[Any]:
        """The scorers that the options name, each loaded at its first use; `on_pocket`: of its prompts."""
        from prefopt.evaluation import scorers

        found = [scorers.clip_scorer(str(self.clip_model_name_or_path), device=device)]
        if self.oracle == "on" or (self.oracle == "auto" and on_pocket):
            found.append(scorers.oracle_scorer(device))
        if self.discriminator_name_or_path:
            found.append(scorers.discriminator_scorer(self.discriminator_name_or_path, device))
        if self.judge_model_name_or_path:
            found.append(self.judge_scorer(device))
        if self.critic:
            words = "image_typed" if self.critic_typed else "image_text"
            found.append(scorers.critic_scorer(self.lazy_critic(device, words), self.critic))
        return found
