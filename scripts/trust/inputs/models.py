"""Models, adapters and what belongs to them: damaged, of another kind, or not there."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from damage import JSON, PLACES, WEIGHTS, Damage, options
from trial import Trial, program
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
                inside = damages is WEIGHTS and how.startswith(("holds", "lacks", "names"))
                says = "tensor|expected shape|no whole" if inside else f"{Path(file).name}|backend tokenizer"
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


# Of a pipeline's index: an entry, and what the message names.
INDICES = {
    "an unknown class": ({"unet": ["diffusers", "NoSuchNetwork"]}, "'unet' is .*NoSuchNetwork"),
    "a class of another library": ({"unet": ["os", "system"]}, "'unet' is .*system"),
    "a module that would be imported": ({"unet": ["antigravity", "fly"]}, "'unet' is .*antigravity"),
    "a function": ({"unet": ["transformers", "pipeline"]}, "'unet' is .*pipeline"),
    "a class that is loaded from no folder": ({"unet": ["transformers", "Trainer"]}, "'unet' is .*Trainer"),
    "a list of three": ({"unet": ["diffusers", "UNet2DConditionModel", "x"]}, "'unet' is"),
    "a list of numbers": ({"unet": [1, 2]}, "'unet' is"),
    "another kind of network": ({"unet": ["transformers", "CLIPTextModel"]}, "unet"),
    "an unknown pipeline": ({"_class_name": "NoSuchPipeline"}, "NoSuchPipeline"),
    "a pipeline that is a network": ({"_class_name": "UNet2DConditionModel"}, "pipeline"),
    "a pipeline that is a number": ({"_class_name": 5}, "pipeline"),
    "a pipeline of its own code": ({"_class_name": ["code", "Code"]}, "pipeline"),
    "no pipeline": ({"_class_name": None}, "pipeline"),
    "no network": ({"unet": None}, "pipeline"),
    "a part without a folder": ({"scheduler_2": ["diffusers", "DDIMScheduler"]}, "scheduler_2"),
}
# Of a VLM's config.json.
VLMS = {
    "an unknown type": {"model_type": "nothing"},
    "no type": {"model_type": None},
    "a type that is a list": {"model_type": []},
    "code of its own, of an unknown type": {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.Mine", "AutoModelForImageTextToText": "code.Model"},
    },
    "a text model that is a number": {"text_config": 5},
    "a text model of text": {"text_config": {"model_type": "llama", "hidden_size": "wide"}},
    "heads that divide by zero": {"text_config": {"model_type": "llama", "num_attention_heads": 0}},
    "a size below zero": {"text_config": {"model_type": "llama", "hidden_size": -8}},
}


def changed_configs(world: World) -> Iterator[Trial]:
    """Configs that are JSON and make no model."""
    pipeline, vlm = KINDS[:2]
    for what, (entries, said) in INDICES.items():
        acting = loading(pipeline, world, "model_index.json", options(**entries))
        yield Trial(f"pipeline: its index names {what}", acting, (r"/model\b", said))
    for what, entries in VLMS.items():
        acting = loading(vlm, world, "config.json", options(**entries))
        yield Trial(f"VLM: its config names {what}", acting, (r"/model\b", "vision-language model"))
    harmless = options(auto_map={"AutoConfig": "code.Mine"})
    yield Trial("VLM: its config names code that is not used", loading(vlm, world, "config.json", harmless))


def whole_programs(world: World) -> Iterator[Trial]:
    """A few, as a command line meets them."""
    for name, file, change in (
        ("diffusion_dpo", "unet/config.json", JSON["is an opening bracket"]),
        ("diffusion_dpo", UNET, WEIGHTS["holds a NaN"]),
        ("vlm_dpo", "tokenizer.json", Path.unlink),
        ("vlm_dpo", "model.safetensors", WEIGHTS["is a pickle"]),
    ):
        yield Trial(
            f"{name} with a model whose {file} is damaged", running(world, name, file, change), (r"/model\b",)
        )


def running(world: World, name: str, file: str, change: Damage) -> Callable[[Path], None]:
    """Copy a recipe's model, damage a file of it, and train it."""

    def act(folder: Path) -> None:
        copy = copied(world.vlm if name == "vlm_dpo" else world.diffusion, folder)
        change(copy / file)
        program(name, world.options(name) | {"model_name_or_path": copy})(folder)

    return act
