"""Rows that are broken, in every format of tables: paths of pictures, texts, ranks, labels, messages."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rows import FORMATS, LONG, SECRET, picture, reading, write_rows
from trial import Trial, program
from world import World

PATHS = {
    "missing": ("pictures/99.png", "not there"),
    "empty": ("", ""),
    "folder": ("pictures", ""),
    "parent": ("../outside.png", "outside"),
    "absolute": (str(SECRET), "outside"),
    "link": ("pictures/link.png", "outside"),
    "link loop": ("pictures/loop.png", ""),
    "device": ("pictures/zeros.png", ""),
    "pipe": ("pictures/pipe.png", ""),
    "socket": ("pictures/socket.png", ""),
    "nul": ("pictures/\0.png", ""),
    "long": (LONG, ""),
    "number": (7, ""),
    "object": ({"a": 1}, ""),
    "file url": (f"file://{SECRET}", ""),
    "http": ("http://localhost:1/x.png", ""),
    "zip": ("zip://a.png::pictures/0.png", ""),
    "simplecache": ("simplecache::file:///etc/hostname", ""),
    "hf": ("hf://datasets/a/b/x.png", ""),
}
TEXTS: dict[str, Any] = {
    "null": None,
    "number": 7,
    "list of numbers": [1, 2],
    "object": {"a": 1},
    "surrogate": "\ud800",
}


def _cells() -> Iterator[Trial]:
    for form, (_, (first, second), texts, images) in FORMATS.items():
        column = images[-1]
        for what, (path, said) in PATHS.items():
            value = (
                [path, picture(1)] if isinstance(second[column], list) and len(second[column]) > 1 else path
            )
            value = [path] if isinstance(second[column], list) and not isinstance(value, list) else value
            rows = [first, second | {column: value}]
            yield Trial(f"{form}: {column} {what}", reading(form, rows), ("row 1", column, said))
        for text in texts:
            for what, value in TEXTS.items():
                rows = [first, second | {text: value}]
                name = "prompt" if text in ("caption", "text") else text
                says = ("line 2", "half of a character") if what == "surrogate" else ("row 1", name)
                yield Trial(f"{form}: {text} {what}", reading(form, rows), says)
        for column in (*texts[-1:], *images[-1:]):
            lost = [{name: value for name, value in row.items() if name != column} for row in (first, second)]
            yield Trial(f"{form}: no {column}", reading(form, lost), ("no column",))


VALUES: dict[str, dict[str, list[Any]]] = {
    "pairs": {
        "margin": [-1, "wide", float("nan"), float("inf"), [1]],
        "p_chosen": [2, -0.5, "half", float("nan"), None],
    },
    "ranked": {"ranks": [[1], [1, 2, 3], None, [1, -2], [1, None], [1, 1.5], ["1", "2"], "1", 1]},
    "pickapic": {
        "label_0": [7, -3, None, "1", float("nan"), True, 0.3],
        "has_label": ["True", 7, None, 0.5],
    },
    "votes": {"votes_image1": [-1, 1.5, None, "3", float("nan"), True]},
    "hpdv2_lists": {"rank": [[0], None, [0, -1], ["0", "1"], 0]},
    "hpdv2_pairs": {"human_preference": [[1], None, [2, 0], [1, 0, 0], ["1", "0"], 1]},
    "imagereward": {"rank": [None, -1, 1.5, "1", True], "prompt_id": [None]},
    "trl_pairs": {"p_chosen": [2, -0.5, "half", None], "tools": ["x"], "videos": [["x"]]},
    "llava": {"system": [7]},
}
MESSAGES = {
    "no messages": [],
    "no role": [{"value": "a"}],
    "no content": [{"from": "human"}],
    "unknown role": [{"from": "cat", "value": "a"}],
    "a role that is a number": [{"from": 1, "value": "a"}],
    "content that is a number": [{"from": "human", "value": 1}],
    "an unknown block": [{"from": "human", "value": [{"type": "video", "text": "a"}]}],
    "only the user": [{"from": "human", "value": "<image>a"}],
    "only the assistant": [{"from": "gpt", "value": "a"}],
    "two images": [{"from": "human", "value": "<image><image>a"}, {"from": "gpt", "value": "b"}],
    "an empty answer": [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": " "}],
    "an image that is answered": [
        {"from": "human", "value": "<image>a"},
        {"from": "gpt", "value": "<image>"},
    ],
    "nested text": "[" * 3000 + "]" * 3000,
}


def _values() -> Iterator[Trial]:
    for form, columns in VALUES.items():
        first, second = FORMATS[form].rows
        for column, values in columns.items():
            for value in values:
                rows = [first | {column: second.get(column)}, second | {column: value}]
                if column not in first:
                    rows[0][column] = {"margin": 1, "p_chosen": 0.5}.get(column)
                name = (
                    "label"
                    if column.startswith("label")
                    else "votes"
                    if column.startswith("votes")
                    else column
                )
                name = "rank" if name.startswith("rank") else name
                yield Trial(f"{form}: {column} {value!r}", reading(form, rows), ("row [01]", name))
    first, second = FORMATS["llava"].rows
    for what, messages in MESSAGES.items():
        rows = [first, second | {"conversations": messages}]
        yield Trial(f"llava: {what}", reading("llava", rows), ("row 1", "conversations"))


# Programs

BROKEN = (  # a program, its table, the column that is changed to what, and what the error says
    ("diffusion_dpo", "pairs", "rejected", "../outside.png", ("row 1", "rejected", "outside")),
    ("diffusion_cpo", "ranked", "ranks", [1], ("row 1", "ranks")),
    ("diffusion_sft", "sft", "image", "pictures/zeros.png", ("row 1", "image")),
    ("vlm_dpo", "trl_pairs", "images", [7], ("row 1", "images")),
    ("vlm_dpo", "trl_without_prompt", "images", ["http://localhost:1/a.png"], ("row 1", "images", "URL")),
    ("vlm_sft", "llava", "conversations", [], ("row 1", "conversations")),
)


def _running(world: World, name: str, form: str, changes: dict[str, Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        first, second = FORMATS[form].rows
        file = write_rows(folder / "data", [first, second | changes])
        program(name, world.options(name) | {"dataset_name": file})(folder)

    return act


def trials(world: World) -> Iterator[Trial]:
    """Every format as it should be in every kind of file, then with every fault of its cells."""
    for form in FORMATS:
        for kind in ("jsonl", "json", "parquet", "arrow", "saved"):
            yield Trial(f"{form}: good as {kind}", reading(form, FORMATS[form].rows, kind))
    yield from _cells()
    yield from _values()
    for name, form, column, value, says in BROKEN:
        yield Trial(f"{name}: {column} {value}", _running(world, name, form, {column: value}), says)
