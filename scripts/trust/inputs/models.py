"""Models, adapters and what belongs to them: damaged, of another kind, or not there."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from damage import JSON, PLACES, WEIGHTS, Damage
from trial import Trial
from world import World


@dataclass(frozen=True)
class Kind:
    """What is loaded by name: from where it is copied, how it is loaded, and its files that are damaged."""

    name: str
    source: Callable[[World], Path]
    load: Callable[[str], Any]
    configs: tuple[str, ...]
    weights: tuple[str, ...]


def load_pipeline(name: str) -> Any:
    from prefopt.diffusion.sampling import load_pipeline

    return load_pipeline(name)


def load_vlm(name: str) -> Any:
    from prefopt.vlm.models import load_vlm

    return load_vlm(name)


def load_clip(name: str) -> Any:
    from prefopt.judges.clip import ClipScorer

    return ClipScorer(name)


def load_discriminator(name: str) -> Any:
    from prefopt.diffusion.discriminator import load_discriminator

    return load_discriminator(name)


def load_yolo(name: str) -> Any:
    from prefopt.detectors.loading import load_detector

    return load_detector(name)


def load_reward(name: str) -> Any:
    from prefopt.judges.reward import RewardJudge

    return RewardJudge(name)


def of_pocket(part: str) -> Callable[[World], Path]:
    """A folder of the pocket."""

    def folder(_: World) -> Path:
        from prefopt import pocket

        return pocket.folder(part)

    return folder


UNET, VAE, TEXT = (
    f"{part}/{file}.safetensors"
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    )
)
KINDS = (
    Kind(
        "pipeline",
        lambda world: world.diffusion,
        load_pipeline,
        ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"),
        (UNET, VAE, TEXT),
    ),
    Kind("VLM", lambda world: world.vlm, load_vlm, ("config.json", "tokenizer.json"), ("model.safetensors",)),
    Kind("CLIP", of_pocket("clip"), load_clip, ("config.json",), ("model.safetensors",)),
    Kind(
        "discriminator",
        of_pocket("discriminator"),
        load_discriminator,
        ("config.json",),
        ("diffusion_pytorch_model.safetensors",),
    ),
    Kind("YOLO-World", of_pocket("yolo_world"), load_yolo, ("config.json",), ("model.safetensors",)),
)


def trials(world: World) -> Iterator[Trial]:
    """Every kind, each of its files, damaged in every way; then what a table of files cannot say."""
    for kind in KINDS:
        yield from damaged(kind, world)
    yield from other_kinds(world)
    yield from names()
    yield from changed_configs(world)
    yield from whole_programs(world)


def damaged(kind: Kind, world: World) -> Iterator[Trial]:
    """A copy of a model with one file damaged; the message names the file, or the part it is of."""
    for files, damages in ((kind.configs, JSON), (kind.weights, WEIGHTS)):
        for file in files:
            for how, change in {**PLACES, **damages}.items():
                # The libraries name the part and the tensor, not the file.
                part, inside = Path(file).parts[0], how.startswith(("holds", "lacks", "names"))
                says = (
                    f"{part}.*tensor|tensor.*{part}|no whole"
                    if inside and "/" in file
                    else "tensor"
                    if inside
                    else file
                )
                yield Trial(
                    f"{kind.name}: {file} {how}", loading(kind, world, file, change), (r"/model\b", says)
                )


def loading(kind: Kind, world: World, file: str, change: Damage) -> Callable[[Path], Any]:
    """Copy the model, damage the file, load the copy."""

    def act(folder: Path) -> Any:
        copy = copied(kind.source(world), folder)
        change(copy / file)
        loaded = kind.load(str(copy))
        return loaded

    return act


def copied(source: Path, folder: Path) -> Path:
    """A copy of a model, in a folder `model`."""
    return Path(shutil.copytree(source, folder / "model", copy_function=shutil.copyfile))


def other_kinds(world: World) -> Iterator[Trial]:
    """Each kind of model where each other one is wanted."""
    for wanted in KINDS:
        for given in KINDS:
            if wanted is not given:
                source = given.source(world)
                yield Trial(
                    f"a {given.name} where a {wanted.name} is wanted",
                    lambda _, load=wanted.load, source=source: load(str(source)),
                    (str(source),),
                )


NAMES = {
    "nothing": "",
    "a NUL": "a\0b",
    "5,000 characters": "a" * 5000,
    "a path of 5,000 characters": "/" + "a" * 5000,
    "a device": "/dev/null",
    "a space": " ",
    "half a surrogate": "a/\ud800",
    "two slashes": "a//b",
    "an address": "https://localhost/model",
    "a dash": "--help",
    "dots": "..",
}


def names() -> Iterator[Trial]:
    """Names that are no model's."""
    for kind in KINDS:
        for what, name in NAMES.items():
            yield Trial(
                f"{kind.name}: named by {what}", lambda _, kind=kind, name=name: kind.load(name), (".",)
            )


def changed_configs(world: World) -> Iterator[Trial]:
    return iter(())


def whole_programs(world: World) -> Iterator[Trial]:
    return iter(())
