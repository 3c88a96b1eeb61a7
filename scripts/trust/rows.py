"""Tables that the trials begin from: two good rows of each format, and how files store them."""

import json
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet
from pictures import png

from prefopt.diffusion.tables import read_preferences, read_sft
from prefopt.errors import InputError
from prefopt.vlm.examples import read_vision_examples

LONG = "x" * 5000
SECRET = Path("/etc/hostname")  # a file of the user's that no table may lead to


def picture(number: int) -> str:
    """The path of a picture beside a table."""
    return f"pictures/{number}.png"


def talk(*texts: str, keys: tuple[str, str] = ("from", "value")) -> list[dict]:
    """Messages of the user and the assistant in turn."""
    roles = ("human", "gpt") if keys[0] == "from" else ("user", "assistant")
    return [
        {keys[0]: roles[place % 2], keys[1]: text}
        for place, text in enumerate(
            f"<image>{text}" if place == 0 else text for place, text in enumerate(texts)
        )
    ]


CHAT = ("role", "content")
ANSWERS = {"chosen": "A cat.", "rejected": "A dog."}
SHOWN = {"images": [picture(0)]}


class Format(NamedTuple):
    """A format of tables: who reads it, two good rows, and the columns of its texts and images."""

    read: Callable[[str], Any]
    rows: tuple[dict, dict]
    texts: tuple[str, ...]
    images: tuple[str, ...]


def _pairs(source: str) -> Any:
    return read_vision_examples(source, "pairs")


def _answers(source: str) -> Any:
    return read_vision_examples(source, "sft")


def _two(first: dict, **second: Any) -> tuple[dict, dict]:
    return first, first | second


FORMATS = {
    "pairs": Format(
        read_preferences,
        _two({"prompt": "a", "chosen": picture(0), "rejected": picture(1)}, prompt="b"),
        ("prompt",),
        ("chosen", "rejected"),
    ),
    "ranked": Format(
        read_preferences,
        _two({"prompt": "a", "images": [picture(0), picture(1)], "ranks": [1, 2]}, prompt="b"),
        ("prompt",),
        ("images",),
    ),
    "pickapic": Format(
        read_preferences,
        _two(
            {
                "caption": "a",
                "jpg_0": picture(0),
                "jpg_1": picture(1),
                "label_0": 1,
                "label_1": 0,
                "has_label": True,
            },
            caption="b",
        ),
        ("caption",),
        ("jpg_0", "jpg_1"),
    ),
    "votes": Format(
        read_preferences,
        _two(
            {"prompt": "a", "image1": picture(0), "image2": picture(1), "votes_image1": 3, "votes_image2": 1},
            prompt="b",
        ),
        ("prompt",),
        ("image1", "image2"),
    ),
    "hpdv2_lists": Format(
        read_preferences,
        _two({"prompt": "a", "image_path": [picture(0), picture(1)], "rank": [0, 1]}, prompt="b"),
        ("prompt",),
        ("image_path",),
    ),
    "hpdv2_pairs": Format(
        read_preferences,
        _two({"prompt": "a", "file_path": [picture(0), picture(1)], "human_preference": [1, 0]}, prompt="b"),
        ("prompt",),
        ("file_path",),
    ),
    "imagereward": Format(
        read_preferences,
        _two(
            {"prompt": "a", "image_path": picture(0), "rank": 1, "prompt_id": "x"},
            image_path=picture(1),
            rank=2,
        ),
        ("prompt",),
        ("image_path",),
    ),
    "sft": Format(
        read_sft, _two({"text": "a", "image": picture(0)}, image=picture(1)), ("text",), ("image",)
    ),
    "trl_pairs": Format(
        _pairs, _two(SHOWN | {"prompt": "What?"} | ANSWERS), ("prompt", "chosen", "rejected"), ("images",)
    ),
    "trl_without_prompt": Format(
        _pairs,
        _two(
            SHOWN
            | {
                "chosen": talk("What?", "A cat.", keys=CHAT),
                "rejected": talk("What?", "A dog.", keys=CHAT),
            }
        ),
        ("chosen", "rejected"),
        ("images",),
    ),
    "rlaifv": Format(
        _pairs,
        _two({"image": picture(0), "question": "What?"} | ANSWERS),
        ("question", "chosen", "rejected"),
        ("image",),
    ),
    "sharegpt": Format(
        _pairs,
        _two(
            SHOWN
            | {
                "conversations": talk("What?"),
                "chosen": {"from": "gpt", "value": "A cat."},
                "rejected": {"from": "gpt", "value": "A dog."},
            }
        ),
        ("conversations", "chosen", "rejected"),
        ("images",),
    ),
    "llava": Format(
        _answers,
        _two({"image": picture(0), "conversations": talk("What?", "A cat.")}),
        ("conversations",),
        ("image",),
    ),
    "messages": Format(
        _answers,
        _two(SHOWN | {"messages": talk("What?", "A cat.", keys=CHAT)}),
        ("messages",),
        ("images",),
    ),
    "completions": Format(
        _answers,
        _two(SHOWN | {"prompt": "What?", "completion": "A cat."}),
        ("prompt", "completion"),
        ("images",),
    ),
}


