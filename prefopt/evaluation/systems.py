"""What is compared, as the command line names it; importing this imports no model library."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.diffusion.generator import CHANGES, Generator, adapter_file, changed
from prefopt.errors import InputError
from prefopt.hub import ADAPTER_FILE
from prefopt.model_files import MODEL_FILE
from prefopt.options import is_local_path

ADAPTER_CONFIG = "adapter_config.json"  # of peft's format


class Named(NamedTuple):
    """A system as it was named, such as `dpo=runs/dpo guidance=3`."""

    name: str
    path: str  # empty for the base model
    words: list[str]  # what it has of its own


def parse_system(text: str, changes: Collection[str] = ()) -> Named:
    """A text of --systems in its parts; `changes` are the words that may follow the path, as `guidance`."""
    # A folder's name may hold spaces.
    first, *words = re.split(rf" +(?=(?:{'|'.join(changes)})=)", text) if changes else [text]
    name, _, path = first.partition("=")
    if not name.strip():
        raise InputError(f"--systems {text!r} has no name; write name=path, or a name for the base model")
    return Named(name, path, words)


def check_each_once(what: str, items: Sequence[Any], least: int = 1) -> None:
    """InputError unless there are enough of what is compared, each named once."""
    if len(items) < least:
        raise InputError(f"a comparison needs {least} {what} or more, not {len(items)}")
    if len(set(items)) < len(items):
        twice = next(item for item in items if items.count(item) > 1)
        raise InputError(f"{twice!r} is named twice among the {what}; name each once")


def image_systems(
    texts: Sequence[str],
    base: Generator,
    guidance_scales: Sequence[float] = (),
    lora_scales: Sequence[float] = (1.0,),
) -> dict[str, dict[str, Generator]]:
    """Text-to-image systems by name, each with its variants: its guidance scales, and a LoRA's scales.

    A text is a name alone for `base`, or `name=path` of a LoRA or a pipeline, and words for a sampler of
    its own, as `dpo=runs/dpo guidance=3 steps=50`; a folder that is neither is an InputError.
    """
    families: dict[str, dict[str, Generator]] = {}
    for text in texts:
        name, path, words = parse_system(text, CHANGES)
        if name in families:
            raise InputError(f"{name!r} is named twice among the systems; name each once")
        families[name] = {}
        own = any(word.startswith("guidance=") for word in words)
        for guidance in [None] if own else guidance_scales or [None]:
            at, swept = base, ""
            if guidance is not None:
                at = changed(base, [f"guidance={guidance}"], "--guidance_scales")
                swept = f", guidance {guidance:g}"
            for scaled, generator in _at_scales(at, path, lora_scales):
                label = f"{name}{scaled}{swept}"
                if any(label in variants for variants in families.values()):
                    raise InputError(f"{label!r} is named twice among the systems; name each once")
                families[name][label] = changed(generator, words, f"--systems {text!r}")
    return families


def _at_scales(base: Generator, path: str, lora_scales: Sequence[float]) -> list[tuple[str, Generator]]:
    """What a system's path makes of the base model, and how each is called: a LoRA at its scales."""
    folder = Path(path)
    if not path:
        return [("", base)]
    if (folder / MODEL_FILE).is_file() and not (folder / ADAPTER_FILE).is_file():
        return [("", replace(base, model=path, revision=None, variant=None))]
    adapter_file(path)  # which says what is wrong with it
    alone = list(lora_scales) == [1.0]
    return [
        ("" if alone else f" at {scale:g}", replace(base, adapter=path, adapter_scale=scale))
        for scale in lora_scales
    ]


@dataclass(frozen=True)
class VlmSystem:
    """A vision-language model, with or without an adapter in peft's format; `dtype` as torch calls it."""

    model: str
    adapter: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    load_in_4bit: bool = False

    @property
    def base(self) -> "VlmSystem":
        """The model without the adapter."""
        return replace(self, adapter=None)


def vlm_systems(texts: Sequence[str], base: VlmSystem) -> dict[str, VlmSystem]:
    """Systems by name, from texts such as `sft=runs/vlm_sft`; a name without a path is the base model.

    A path is the folder of an adapter or of a whole model, or an adapter's hub id; one that is neither is an
    InputError.
    """
    named = [parse_system(text) for text in texts]
    check_each_once("systems", [system.name for system in named], least=2)
    return {system.name: _at(system.path, base) if system.path else base for system in named}


def _at(path: str, base: VlmSystem) -> VlmSystem:
    folder = Path(path)
    if not folder.exists() and is_local_path(path):
        raise InputError(f"--systems: there is no {path} here")
    if (folder / ADAPTER_CONFIG).is_file() or not folder.exists():
        return replace(base, adapter=path)
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return replace(base, model=str(folder), revision=None)
    inside = f"; name {folder / 'model'}" if (folder / "model" / "config.json").is_file() else ""
    raise InputError(f"--systems: {folder} holds neither an adapter nor a model{inside}")
