"""Adapters: their factors, configs and headers damaged, of other models, or of other kinds."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from damage import JSON, NESTED, PLACES, WEIGHTS, Damage, metadata, options, tensors, without_partner
from trial import Trial, program
from world import World

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSION = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Door:
    """How an adapter is read: its folder, what reads it, and its files."""

    name: str
    source: Callable[[World], Path]
    load: Callable[[World, Path], Any]
    weights: str
    config: str | None = None


def into_pipeline(world: World, folder: Path) -> Any:
    from prefopt.diffusion.generator import Generator
    from prefopt.diffusion.sampling import load_generator

    return load_generator(Generator(str(world.diffusion), adapter=str(folder)))


def into_vlm(world: World, folder: Path) -> Any:
    from prefopt.vlm.models import load_vlm, start_from_lora

    return start_from_lora(load_vlm(str(world.vlm))[0], str(folder))


def into_average(_: World, folder: Path) -> Any:
    from prefopt.averaging import average_adapters

    return average_adapters([folder, folder], folder.parent / "average")


DOORS = (
    Door("of a pipeline", lambda world: world.run, into_pipeline, DIFFUSION),
    Door("of a VLM", lambda world: world.vlm_run, into_vlm, PEFT_WEIGHTS, PEFT_CONFIG),
    Door("averaged, diffusers'", lambda world: world.run, into_average, DIFFUSION),
    Door("averaged, peft's", lambda world: world.vlm_run, into_average, PEFT_WEIGHTS, PEFT_CONFIG),
)
FACTORS = {
    "lacks the partner of a factor": tensors(without_partner),
    "has a factor that is empty": tensors(lambda values: {n: v[:0] for n, v in values.items()}),
    "has factors that are numbers": tensors(lambda values: {n: v.sum() for n, v in values.items()}),
}
# What adapter_config.json may not say, and what the message names. None: it makes no difference.
CONFIGS: dict[str, tuple[Damage, str | None]] = {
    "of a prompt": (options(peft_type="PROMPT_TUNING"), "."),
    "of an unknown type": (options(peft_type="NOTHING"), "NOTHING"),
    "of a type that is a list": (options(peft_type=[]), "."),
    "of rank 0": (options(r=0), "rank|r "),
    "of rank -1": (options(r=-1), "rank|r "),
    "of rank text": (options(r="two"), "."),
    "of another rank": (options(r=64), "."),
    "without its rank": (options(r=None), "."),
    "of alpha text": (options(lora_alpha="high"), "."),
    "of alpha NaN": (options(lora_alpha=float("nan")), "alpha"),
    "of alpha 1e400": (options(lora_alpha=10**400), "."),
    "with target modules that are a number": (options(target_modules=7), "."),
    "with a rank pattern that is a list": (options(rank_pattern=["q_proj"]), "."),
    "with a rank pattern that is no pattern": (options(rank_pattern={"(": 3}), "."),
    "initialised by pissa": (options(init_lora_weights="pissa"), "pissa"),
}
# An average needs no base model.
BASES: dict[str, tuple[Damage, str | None]] = {
    "of another base model": (options(base_model_name_or_path="org/another"), "org/another"),
    "with a base model that is a number": (options(base_model_name_or_path=5), "base_model"),
    "with a base model of 5,000 characters": (options(base_model_name_or_path="a" * 5000), "base_model"),
}
# The same, averaged or loaded by diffusers: the entry of the header.
HEADERS: dict[str, tuple[str, str | None]] = {
    "an opening bracket": ("{", "header|fit"),
    "a list": ("[]", "header|fit"),
    "null": ("null", "header|fit"),
    "nested too deep": ("[" * NESTED, "header|fit"),
    "of rank null": (
        json.dumps({"unet.r": None, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]}),
        ".",
    ),
    "of alpha text": (
        json.dumps({"unet.r": 2, "unet.lora_alpha": "x", "unet.target_modules": ["to_q"]}),
        ".",
    ),
    "of another rank": (
        json.dumps({"unet.r": 9, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]}),
        ".",
    ),
    "of numbers": (json.dumps({"unet": 5}), "."),
    "initialised by pissa": (json.dumps({"unet.r": 2, "unet.init_lora_weights": "pissa"}), "pissa"),
}
# Accepted: what is not looked at.
HARMLESS = {
    "with an auto_mapping": options(auto_mapping={"base_model_class": "system", "parent_library": "os"}),
    "without a base model": options(base_model_name_or_path=None),
}


def trials(world: World) -> Iterator[Trial]:
    """Each door, with each damage."""
    for door in DOORS:
        for how, change in {**PLACES, **WEIGHTS, **FACTORS}.items():
            inside = how.startswith(("holds", "lacks", "names", "has a factor", "has factors"))
            says = "tensor|factor|layer|different|lora_|finite|metadata" if inside else door.weights
            yield Trial(
                f"an adapter {door.name}: {how}", using(door, world, door.weights, change), ("/adapter", says)
            )
        if door.config:
            for how, change in {**PLACES, **JSON}.items():
                acting = using(door, world, door.config, change)
                yield Trial(f"an adapter {door.name}: its config {how}", acting, ("/adapter", door.config))
            for how, (change, said) in {**CONFIGS, **(BASES if door.load is into_vlm else {})}.items():
                if said:
                    acting = using(door, world, door.config, change)
                    yield Trial(f"an adapter {door.name}: {how}", acting, ("/adapter", said))
            for how, change in HARMLESS.items():
                yield Trial(f"an adapter {door.name}: {how}", using(door, world, door.config, change))
        else:
            for how, (text, said) in HEADERS.items():
                change = metadata(format="pt", lora_adapter_metadata=text)
                says = ("/adapter", said) if said else ()
                yield Trial(
                    f"an adapter {door.name}: its header is {how}",
                    using(door, world, door.weights, change),
                    says,
                )
    yield from others(world)


def using(door: Door, world: World, file: str, change: Damage) -> Callable[[Path], Any]:
    """Copy an adapter's files, damage one, and read the copy."""

    def act(folder: Path) -> Any:
        copy = folder / "adapter"
        copy.mkdir()
        for name in filter(None, (door.weights, door.config)):
            shutil.copyfile(door.source(world) / name, copy / name)
        change(copy / file)
        return door.load(world, copy)

    return act


def others(world: World) -> Iterator[Trial]:
    """What is no adapter of the model at all."""
    for door in DOORS[:2]:
        for other in DOORS[:2]:
            if other is not door:
                source = other.source(world)
                acting = lambda _, door=door, source=source: door.load(world, source)  # noqa: E731
                yield Trial(
                    f"an adapter {other.name} where one {door.name} is wanted", acting, (str(source),)
                )
        for what, place in (
            ("a model", world.diffusion),
            ("a table", world.pairs),
            ("a file of text", world.folder / "prompts.txt"),
            ("nothing", world.folder / "nothing"),
            ("a device", Path("/dev/zero")),
        ):
            acting = lambda _, door=door, place=place: door.load(world, place)  # noqa: E731
            yield Trial(f"{what} where an adapter {door.name} is wanted", acting, (str(place),))
    for name, run in (("diffusion_dpo", world.vlm_run), ("vlm_dpo", world.run)):
        given = world.options(name) | {"adapter_name_or_path": run}
        given.pop("lora_r")
        yield Trial(f"{name} from an adapter of the other side", program(name, given), (str(run),))