# Files


def write_pictures(folder: Path) -> None:
    """The pictures that the rows name, and things beside them that are none."""
    place = folder / "pictures"
    place.mkdir(parents=True)
    for number in range(4):
        (place / f"{number}.png").write_bytes(png(number))
    (place / "link.png").symlink_to(SECRET)
    (place / "loop.png").symlink_to("loop.png")
    (place / "zeros.png").symlink_to("/dev/zero")
    os.mkfifo(place / "pipe.png")
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(place / "socket.png"))
    (folder.parent / "outside.png").write_bytes(png(5))


def write_rows(folder: Path, rows: Sequence[dict], kind: str = "jsonl", name: str = "train") -> Path:
    """Rows in a file (or as a folder) of a kind, beside the pictures; what a reader is to be given."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pictures").exists():
        write_pictures(folder)
    file = folder / f"{name}.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        file.write_text(json.dumps(list(rows)))
    elif kind == "csv":
        cells = [list(rows[0]), *(row.values() for row in rows)]
        quoted = [[_cell(cell) for cell in line] for line in cells]
        file.write_text("".join(",".join(line) + "\n" for line in quoted))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    elif kind == "arrow":
        table = pyarrow.Table.from_pylist(list(rows))
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset.from_list(list(rows)).save_to_disk(folder / name)
        return folder
    return file


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return '"' + text.replace('"', '""') + '"'


def reading(form: str, rows: Sequence[dict], kind: str = "jsonl") -> Callable[[Path], Any]:
    """Read rows from a file of this kind."""

    def act(folder: Path) -> Any:
        return FORMATS[form].read(str(write_rows(folder / "data", rows, kind)))

    return act


def made(make: Callable[[Path], object], name: str = "data", **options: Any) -> Callable[[Path], Any]:
    """Read what `make` left in the folder `data`, or the `name` there."""

    def act(folder: Path) -> Any:
        place = folder / "data"
        place.mkdir()
        make(place)
        return read_preferences(str(folder / name), **options)

    return act


def write_pairs_at(file: Path, **changes: Any) -> None:
    """Two pairs as a Parquet file, with their pictures beside it."""
    rows = FORMATS["pairs"].rows
    write_pictures(file.parent)
    table = pyarrow.Table.from_pylist(
        [row | {n: v[i] for n, v in changes.items()} for i, row in enumerate(rows)]
    )
    pyarrow.parquet.write_table(table, file)


def or_refused(act: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Read what may still be whole: rows, or a clear error."""

    def both(folder: Path) -> None:
        with suppress(InputError):
            act(folder)

    return both
