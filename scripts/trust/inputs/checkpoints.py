"""Checkpoints that are damaged since, and what earlier runs keep: identities, cached tensors, metrics."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from damage import JSON, PLACES, WEIGHTS, Damage, half, metadata, options, pickled, tensors, text
from trial import Trial, program
from world import World

STATE = "trainer_state.json"
TORCH = {
    "is empty": text(b""),
    "is half a file": half,
    "is no text": text(bytes(range(256))),
    "is a pickle": pickled,
}
STATES = {
    "of a step that is text": options(global_step="1"),
    "of step -1": options(global_step=-1),
    "of another step": options(global_step=77),
    "without its step": options(global_step=None),
    "with an unknown entry": options(nonsense=1),
    "with epochs that are text": options(num_train_epochs="x"),
}


def torch_object(value: Callable[[], Any]) -> Damage:
    """Another object, as torch saves it."""

    def change(path: Path) -> None:
        import torch

        torch.save(value(), path)

    return change


def code() -> Any:
    from damage import Runs

    return Runs()


OBJECTS = {
    "holds code": torch_object(code),
    "holds nothing": torch_object(dict),
    "holds text": torch_object(lambda: "text"),
    "holds another state": torch_object(lambda: {"state": {}, "param_groups": []}),
}


def trials(world: World) -> Iterator[Trial]:
    """Checkpoints of both sides, then the caches."""
    for name, run, weights in (
        ("diffusion_dpo", world.run, "pytorch_lora_weights.safetensors"),
        ("vlm_dpo", world.vlm_run, "adapter_model.safetensors"),
    ):
        for file, damages in (
            (STATE, {**PLACES, **JSON, **STATES}),
            (weights, {**PLACES, **WEIGHTS}),
            ("optimizer.pt", {**PLACES, **TORCH, **OBJECTS}),
            ("scheduler.pt", {**PLACES, **TORCH, **OBJECTS}),
            ("rng_state.pth", {**PLACES, **TORCH, **OBJECTS}),
        ):
            for how, change in damages.items():
                acting = resuming(world, name, run, file, change)
                yield Trial(
                    f"{name} from a checkpoint whose {file} {how}",
                    acting,
                    ("checkpoint-1", "(again|no checkpoint)"),
                )
        yield Trial(f"{name} from a whole checkpoint", resuming(world, name, run, STATE, lambda _: None))
    yield from caches(world)


def resuming(world: World, name: str, run: Path, file: str, change: Damage) -> Callable[[Path], None]:
    """Copy a run's first checkpoint, damage a file, and go on from there."""

    def act(folder: Path) -> None:
        copy = Path(shutil.copytree(run / "checkpoint-1", folder / "run" / "checkpoint-1"))
        change(copy / file)
        steps = {"max_steps": 2, "resume_from_checkpoint": None}
        try:
            program(name, world.options(name) | steps)(folder)
        finally:
            if Path("unpickled").exists():
                raise RuntimeError("a pickle was run")

    return act


def caches(world: World) -> Iterator[Trial]:
    """The cache of a run, one file damaged; and whole stores whose shards were changed."""
    for part in ("images", "prompts"):
        for how, change in {**PLACES, **JSON}.items():
            if how == "is gone":
                continue  # then it is written again
            yield Trial(
                f"a cache of {part} whose identity {how}",
                cached(world, part, "identity.json", change),
                (rf"cache/{part}/identity\.json", "--cache_dir"),
            )
        damages = {**{name: WEIGHTS[name] for name in list(WEIGHTS)[:7]}, **PLACES}
        damages["is of another cache"] = metadata(about=json.dumps({"identity": {}, "names": []}))
        damages["has another header"] = metadata(format="pt")
        damages["lacks tensors"] = tensors(lambda values: {max(values): values[max(values)]})
        for how, change in damages.items():
            if how == "is gone" or (part, how) == ("prompts", "lacks tensors"):
                continue  # what is not there is computed again; an entry of prompts is one tensor
            yield Trial(
                f"a cache of {part} whose shard {how}",
                cached(world, part, "*.safetensors", change),
                (rf"cache/{part}/.*\.safetensors", "Delete"),
            )
    yield Trial("a cache without its shards", cached(world, "images", "*.safetensors", Path.unlink))


def cached(world: World, part: str, pattern: str, change: Damage) -> Callable[[Path], None]:
    """Copy a run's cache, damage a file of it, and train with it."""

    def act(folder: Path) -> None:
        copy = Path(shutil.copytree(world.run / "cache", folder / "cache"))
        change(min((copy / part).glob(pattern)))
        program("diffusion_dpo", world.options("diffusion_dpo") | {"cache_dir": copy})(folder)

    return act
