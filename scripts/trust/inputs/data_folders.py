"""Folders and names of datasets: saved ones that are damaged or lead elsewhere, pictures, pipes, splits."""

import io
import json
import os
import random
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from pictures import png
from rows import FORMATS, LONG, made, picture, write_pairs_at, write_pictures
from trial import Trial
from world import World

from data_builders.images.real import Limits, read_real
from prefopt.diffusion.tables import read_preferences, read_sft

# Saved datasets


def _saved(file: str, content: Any, *, splits: bool = False) -> Callable[[Path], None]:
    """A saved dataset (or several splits) of which one JSON file has other content, or other values."""

    def make(folder: Path) -> None:
        rows = datasets.Dataset.from_list(list(FORMATS["pairs"].rows))
        (datasets.DatasetDict({"train": rows}) if splits else rows).save_to_disk(folder / "saved")
        write_pictures(folder / "saved")
        place = folder / "saved" / file
        text = json.dumps(json.loads(place.read_text()) | content) if isinstance(content, dict) else content
        place.unlink()
        if text is not None:
            place.write_text(text)
        rows.save_to_disk(folder / "other")
        if not splits:
            (folder / "saved" / "link.arrow").symlink_to(next((folder / "other").glob("*.arrow")))

    return make


def _files(*names: Any) -> dict:
    return {"_data_files": [{"filename": name} for name in names]}


BROKEN_JSON = {
    "torn": "{",
    "a list": "[]",
    "null": "null",
    "empty": "",
    "text": '"a"',
    "deep": "[" * 100_000,
    "no JSON": "\0\1",
}
SAVED: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    **{f"state.json {what}": ("state.json", text, ("state.json",)) for what, text in BROKEN_JSON.items()},
    # What the files say of their columns counts, not dataset_info.json.
    **{f"dataset_info.json {what}": ("dataset_info.json", text, ()) for what, text in BROKEN_JSON.items()},
    "no dataset_info.json": ("dataset_info.json", None, ()),
    "an empty state": ("state.json", "{}", ("state.json",)),
    "files null": ("state.json", {"_data_files": None}, ("state.json", "_data_files")),
    "files empty": ("state.json", {"_data_files": []}, ("state.json", "_data_files")),
    "files as texts": ("state.json", {"_data_files": ["a"]}, ("state.json", "_data_files")),
    "a file that is a number": ("state.json", _files(7), ("state.json", "_data_files")),
    "a file outside": ("state.json", _files("../other/data-00000-of-00001.arrow"), ("state.json", "other")),
    "a file at a root": ("state.json", _files("/etc/hostname"), ("state.json", "hostname")),
    "a file by a link": ("state.json", _files("link.arrow"), ("state.json", "link.arrow")),
    "a file that is not there": ("state.json", _files("no.arrow"), ("state.json", "no.arrow")),
    "a file that is a folder": ("state.json", _files("."), ("state.json",)),
    "a file with nul": ("state.json", _files("a\0"), ("state.json",)),
    "a file by URL": ("state.json", _files("file:///etc/hostname"), ("state.json",)),
    "a format of numbers": ("state.json", {"_format_type": "numpy"}, ()),
    "an unknown format": ("state.json", {"_format_type": "cats"}, ()),
    "wrong columns of a format": ("state.json", {"_format_columns": ["no"]}, ()),
    "few columns of a format": ("state.json", {"_format_columns": ["prompt"]}, ()),
    "a split that is a list": ("state.json", {"_split": ["train"]}, ()),
    "a fingerprint with a path": ("state.json", {"_fingerprint": "../../x"}, ()),
    "a fingerprint null": ("state.json", {"_fingerprint": None}, ()),
    "features null": ("dataset_info.json", {"features": None}, ()),
    "features of another table": (
        "dataset_info.json",
        {"features": {"a": {"_type": "Value", "dtype": "string"}}},
        (),
    ),
    "features as a list": ("dataset_info.json", {"features": [1]}, ()),
    "an unknown feature": (
        "dataset_info.json",
        {"features": {"prompt": {"_type": "Cat"}}},
        (),
    ),
}
DICTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "torn": ("{", ("dataset_dict.json",)),
    "a list": ("[]", ("dataset_dict.json",)),
    "without splits": ("{}", ("dataset_dict.json",)),
    "splits as text": ('{"splits": "train"}', ("dataset_dict.json",)),
    "a split outside": ('{"splits": ["../other"]}', ("dataset_dict.json",)),
    "a split that is not there": ('{"splits": ["train", "test"]}', ()),
    "a split that is a number": ('{"splits": [1]}', ("dataset_dict.json",)),
    "no splits": ('{"splits": []}', ("dataset_dict.json|split",)),
}


