"""Compare text-to-image models on the same prompts and seeds, and write a report.

    python recipes/compare_text_to_image.py --systems base dpo=runs/dpo --runs runs/dpo
    python recipes/compare_text_to_image.py --systems base dpo=runs/dpo --lora_scales 0 0.2 0.4 0.7 1
    accelerate launch recipes/compare_text_to_image.py --systems base dpo=runs/sd21 --prompts prompts.txt \\
        --model_name_or_path stabilityai/stable-diffusion-2-1 --num_inference_steps 50 --guidance_scale 7.5 \\
        --clip_model_name_or_path openai/clip-vit-large-patch14 --num_seeds 4 --dtype bfloat16

A system is `name=path`, the path a LoRA folder or a whole pipeline; a bare name is the model itself. All are
set against the first. You should see a table of means, and in --output_dir report.html, summary.json,
results.jsonl. The same command again draws nothing twice.

--clip_model_name_or_path takes PickScore, too, whose score is then 100 times its cosine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from prefopt.cli import run
from prefopt.diffusion.sampling import ADAPTER_FILE, MODEL_FILE, Sampler, System
from prefopt.evaluation.report import terminal_table, write_report
from prefopt.evaluation.text_to_image import compare, processes
from prefopt.judges.clip import ClipScorer
from prefopt.pocket.drawing import ANIMALS
from prefopt.pocket.oracle import Oracle
from prefopt.pocket.world import PHRASINGS, caption, held_out_scenes
from prefopt.records import InputError


@dataclass
class CompareConfig:
    """What is compared, on what, and how images are drawn."""

    model_name_or_path: str = field(
        default="pocket", metadata={"help": "Base model: a folder, a hub id or pocket."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the base model on the hub."})
    systems: list[str] = field(
        default_factory=lambda: ["base", "dpo=runs/dpo"],
        metadata={
            "help": "`name=path` of a LoRA or pipeline folder; a bare name is the base model. Baseline first."
        },
    )
    lora_scales: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Scales at which each LoRA is compared."}
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Text file, one prompt a line (default: the pocket's held-out captions)."},
    )
    classes: list[str] = field(
        default_factory=lambda: list(ANIMALS),
        metadata={"help": "Of the pocket's held-out captions, those of these animals."},
    )
    num_prompts: int = field(default=100, metadata={"help": "Use the first so many prompts."})
    num_seeds: int = field(default=2, metadata={"help": "Images per prompt and system."})
    seed: int = field(default=0, metadata={"help": "The first seed; the others follow."})
    num_inference_steps: int = field(default=30, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Classifier-free guidance; 1 is none."})
    height: int | None = field(default=None, metadata={"help": "Pixels (default: the model's)."})
    width: int | None = field(default=None, metadata={"help": "Pixels (default: the model's)."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of drawing."}
    )
    batch_size: int = field(default=16, metadata={"help": "Images drawn at once."})
    clip_model_name_or_path: str = field(
        default="pocket", metadata={"help": "CLIP that scores: a folder, a hub id or pocket."}
    )
    oracle: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={"help": "Ask the pocket's oracle; auto: if the pocket is drawing its own captions."},
    )
    tie: float = field(default=0.01, metadata={"help": "Scores that differ by at most this are a tie."})
    runs: list[str] = field(
        default_factory=list, metadata={"help": "Training runs whose curves the report shows."}
    )
    shown: int = field(default=24, metadata={"help": "Most rows of images in the report."})
    output_dir: str = field(default="runs/compare", metadata={"help": "Where images, scores and report go."})


def main(config: CompareConfig) -> None:
    state = processes()
    clip = ClipScorer(config.clip_model_name_or_path, device=state.device)
    scorers = {"clip": clip}
    if config.oracle == "on" or (
        config.oracle == "auto" and config.model_name_or_path == "pocket" and config.prompts is None
    ):
        scorers["oracle"] = Oracle.load(device=str(state.device)).correct
    summary = compare(
        read_systems(config),
        read_prompts(config),
        range(config.seed, config.seed + config.num_seeds),
        scorers,
        config.output_dir,
        sampler=Sampler(config.num_inference_steps, config.guidance_scale, config.height, config.width),
        tie=config.tie,
        dtype=getattr(torch, config.dtype),
        device=state.device,
        batch_size=config.batch_size,
    )
    if state.is_main_process:
        report = write_report(config.output_dir, runs=config.runs, shown=config.shown)
        Console().print(terminal_table(summary), f"\n{report}")


def read_systems(config: CompareConfig) -> list[System]:
    """The systems of the flags, a LoRA once for each scale."""
    systems = []
    for text in config.systems:
        name, _, path = text.partition("=")
        folder = Path(path)
        if not path:
            systems.append(System(name, config.model_name_or_path, revision=config.revision))
        elif (folder / ADAPTER_FILE).is_file() or folder.suffix == ".safetensors":
            for scale in config.lora_scales:
                label = name if config.lora_scales == [1.0] else f"{name} at {scale:g}"
                systems.append(System(label, config.model_name_or_path, path, scale, config.revision))
        elif (folder / MODEL_FILE).is_file():
            systems.append(System(name, path))
        else:
            raise InputError(f"--systems {text}: {path} holds neither {ADAPTER_FILE} nor {MODEL_FILE}")
    return systems


def read_prompts(config: CompareConfig) -> list[str]:
    """The first prompts of the file, each once and none empty, or the pocket's held-out captions."""
    if config.prompts is None:
        if unknown := [name for name in config.classes if name not in ANIMALS]:
            raise InputError(f"--classes {unknown[0]} is no animal of the pocket: {', '.join(ANIMALS)}")
        scenes = [scene for scene in held_out_scenes() if scene.animal in config.classes]
        prompts = [caption(scene, i + turn) for turn in range(PHRASINGS) for i, scene in enumerate(scenes)]
    elif not Path(config.prompts).is_file():
        raise InputError(f"no prompts file {config.prompts}")
    else:
        lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
        prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(prompts) < config.num_prompts:
        Console(stderr=True).print(f"{len(prompts)} prompts, fewer than the {config.num_prompts} asked for")
    return prompts[: config.num_prompts]


if __name__ == "__main__":
    run(main, CompareConfig)
