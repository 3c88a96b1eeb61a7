"""What a build wrote."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from prefopt import store


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


def die_at_write(moment: int) -> None:
    """A hook: kill -9 in place of the so-manieth write of results or of a table, counted from 0."""
    writes = iter(range(moment))

    def counted(original: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(writes, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapper

    store.Ledger.add = counted(store.Ledger.add)
    pq.write_table = counted(pq.write_table)


def kept(folder: Path, name: str) -> list[str]:
    """The keys of all results in a build's ledger; one that was kept twice comes twice."""
    return [
        key
        for file in sorted((folder / "work").glob(f"{name}-*.jsonl"))
        for line in file.read_text().splitlines()
        if line
        for key in json.loads(line)
    ]


def kill_at(moment: int, work: Callable, *arguments: Any) -> None:
    """Do the work in a process that kills itself with SIGKILL at its so-manieth write."""
    process = multiprocessing.get_context("fork").Process(target=_dying, args=(moment, work, *arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _dying(moment: int, work: Callable, *arguments: Any) -> None:
    # Torch renews its thread pool in a fork at the first use; two threads that do it at once would crash.
    torch.set_num_threads(torch.get_num_threads())
    die_at_write(moment)
    work(*arguments)


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table."""
    return pq.read_table(folder / name).to_pylist()


def texts_of(pair: dict[str, Any]) -> list[str]:
    """The chosen and the rejected answer of a pair of answers."""
    return [pair[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
