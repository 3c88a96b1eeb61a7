"""The options of critics and judges, for comparisons; importing this imports no model library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.judges.critic_cases import CRITICS, Templates
from prefopt.judges.rubric import Rubric
from prefopt.options import check_interval, check_paths_exist, option

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
    critic_batch_size: int = option(4, "Outputs that the critic grades at once.")
    critic_max_new_tokens: int = option(512, "Longest text of the critic, in tokens.")

    def __post_init__(self) -> None:
        check_interval(self, "[1, inf)", "critic_batch_size", "critic_max_new_tokens")
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
    """Which judge scores images by a rubric."""

    judge_model_name_or_path: str | None = option(
        None,
        "Also score by a judge, best one that chose no training data: a VLM, or with --rubric reward a "
        "reward model; a folder, a hub id or `pocket` (default: none).",
    )
    judge_revision: str | None = option(None, "Revision of the judge on the hub.")
    judge_dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the judge.")
    rubric: str = option(RUBRIC, "The judge's questions: a YAML file, or one of ours by name.")

    def __post_init__(self) -> None:
        check_paths_exist(self, "judge_model_name_or_path")
        if self.judge_model_name_or_path:
            rubric = self.judge_rubric
            if rubric.needs_class or rubric.checks:
                raise InputError(
                    f"--rubric {self.rubric}: it asks about {{class}} or needs a detector, and a comparison "
                    "has images and prompts alone"
                )
        elif self.judge_revision or self.rubric != RUBRIC:
            raise InputError("--rubric, --judge_revision: name the --judge_model_name_or_path, too")

    @property
    def judge_rubric(self) -> Rubric:
        """The judge's questions."""
        return Rubric.load(self.rubric)

    def judge(self, device: Any) -> Any:
        """The judge, loaded at its first answer."""
        import torch

        from prefopt.judges.loading import lazy_judge

        return lazy_judge(
            str(self.judge_model_name_or_path),
            self.judge_revision,
            rubric=self.judge_rubric,
            dtype=getattr(torch, self.judge_dtype),
            device=device,
        )
