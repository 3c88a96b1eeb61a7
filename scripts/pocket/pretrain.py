"""Makes the pocket's weights again, part by part: pretrain.py vae | oracle | clip | ... | all

Each part trains on two CPU cores in minutes, goes on from its checkpoint under `--work` when started again,
is written to `prefopt/pocket/weights` and measured on scenes that no training saw; PROVENANCE.json keeps the
figures. The order of `all` is the order of need: every part copies pictures through the VAE, and the oracle
measures the text-to-image model.

What you should see on two free cores: under two hours in all; held-out pictures come through the VAE at 27 dB
or more; oracle and CLIP are right on 98 and 95 % or more; the text-to-image model draws what was asked less
than half of the time at its own guidance, and half of it under any more; the LLaVA answers 95 % of the
rubric's questions about held-out pictures rightly; of two answers to a question about a picture the critic
prefers the right one nine times in ten; of a picture and an image of the text-to-image model the
discriminator takes the picture for real nineteen times in twenty.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from pretraining import (
    clip,
    critic,
    critic_quality,
    discriminator,
    llava,
    llava_quality,
    oracle,
    pairs,
    text_to_image,
    vae,
    yolo_world,
)
from pretraining.common import Run, to_images, to_tensor
from pretraining.llava_lessons import Request
from pretraining.llava_pictures import make_pictures
from pretraining.pictures import copy_through, make_pool
from pretraining.shipping import record, save_half, save_pipeline

from data_builders.prompts.generate import Templates
from prefopt.pocket import folder
from prefopt.pocket.oracle import Oracle
from prefopt.pocket.world import held_out_scenes, render, train_scenes

POOL = 12_000
FLAWED = 36_000
BOXED = 3_000
PAIRS = 192
DUOS = 6_000
SEEDS = {
    "vae": 1,
    "text_to_image": 3,
    "clip": 5,
    "oracle": 7,
    "pairs": 9,
    "llava": 21,
    "yolo_world": 11,
    "critic": 31,
    "discriminator": 42,
}


def command(part: str) -> str:
    """What PROVENANCE.json says was typed."""
    return f"python scripts/pocket/pretrain.py {part}"


def held_out_pictures(seed: int, per_scene: int = 4):
    """Held-out scenes, each `per_scene` times, and their renders."""
    scenes = held_out_scenes() * per_scene
    return scenes, [render(scene, seed * 1000 + i) for i, scene in enumerate(scenes)]


def trained_vae(work: Path) -> AutoencoderKL:
    """The VAE that the subcommand `vae` left."""
    return shipped_vae(work / "vae" / "model")


def shipped_vae(path: Path) -> AutoencoderKL:
    """A saved VAE, in the memory layout that is fastest here."""
    model: Any = AutoencoderKL.from_pretrained(path)
    return model.to(memory_format=torch.channels_last).eval()


def make_vae(work: Path) -> None:
    run = Run(work / "vae", SEEDS["vae"], steps=4500, batch=16, learning_rate=2e-3)
    model = vae.train(run)
    save_half(model, work / "vae" / "model")
    _, images = held_out_pictures(1, per_scene=1)
    pixels = to_tensor(images)
    squared = ((copy_through(trained_vae(work), pixels) - pixels) / 2).square().mean((1, 2, 3))
    quality = {"held_out_psnr_db": float(-10 * torch.log10(squared).mean())}
    record(
        "vae", work / "vae" / "model", command=command("vae"), seed=run.seed, steps=run.steps, quality=quality
    )


def make_oracle(work: Path) -> None:
    run = Run(work / "oracle", SEEDS["oracle"], steps=3000, batch=64, learning_rate=2e-3)
    model = trained_vae(work)
    oracle.save(oracle.train(run, make_pool(run.seed, POOL, model)), folder("oracle"))
    judge = Oracle.load()
    scenes, images = held_out_pictures(2)
    copies = to_images(copy_through(model, to_tensor(images)))
    quality = {
        "held_out_renders": oracle.accuracy(judge.attributes(images), scenes),
        "held_out_vae_copies": oracle.accuracy(judge.attributes(copies), scenes),
    }
    record(
        "oracle", folder("oracle"), command=command("oracle"), seed=run.seed, steps=run.steps, quality=quality
    )


def make_clip(work: Path) -> None:
    run = Run(work / "clip", SEEDS["clip"], steps=3000, batch=64, learning_rate=1e-3)
    vae_model = trained_vae(work)
    model, processor = clip.train(run, make_pool(run.seed, POOL, vae_model))
    save_half(model, folder("clip"))
    processor.save_pretrained(folder("clip"))
    scenes, images = held_out_pictures(3)
    copies = to_images(copy_through(vae_model, to_tensor(images)))
    quality = {
        "held_out_renders": clip.one_change_accuracy(model, processor, scenes, images),
        "held_out_vae_copies": clip.one_change_accuracy(model, processor, scenes, copies),
        "measures": "the true caption above every caption with this one attribute changed",
    }
    record("clip", folder("clip"), command=command("clip"), seed=run.seed, steps=run.steps, quality=quality)


def make_text_to_image(work: Path) -> None:
    run = Run(work / "text_to_image", SEEDS["text_to_image"], steps=4500, batch=32, learning_rate=1e-3)
    pipeline = text_to_image.train(run, trained_vae(work))
    save_pipeline(pipeline, folder("text_to_image"))
    quality = {f"guidance_{g}": text_to_image.followed(g) for g in (1.0, 2.0, 3.0, 4.5, 6.0)}
    record(
        "text_to_image",
        folder("text_to_image"),
        command=command("text_to_image"),
        seed=run.seed,
        steps=run.steps,
        leans=text_to_image.LEANS,
        couples=[" and ".join(_words(side) for side in couple) for couple in text_to_image.COUPLES],
        legs_missing=text_to_image.LEGS_MISSING,
        sampling=text_to_image.SAMPLING,
        quality={"held_out_right_by_oracle": quality},
    )


def _words(side: dict[str, Any]) -> str:
    return " ".join(map(str, side.values()))


def make_pairs(work: Path) -> None:
    quality = pairs.make_pairs(folder("pairs"), SEEDS["pairs"], PAIRS)
    record(
        "pairs", folder("pairs"), command=command("pairs"), seed=SEEDS["pairs"], rows=PAIRS, quality=quality
    )


def make_llava(work: Path) -> None:
    seed = SEEDS["llava"]
    looks = Run(work / "llava_looks", seed, steps=8000, batch=32, learning_rate=1e-3, average=0.99)
    questions = Run(work / "llava", seed + 1, steps=2400, batch=16, learning_rate=1.2e-3, average=0.99)
    lists = Run(work / "llava_lists", seed + 2, steps=1600, batch=16, learning_rate=1e-3, average=0.99)
    vae_model = shipped_vae(folder("text_to_image") / "vae")
    templates = Templates.load()
    request = Request(templates.system, templates.requests[0])
    pictures = make_pictures(seed, FLAWED, vae_model, train_scenes())
    model, processor = llava.train(looks, questions, lists, pictures, request)
    save_half(model, folder("llava"))
    processor.save_pretrained(folder("llava"))
    unseen = make_pictures(seed + 1, 1200, vae_model, held_out_scenes())
    quality = llava_quality.measure(folder("llava"), unseen, request)
    llava_quality.show(quality)
    steps = {run.work.name: run.steps for run in (looks, questions, lists)}
    record("llava", folder("llava"), command=command("llava"), seed=seed, steps=steps, quality=quality)


def make_critic(work: Path) -> None:
    seed = SEEDS["critic"]
    plan = {"asking": (1200, 16), "grading": (900, 16), "comparing": (1000, 32)}  # steps, rows of a batch
    runs = {
        name: Run(work / f"critic_{name}", seed + i, steps, batch, learning_rate=1e-3, average=0.99)
        for i, (name, (steps, batch)) in enumerate(plan.items())
    }
    model, processor = critic.train(runs, DUOS)
    save_half(model, folder("critic"))
    processor.save_pretrained(folder("critic"))
    quality, steps = critic_quality.measure(folder("critic")), {name: run.steps for name, run in runs.items()}
    record("critic", folder("critic"), command=command("critic"), seed=seed, steps=steps, quality=quality)


def make_discriminator(work: Path) -> None:
    seed = SEEDS["discriminator"]
    run = Run(work / "discriminator", seed, steps=3000, batch=16, learning_rate=8e-4)
    save_half(discriminator.train(run), folder("discriminator"))
    quality = json.loads((run.work / "model" / "test.json").read_text(encoding="utf-8"))
    line = command("discriminator")
    record(
        "discriminator", folder("discriminator"), command=line, seed=seed, steps=run.steps, quality=quality
    )


def make_yolo_world(work: Path) -> None:
    run = Run(work / "yolo_world", SEEDS["yolo_world"], steps=1600, batch=32, learning_rate=2e-3)
    vae_model = shipped_vae(folder("text_to_image") / "vae")
    # Held-out pictures are all right well before the schedule's end.
    stop = 1000
    pool = yolo_world.make_pool(run.seed, BOXED, vae_model)
    yolo_world.save(yolo_world.train(run, pool, stop), folder("yolo_world"))
    record(
        "yolo_world",
        folder("yolo_world"),
        command=command("yolo_world"),
        seed=run.seed,
        steps=stop,
        schedule=run.steps,
        quality=yolo_world.quality(vae_model),
    )


PARTS = {
    "vae": make_vae,
    "oracle": make_oracle,
    "clip": make_clip,
    "text_to_image": make_text_to_image,
    "pairs": make_pairs,
    "llava": make_llava,
    "critic": make_critic,
    "discriminator": make_discriminator,
    "yolo_world": make_yolo_world,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/pocket"), help="checkpoints (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    np.seterr(all="raise", under="ignore")
    for part in PARTS if options.part == "all" else [options.part]:
        print(f"--- {part}", file=sys.stderr, flush=True)
        PARTS[part](options.work)


if __name__ == "__main__":
    main()
