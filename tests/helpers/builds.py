"""What a build wrote."""

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import torch
from huggingface_hub import metadata_load

from prefopt.ledger import Ledger
from prefopt.records import load


def build_of(folder: Path) -> dict[str, Any]:
    """Its BUILD.json."""
    return json.loads((folder / "BUILD.json").read_text())


def calls(folder: Path) -> list[int]:
    """How often its last run called each model."""
    return list(build_of(folder)["run"]["calls"].values())


def contents(folder: Path) -> dict[str, Any]:
    """Every table but for timings, and every picture's bytes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if "work" in path.parts or not path.is_file():
            continue
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            timings = [name for name in table.column_names if name == "seconds"]
            found[str(path.relative_to(folder))] = table.drop_columns(timings)
        elif path.suffix == ".webp" or path.name == "metadata.jsonl":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def header_of(folder: Path) -> dict[str, Any]:
    """What the card of a build says to the hub and to datasets."""
    found = metadata_load(folder / "README.md")
    assert found is not None
    return found


def check_is_a_dataset(folder: Path, copy: Path, default: str) -> None:
    """A build is read by datasets and by us, and a download of its upload as well: every table and split."""
    header, counted = header_of(folder), build_of(folder)["rows"]
    configs = {config["config_name"]: config for config in header["configs"]}
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("work", ".lock"))
    (copy / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "README.md.metadata").write_text("0")
    assert [name for name, config in configs.items() if config.get("default")] == [default]
    for place in map(str, (folder, copy)):
        for name, config in configs.items():
            splits: Any = datasets.load_dataset(place, name)
            assert set(splits) == {files["split"] for files in config["data_files"]}
            count = counted[name]
            assert {split: len(rows) for split, rows in splits.items()} == (
                dict(count) if isinstance(count, dict) else {"train": count}
            )
            for split, rows in splits.items():
                ours = load(place, split=split, config=name, revision=None).rows
                assert len(ours) == len(rows) and ours.column_names == rows.column_names
        by_default: Any = datasets.load_dataset(place, split="train")
        assert by_default.column_names == datasets.load_dataset(place, default, split="train").column_names
        found = load(place, split="train[:1]", config=None, revision=None)
        assert found.name == f"{place}/{default}, train[:1]" and len(found.rows) == 1
        assert found.rows.column_names == by_default.column_names


def die_at_write(moment: int) -> None:
    """A hook: kill -9 in place of the so-manieth write of results or of a table, counted from 0."""
    counted = _dying_at(moment)

    def added(self: Ledger, results: dict[str, Any]) -> None:
        assert not any(key in self for key in results), "a result was computed twice"
        add(self, results)

    add = Ledger.add
    Ledger.add = counted(added)
    pq.ParquetWriter.write_table = counted(pq.ParquetWriter.write_table)


def die_at_rename(moment: int) -> None:
    """A hook: kill -9 in place of the so-manieth renaming, counted from 0."""
    os.replace = _dying_at(moment)(os.replace)


def _dying_at(moment: int) -> Callable[[Callable], Callable]:
    """What makes functions kill the process at their so-manieth call together."""
    calls = iter(range(moment))

    def counted(original: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapper

    return counted


def kept(folder: Path, name: str) -> list[str]:
    """The keys of all results in a build's ledger; one that two processes kept comes twice."""
    found = []
    for file in sorted((folder / "work").glob(f"{name}-*.sqlite")):
        with ledger_file(file) as rows:
            found += [key for (key,) in rows.execute("SELECT key FROM results")]
    return found


def values(file: Path) -> dict[str, Any]:
    """The results in a file of a ledger."""
    with ledger_file(file) as rows:
        return {key: json.loads(value) for key, value in rows.execute("SELECT key, value FROM results")}


def forget(file: Path, keys: Collection[str]) -> None:
    """Take results out of a file of a ledger."""
    with ledger_file(file) as rows, rows:
        rows.executemany("DELETE FROM results WHERE key = ?", [(key,) for key in keys])


@contextmanager
def ledger_file(file: Path) -> Iterator[sqlite3.Connection]:
    """An open file of a ledger."""
    assert file.is_file()
    with closing(sqlite3.connect(file)) as rows:
        yield rows


def kill_at(moment: int, work: Callable, *arguments: Any) -> None:
    """Do the work in a process that kills itself with SIGKILL at its so-manieth write."""
    _kill(die_at_write, moment, work, *arguments)


def kill_at_rename(moment: int, work: Callable, *arguments: Any) -> None:
    """Do the work in a process that kills itself with SIGKILL at its so-manieth renaming."""
    _kill(die_at_rename, moment, work, *arguments)


def _kill(hook: Callable[[int], None], moment: int, work: Callable, *arguments: Any) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_dying, args=(hook, moment, work, *arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _dying(hook: Callable[[int], None], moment: int, work: Callable, *arguments: Any) -> None:
    # Torch renews its thread pool in a fork at the first use; two threads that do it at once would crash.
    torch.set_num_threads(torch.get_num_threads())
    hook(moment)
    work(*arguments)


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table."""
    return pq.read_table(folder / name).to_pylist()


def texts_of(pair: dict[str, Any]) -> list[str]:
    """The chosen and the rejected answer of a pair of answers."""
    return [pair[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
