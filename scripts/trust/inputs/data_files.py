"""Files of tables that are damaged, deep, huge or of other types, in every kind of file that is read."""

import gzip
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from pictures import png
from trial import Trial
from world import World

from inputs._tables import FORMATS, made, or_refused, picture, write_pairs_at, write_pictures, write_rows
from prefopt.diffusion.tables import read_preferences


def damaged(form: str, kind: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Read a good file whose bytes were changed; of a saved dataset, its one Arrow file."""

    def act(folder: Path) -> Any:
        source = write_rows(folder / "data", FORMATS[form].rows, kind)
        file = next((source / "train").glob("*.arrow")) if kind == "saved" else source
        file.write_bytes(change(file.read_bytes()))
        return FORMATS[form].read(str(source / "train" if kind == "saved" else source))

    return act


def _flipped(seed: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        chance = random.Random(seed)
        changed = bytearray(content)
        for _ in range(8):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        return bytes(changed)

    return change


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "first half": lambda content: content[: len(content) * 2 // 5],
    "last half": lambda content: content[len(content) * 2 // 5 :],
    "no last bytes": lambda content: content[:-5],
    "zeros": lambda content: bytes(len(content)),
    "noise": lambda content: random.Random(0).randbytes(len(content)),
    "gzip": gzip.compress,
    "utf-16": lambda content: content.decode("latin-1").encode("utf-16"),
    "html": lambda content: b"<!DOCTYPE html><html><body>404</body></html>",
}


def _bytes() -> Iterator[Trial]:
    for kind in ("jsonl", "json", "csv", "parquet", "arrow", "saved"):
        file = {"saved": "data-00000-of-00001.arrow"}.get(kind, f"train.{kind}")
        for what, change in BYTES.items():
            act = damaged("votes", kind, change)
            whole = (
                kind in ("arrow", "saved") and what == "no last bytes"
            )  # the end of the stream is optional
            yield Trial(f"{kind}: {what}", or_refused(act) if whole else act, () if whole else (file,))
        for seed in range(8):
            yield Trial(f"{kind}: flipped bits {seed}", or_refused(damaged("votes", kind, _flipped(seed))))


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    """Read a text file with this content."""

    def act(folder: Path) -> Any:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        write_pictures(folder)
        return read_preferences(str(folder / name))

    return act


GOOD = json.dumps(FORMATS["pairs"].rows[0])
OPEN = "[" * 100_000
PAIR_CELLS = "pictures/0.png,pictures/1.png"
TEXT_FILES: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    "deep": ("p.json", "[" * 100_000, ("p.json",)),
    "deep value": ("p.jsonl", GOOD + '\n{"a": ' + OPEN, ("p.jsonl", "line 2")),
    "deep objects": ("p.jsonl", '{"a":' * 100_000, ("p.jsonl", "line 1")),
    "deep, but whole": ("p.jsonl", GOOD[:-1] + ', "a": ' + "[" * 500 + "]" * 500 + "}", ()),
    "twice a key": ("p.jsonl", f'{GOOD}\n{GOOD[:-1]}, "prompt": "b"}}', ("p.jsonl", "line 2", "prompt")),
    "twice a key of a list": ("p.json", f'[{GOOD[:-1]}, "prompt": "b"}}]', ("p.json", "prompt")),
    "nan": ("p.jsonl", f'{GOOD[:-1]}, "margin": NaN}}', ("p.jsonl", "row 0", "margin")),
    "a number of 5,000 digits": (
        "p.jsonl",
        GOOD[:-1] + ', "margin": ' + "9" * 5000 + "}",
        ("p.jsonl", "line 1"),
    ),
    "a number of 30 digits": (
        "p.jsonl",
        GOOD[:-1] + ', "margin": ' + "9" * 30 + "}",
        ("p.jsonl", "row 0", "margin"),
    ),
    "1e999": ("p.jsonl", f'{GOOD[:-1]}, "margin": 1e999}}', ("p.jsonl", "row 0", "margin")),
    "nul": ("p.jsonl", GOOD.replace("a", "\0", 1), ("p.jsonl", "line 1")),
    "a torn line": ("p.jsonl", f"{GOOD}\n{GOOD[:20]}", ("p.jsonl", "line 2")),
    "two records on a line": ("p.jsonl", GOOD + GOOD, ("p.jsonl", "line 1")),
    "a comment": ("p.jsonl", f"# pairs\n{GOOD}", ("p.jsonl", "line 1")),
    "single quotes": ("p.jsonl", GOOD.replace('"', "'"), ("p.jsonl", "line 1")),
    "text": ("p.json", '"prompt"', ("p.json", "list of records")),
    "null": ("p.json", "null", ("p.json", "list of records")),
    "an empty list": ("p.json", "[]", ("p.json", "no records")),
    "empty records": ("p.json", "[{}, {}]", ("p.json", "row 0")),
    "all null": (
        "p.json",
        '[{"prompt": null, "chosen": null, "rejected": null}]',
        ("p.json", "row 0", "prompt"),
    ),
    "an empty name": ("p.jsonl", f'{GOOD[:-1]}, "": 1}}', ()),
    "crlf": ("p.jsonl", f"{GOOD}\r\n{GOOD}\r\n", ()),
    "bom": ("p.jsonl", f"\ufeff{GOOD}\n", ()),
    "utf-16": ("p.jsonl", GOOD.encode("utf-16"), ("p.jsonl", "UTF-8")),
    "latin-1": ("p.jsonl", GOOD.replace('"a"', '"\u00e4"').encode("latin-1"), ("p.jsonl", "UTF-8")),
    "a long line": ("p.jsonl", GOOD + " " * 200_000_000, ("p.jsonl", "line 1")),
    "a long prompt": ("p.jsonl", GOOD.replace('"a"', '"' + "a " * 2_000_000 + '"'), ()),
    "csv with semicolons": ("p.csv", "prompt;chosen;rejected\na;b;c\n", ("p.csv", "no column")),
    "csv with a deep cell": (
        "p.csv",
        f"prompt,chosen,rejected,margin\na,{PAIR_CELLS},{OPEN}\n",
        ("p.csv", "margin"),
    ),
    "csv with a cell of 4,500 digits": (
        "p.csv",
        f"prompt,chosen,rejected,margin\na,{PAIR_CELLS}," + "9" * 4500 + "\n",
        ("p.csv", "margin"),
    ),
    "csv with a long cell": (
        "p.csv",
        "prompt,chosen,rejected\n" + "a" * 200_000 + f",{PAIR_CELLS}\n",
        ("p.csv", "line 2"),
    ),
    "csv with an open quote": ("p.csv", 'prompt,chosen,rejected\n"a,b,c\n', ("p.csv", "line")),
    "csv with nul": ("p.csv", "prompt,chosen,rejected\n\0,pictures/0.png,pictures/1.png\n", ()),
    "csv without names": ("p.csv", "\n\na,b,c\n", ("p.csv",)),
    "csv with an empty name": ("p.csv", "prompt,chosen,rejected,\na,pictures/0.png,pictures/1.png,\n", ()),
    "csv of one line": ("p.csv", "prompt,chosen,rejected", ("p.csv", "no records")),
    "a long name": ("p.txt", GOOD, ("p.txt", "no table")),
}


def _texts() -> Iterator[Trial]:
    for what, (name, content, says) in TEXT_FILES.items():
        yield Trial(f"text: {what}", text(name, content), says)


def _table(**columns: Any) -> Callable[[Path], None]:
    """Write a Parquet file of these Arrow columns."""

    def make(folder: Path) -> None:
        write_pictures(folder)
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")

    return make


def _twice(folder: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 4, ["prompt", "prompt", "chosen", "rejected"])
    pyarrow.parquet.write_table(table, folder / "train.parquet")


def _deep(depth: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        kind = pyarrow.int64()
        for _ in range(depth):
            kind = pyarrow.list_(kind)
        columns = {"prompt": pyarrow.array(["a"]), "chosen": pyarrow.array([None], kind), "rejected": ["b"]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")

    return make


def _with_metadata(info: Any) -> Callable[[Path], None]:
    """A Parquet file whose own description of its columns is this."""

    def make(folder: Path) -> None:
        write_pairs_at(folder / "train.parquet")
        table = pyarrow.parquet.read_table(folder / "train.parquet")
        text = info if isinstance(info, str) else json.dumps({"info": info})
        pyarrow.parquet.write_table(
            table.replace_schema_metadata({"huggingface": text}), folder / "train.parquet"
        )

    return make


def _unlike(folder: Path) -> None:
    write_pairs_at(folder / "train-0.parquet")
    table = pyarrow.table({"prompt": [1], "other": [2]})
    pyarrow.parquet.write_table(table, folder / "train-1.parquet")


def _second_torn(folder: Path) -> None:
    write_pairs_at(folder / "train-0.parquet")
    (folder / "train-1.parquet").write_bytes((folder / "train-0.parquet").read_bytes()[:-9])


def _middle_torn(folder: Path) -> None:
    write_pairs_at(folder / "train-0.parquet")
    content = bytearray((folder / "train-0.parquet").read_bytes())
    content[4:200] = bytes(196)
    (folder / "train-1.parquet").write_bytes(bytes(content))


def _invalid_utf8() -> pyarrow.Array:
    texts = pyarrow.array([b"a", b"\xff\xfe"], pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, texts.buffers())


def _beyond_the_end(folder: Path) -> None:
    """An Arrow file whose second text lies far behind the end of the file."""
    file = write_rows(folder, [row | {"prompt": "a" * 77} for row in FORMATS["pairs"].rows], "arrow")
    places = struct.pack("<3i", 0, 77, 154)
    assert places in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(places, struct.pack("<3i", 0, 77, 2**30)))


CHOSEN, REJECTED = pyarrow.array([picture(0)] * 2), pyarrow.array([picture(1)] * 2)
AB = pyarrow.array(["a", "b"])
PARQUET: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a struct for a prompt": (
        _table(prompt=pyarrow.array([{"a": 1}, {"a": 2}]), chosen=CHOSEN, rejected=REJECTED),
        ("row 0", "prompt"),
    ),
    "a map for a prompt": (
        _table(
            prompt=pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            chosen=CHOSEN,
            rejected=REJECTED,
        ),
        ("prompt",),
    ),
    "bytes for a prompt": (
        _table(prompt=pyarrow.array([b"a", b"b"]), chosen=CHOSEN, rejected=REJECTED),
        ("row 0", "prompt"),
    ),
    "no UTF-8": (
        _table(prompt=_invalid_utf8(), chosen=CHOSEN, rejected=REJECTED),
        ("train.parquet|data", "prompt", "UTF"),
    ),
    "numbers for images": (
        _table(prompt=AB, chosen=pyarrow.array([1, 2]), rejected=REJECTED),
        ("chosen", "no images"),
    ),
    "dates for images": (
        _table(prompt=AB, chosen=pyarrow.array([1, 2], pyarrow.timestamp("s")), rejected=REJECTED),
        ("chosen", "no images"),
    ),
    "a dictionary of paths": (_table(prompt=AB, chosen=CHOSEN.dictionary_encode(), rejected=REJECTED), ()),
    "large texts": (
        _table(
            prompt=AB.cast(pyarrow.large_string()),
            chosen=CHOSEN.cast(pyarrow.large_string()),
            rejected=REJECTED,
        ),
        (),
    ),
    "text views": (_table(prompt=AB.cast(pyarrow.string_view()), chosen=CHOSEN, rejected=REJECTED), ()),
    "structs without a path": (
        _table(prompt=AB, chosen=pyarrow.array([{"bytes": png(0)}] * 2), rejected=REJECTED),
        (),
    ),
    "structs of text": (
        _table(prompt=AB, chosen=pyarrow.array([{"bytes": "x", "path": "y"}] * 2), rejected=REJECTED),
        ("chosen",),
    ),
    "structs of numbers": (
        _table(prompt=AB, chosen=pyarrow.array([{"bytes": 1, "path": 2}] * 2), rejected=REJECTED),
        ("chosen",),
    ),
    "an extension type": (
        _table(
            prompt=AB,
            chosen=CHOSEN,
            rejected=REJECTED,
            id=pyarrow.array([b"0123456789abcdef"] * 2, pyarrow.uuid()),
        ),
        ("train.parquet", "uuid"),
    ),
    "5,000 columns": (_table(**{f"c{i}": AB for i in range(5000)}), ("no column",)),
    "no rows": (_table(prompt=AB[:0], chosen=CHOSEN[:0], rejected=REJECTED[:0]), ("no rows",)),
    "no columns": (_table(), ("no rows|no column",)),
    "all null": (
        _table(prompt=pyarrow.nulls(2), chosen=pyarrow.nulls(2), rejected=pyarrow.nulls(2)),
        ("row 0|column",),
    ),
    "twice a column": (_twice, ("train.parquet", "prompt", "twice|two columns")),
    "deep lists": (_deep(50), ("train.parquet", "nested")),
    "very deep lists": (_deep(2000), ("train.parquet|chosen",)),
    "files unlike": (_unlike, ("train-1.parquet",)),
    "the second file torn": (_second_torn, ("train-1.parquet",)),
    "the second file damaged inside": (_middle_torn, ("train-1.parquet",)),
    "no JSON about it": (_with_metadata("{"), ("train.parquet",)),
    "a list about it": (_with_metadata([]), ()),
    "an unknown type about it": (
        _with_metadata({"features": {"prompt": {"_type": "Cat"}}}),
        ("train.parquet",),
    ),
    "a type without its name": (_with_metadata({"features": {"prompt": 3}}), ("train.parquet",)),
    "types of other columns": (
        _with_metadata({"features": {"other": {"_type": "Value", "dtype": "string"}}}),
        (),
    ),
    "an unknown dtype about it": (
        _with_metadata({"features": {"prompt": {"_type": "Value", "dtype": "os.system"}}}),
        ("train.parquet",),
    ),
    "prompts that are said to be sounds": (
        _with_metadata(
            {
                "features": {
                    "prompt": {"_type": "Audio"},
                    "chosen": {"_type": "Image"},
                    "rejected": {"_type": "Image"},
                }
            }
        ),
        (),
    ),
    "another column of sounds": (
        lambda folder: (
            write_pairs_at(folder / "train.parquet", note=["a.wav", "b.wav"]),
            _retyped(folder, "note", "Audio"),
        ),
        (),
    ),
    "another column of films": (
        lambda folder: (
            write_pairs_at(folder / "train.parquet", note=["a.mp4", "b.mp4"]),
            _retyped(folder, "note", "Video"),
        ),
        (),
    ),
    "another column of PDFs": (
        lambda folder: (
            write_pairs_at(folder / "train.parquet", note=["a.pdf", "b.pdf"]),
            _retyped(folder, "note", "Pdf"),
        ),
        (),
    ),
    "texts beyond the end": (_beyond_the_end, ("prompt",)),
}


def _retyped(folder: Path, name: str, kind: str) -> None:
    table = pyarrow.parquet.read_table(folder / "train.parquet")
    features = {
        column: {"_type": kind} if column == name else {"dtype": "string", "_type": "Value"}
        for column in table.column_names
    }
    text = json.dumps({"info": {"features": features}})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": text}), folder / "train.parquet"
    )


def _tables() -> Iterator[Trial]:
    for what, (make, says) in PARQUET.items():
        yield Trial(f"table: {what}", made(make), says)


def trials(world: World) -> Iterator[Trial]:
    """Bytes that are not those of the file, texts that are no JSON or CSV, columns of other types."""
    yield from _bytes()
    yield from _texts()
    yield from _tables()