def _saved_datasets() -> Iterator[Trial]:
    for what, (file, content, says) in SAVED.items():
        yield Trial(f"saved: {what}", made(_saved(file, content), "data/saved"), says)
    for what, (text, says) in DICTS.items():
        make = _saved("dataset_dict.json", text, splits=True)
        yield Trial(f"saved splits: {what}", made(make, "data/saved"), says)


# Folders of images


def _imagefolder(lines: str | bytes, name: str = "metadata.jsonl") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_pictures(folder)
        for bad in ("pipe", "socket", "zeros", "link", "loop"):
            (folder / "pictures" / f"{bad}.png").unlink()
        (folder / name).write_bytes(lines.encode() if isinstance(lines, str) else lines)

    return make


def _line(**values: Any) -> str:
    return json.dumps({"file_name": picture(0), "text": "a"} | values) + "\n"


def _archive(folder: Path) -> None:
    (folder / "a.png").write_bytes(png(0))
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.writestr("b.png", png(1))


def _script(folder: Path) -> None:
    _imagefolder(_line())(folder)
    (folder / "data.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n")


def _pickle(folder: Path) -> None:
    (folder / "train.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


def _not_run(folder: Path) -> None:
    assert not list(folder.rglob("ran")), "code of the dataset was run"


FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "good": (_imagefolder(_line()), ()),
    "torn": (_imagefolder(_line() + '{"file_name": '), ("metadata.jsonl", "line 2")),
    "no file names": (_imagefolder('{"text": "a"}\n'), ("metadata.jsonl|data", "file_name")),
    "a missing picture": (_imagefolder(_line(file_name="no.png")), ("no.png",)),
    "a number for a picture": (_imagefolder(_line(file_name=7)), ("metadata.jsonl|data", "file_name")),
    "null for a picture": (_imagefolder(_line() + _line(file_name=None)), ("row 1",)),
    "a picture outside": (_imagefolder(_line(file_name="../outside.png")), ("outside",)),
    "a picture at a root": (_imagefolder(_line(file_name="/etc/hostname")), ("hostname",)),
    "a picture by URL": (_imagefolder(_line(file_name="file:///etc/hostname")), ("hostname",)),
    "a picture by chain": (_imagefolder(_line(file_name="zip://a::b.zip")), ("zip",)),
    "a picture with nul": (_imagefolder(_line(file_name="a\0.png")), ("row 0|metadata.jsonl",)),
    "no UTF-8": (_imagefolder(_line().encode() + b'{"file_name": "\xff", "text": "b"}'), ("metadata.jsonl",)),
    "deep": (_imagefolder("[" * 100_000), ("metadata.jsonl",)),
    "empty": (_imagefolder(""), ("metadata.jsonl",)),
    "a csv with other cells": (_imagefolder("file_name,text\na,b,c\nd\n", "metadata.csv"), ("metadata.csv",)),
    "an empty csv": (_imagefolder("", "metadata.csv"), ("metadata.csv",)),
    "a torn parquet": (_imagefolder("PAR1", "metadata.parquet"), ("metadata.parquet",)),
    "an archive": (_archive, ("more.zip", "unpack")),
    "a script": (_script, ()),
    "a pickle alone": (_pickle, ("data",)),
}


def _folders() -> Iterator[Trial]:
    for what, (make, says) in FOLDERS.items():

        def act(folder: Path, make: Callable[[Path], object] = make) -> Any:
            (folder / "data").mkdir()
            make(folder / "data")
            return read_sft(str(folder / "data"))

        yield Trial(f"imagefolder: {what}", act, says, None if says else _not_run)


# Shards of img2dataset


def _shard(samples: dict[str, bytes], change: Callable[[bytes], bytes] = bytes) -> Callable[[Path], None]:
    """A tar file of these members, its bytes changed."""

    def make(folder: Path) -> None:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, content in samples.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                if content.startswith(b"-> "):
                    member.type, member.linkname, member.size = tarfile.SYMTYPE, content[3:].decode(), 0
                tar.addfile(member, io.BytesIO(content))
        (folder / "00000.tar").write_bytes(change(file.getvalue()))

    return make


