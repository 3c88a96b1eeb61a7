"""Ways in which a file can be damaged: each takes the path of a whole one, and changes it in place."""

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]

NESTED = 100_000  # brackets, more than any parser goes down by recursion


def text(content: str | bytes) -> Damage:
    """Another content."""
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def options(**changes: Any) -> Damage:
    """A JSON file with some of its entries changed; None takes one out."""

    def change(path: Path) -> None:
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change


def half(path: Path) -> None:
    """The first half of the file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def folder(path: Path) -> None:
    """A folder in its place."""
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """A pipe in its place, which whoever opens it waits on."""
    import os

    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    """A link to itself in its place."""
    path.unlink()
    path.symlink_to(path)


SPECIAL = ("a folder", "a pipe", "a device", "a link to itself", "nothing")


def special(place: Path, kind: str) -> Path:
    """The path of something that is no ordinary file, one of SPECIAL: made at `place`, but for the device."""
    if kind == "a device":
        return Path("/dev/zero")
    if kind != "nothing":
        place.touch()
        {"a folder": folder, "a pipe": pipe, "a link to itself": loop}[kind](place)
    return place


class Runs:
    """What, unpickled, leaves a file `unpickled` in the current folder."""

    def __reduce__(self):
        return exec, ("open('unpickled', 'w').close()",)


def pickled(path: Path) -> None:
    """A pickle in its place that runs code when it is loaded."""
    path.write_bytes(pickle.dumps(Runs()))


PLACES: Mapping[str, Damage] = {
    "is gone": Path.unlink,
    "is a folder": folder,
    "is a pipe": pipe,
    "is a link to itself": loop,
}
JSON: Mapping[str, Damage] = {
    "is empty": text(b""),
    "is half a file": half,
    "is an opening bracket": text("{"),
    "is a list": text("[]"),
    "is null": text("null"),
    "is a number": text("17"),
    "is no text": text(bytes(range(256))),
    "is nested too deep": text("[" * NESTED),
    "holds one that is nested too deep": text('{"a":' + "[" * NESTED),
}


# Safetensors


def tensors(change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Damage:
    """A file of safetensors with its tensors changed; its header's metadata stay."""

    def rewrite(path: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        values = load_file(path)
        changed = change(values)
        save_file(values if changed is None else changed, path, metadata)

    return rewrite


def without_one(values: dict[str, Any]) -> None:
    """Without the last tensor."""
    del values[max(values)]


def of_another_shape(values: dict[str, Any]) -> None:
    """The first one with a row more."""
    import torch

    name = min(name for name, value in values.items() if value.ndim)
    values[name] = torch.cat([values[name], values[name][:1]])


def not_a_number(values: dict[str, Any]) -> None:
    """One value is a NaN."""
    values[min(values)].view(-1)[0] = float("nan")


def infinite(values: dict[str, Any]) -> None:
    """One value is infinite."""
    values[max(values)].view(-1)[-1] = float("inf")


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """All names with something in front."""
    return {f"module.{name}": value for name, value in values.items()}


def header(content: bytes, size: int | None = None) -> Damage:
    """Nothing but a header, which says it has another size."""
    return text(struct.pack("<Q", len(content) if size is None else size) + content)


def overlapping(path: Path) -> None:
    """A header whose tensors lie outside of the file."""
    content = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    header(content)(path)


def metadata(**entries: str) -> Damage:
    """Another header, the tensors as they are."""

    def rewrite(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(load_file(path), path, entries)

    return rewrite


def without_partner(values: dict[str, Any]) -> None:
    """A LoRA's first factor without its second."""
    del values[min(name for name in values if "lora_B" in name)]


WEIGHTS: Mapping[str, Damage] = {
    "is empty": text(b""),
    "is half a file": half,
    "is no text": text(bytes(range(256))),
    "says that its header has 2**60 bytes": header(b"{}", 2**60),
    "has a header of brackets": header(b"[" * NESTED),
    "has tensors that lie outside of it": overlapping,
    "is a pickle": pickled,
    "holds no tensors": tensors(lambda _: {}),
    "lacks a tensor": tensors(without_one),
    "holds a tensor of another shape": tensors(of_another_shape),
    "holds a NaN": tensors(not_a_number),
    "holds an infinite value": tensors(infinite),
    "names all tensors otherwise": tensors(renamed),
}