RUNS = b"cos\nsystem\n(S'touch ran'\ntR."  # a pickle that starts a program
SAMPLE = {"0.png": png(0), "0.txt": b"a", "0.json": b'{"url": "u"}'}
SHARDS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "good": (_shard(SAMPLE), ()),
    "pickles beside": (_shard(SAMPLE | {"0.pth": RUNS, "0.npy": RUNS, "0.pkl": RUNS, "0.pyd": RUNS}), ()),
    "names outside": (_shard({"../../0.png": png(0), "../../0.txt": b"a"}), ()),
    "a link to a file": (_shard({"0.png": b"-> /etc/hostname", "0.txt": b"a"}), ("data",)),
    "no pictures": (_shard({"0.txt": b"a"}), ("data", "none of its 1 rows")),
    "text that is no UTF-8": (_shard(SAMPLE | {"0.txt": b"\xff\xfe"}), ("00000.tar: 0.txt",)),
    "json that is none": (_shard(SAMPLE | {"0.json": b"{"}), ("00000.tar: 0.json",)),
    "json of another form": (_shard(SAMPLE | {"0.json": b"[1]"}), ("00000.tar: 0.json",)),
    "deep json": (_shard(SAMPLE | {"0.json": b"[" * 100_000}), ("00000.tar: 0.json",)),
    "nothing": (_shard({}), ("00000.tar|data",)),
    "no bytes": (_shard(SAMPLE, lambda content: b""), ("00000.tar",)),
    "noise": (_shard(SAMPLE, lambda content: random.Random(0).randbytes(5000)), ("00000.tar",)),
    "half": (_shard(SAMPLE, lambda content: content[:700]), ("00000.tar",)),
    "a pipe": (lambda folder: os.mkfifo(folder / "00000.tar"), ("00000.tar|data",)),
    "zeros": (lambda folder: (folder / "00000.tar").symlink_to("/dev/zero"), ("00000.tar|data",)),
}


def _shards() -> Iterator[Trial]:
    for what, (make, says) in SHARDS.items():

        def act(folder: Path, make: Callable[[Path], object] = make) -> Any:
            (folder / "data").mkdir()
            make(folder / "data")
            real = read_real(str(folder / "data"), Limits())
            return [real.content(record["item"]) for record in real.records]

        yield Trial(f"shard: {what}", act, says, None if says else _not_run)


# Names of datasets, and what is no file


def _special(name: str, kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        place = folder / name
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "folder":
            place.mkdir()
        elif kind == "zeros":
            place.symlink_to("/dev/zero")
        elif kind == "loop":
            place.symlink_to(name)
        else:
            socket.socket(socket.AF_UNIX).bind(os.path.relpath(place))

    return make


NAMES = (
    "",
    " ",
    "-",
    "--",
    "a\0b",
    LONG,
    "/" + LONG,
    "x/" * 2500,
    "/",
    "~",
    "//",
    "\n",
    "a b",
    "\u202e",
    "*",
    "../..",
    "https://localhost:1/data.json",
    "file:///etc/hostname",
    "hf://datasets/a/b",
    "s3://a/b",
    "zip://a::b",
    "csv",
    "json",
    "parquet",
    "imagefolder",
    "webdataset",
    "sql",
    "pandas",
    "a/b/c",
    "a/../b",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "/etc/hostname",
    "none",
    "org/none",
    "\ud800",
    "a" * 300,
)


def _names() -> Iterator[Trial]:
    for name in NAMES:
        yield Trial(
            f"name: {name[:30]!r} of {len(name)}", lambda folder, name=name: read_preferences(name), (".",)
        )
    for name in ("train.parquet", "train.jsonl", "train.json", "train.csv", "train.arrow", "train.png"):
        for kind in ("pipe", "folder", "zeros", "loop", "socket"):
            for source in ("data", f"data/{name}"):
                act = made(_special(name, kind), source)
                yield Trial(f"{kind} as {name}: {source}", act, ("data",))


SPLITS = (
    "train[::2]",
    "train[200%:]",
    "train[:200%]",
    "train[a:]",
    "train[",
    "test",
    "",
    " ",
    "train+",
    "+",
    "train[:1]+nope",
    "train[5:1]",
    "train[99:]",
    "TRAIN[:x]",
    "train[:50%](pct1_dropremainder)",
    "train\0",
    "../train",
    LONG,
    "train[-1%:-2%]",
    "all",
)


def _splits() -> Iterator[Trial]:
    for split in SPLITS:
        act = made(lambda folder: write_pairs_at(folder / "train.parquet"), split=split)
        yield Trial(f"split: {split[:30]!r}", act, ("split",))
    for config in ("nope", "", ".", "..", "/", "../data", "a\0", LONG, "*", "default"):
        act = made(lambda folder: write_pairs_at(folder / "train.parquet"), config=config)
        yield Trial(f"config: {config[:30]!r}", act, ("dataset_config",) if config else ())


def trials(world: World) -> Iterator[Trial]:
    """Saved datasets, folders of images, names, and splits."""
    yield from _saved_datasets()
    yield from _folders()
    yield from _shards()
    yield from _names()
    yield from _splits()
