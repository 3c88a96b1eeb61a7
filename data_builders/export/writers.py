"""How exports are written: Parquet files or a folder of pictures, split by prompt, whole or not at all."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_builders.engine.stages import Group, Record
from data_builders.engine.tables import Columns, features
from data_builders.export.tables import Export
from prefopt.files import reporting_write_errors
from prefopt.records import in_test


class RowWriter(Protocol):
    """Takes the rows of a split, one after the other; `flush` ends it."""

    def add(self, row: Record) -> None: ...
    def flush(self) -> None: ...


class ParquetShards:
    """Parquet files of one split, a new one whenever the images of the last exceed `max_bytes`."""

    def __init__(self, folder: Path, split: str, columns: Columns, max_bytes: int):
        self.folder, self.split, self.max_bytes = folder, split, max_bytes
        self.schema = features(columns).arrow_schema
        self.files, self.size = 0, 0
        self.rows: list[Record] = []

    def add(self, row: Record) -> None:
        """Take a row; write a file if its images are many enough."""
        self.rows.append(row)
        self.size += sum(map(_bytes, row.values()))
        if self.size >= self.max_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        if self.rows:
            table = pa.Table.from_pylist(self.rows, schema=self.schema)
            pq.write_table(table, self.folder / f"{self.split}-{self.files:05d}.parquet")
            self.files, self.size, self.rows = self.files + 1, 0, []


class ImageFolder:
    """One split as pictures and a metadata.jsonl that names each one's text, as `imagefolder` reads them."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.lines = folder / split, []

    def add(self, row: Record) -> None:
        """Take a row with `image` and `prompt`."""
        self.folder.mkdir(exist_ok=True)
        name = f"{len(self.lines):06d}.webp"
        (self.folder / name).write_bytes(row["image"]["bytes"])
        self.lines.append(json.dumps({"file_name": name, "text": row["prompt"]}) + "\n")

    def flush(self) -> None:
        """Write the metadata."""
        if self.lines:
            (self.folder / "metadata.jsonl").write_text("".join(self.lines), encoding="utf-8")


def write_exports(
    groups: Iterable[Group],
    output: Path,
    exports: Mapping[str, Export],
    *,
    test_fraction: float,
    max_bytes: int,
) -> dict[str, Counter[str]]:
    """Write each export's folder under `output`, replacing it; the number of rows by export and split."""
    counts = {name: Counter[str]() for name in exports}
    staging = {name: output / f".{name}" for name in exports}
    with reporting_write_errors(output), _removed(staging.values()):
        writers = {
            (name, split): _writer(export, staging[name], split, max_bytes)
            for name, export in exports.items()
            for split in ("train", "test")
        }
        for group in groups:
            split = "test" if in_test(group.candidates[0]["prompt_id"], test_fraction) else "train"
            for name, export in exports.items():
                for row in export.rows(group):
                    writers[name, split].add(row)
                    counts[name][split] += 1
        for writer in writers.values():
            writer.flush()
        for name, folder in staging.items():
            shutil.rmtree(output / name, ignore_errors=True)
            os.replace(folder, output / name)
    return counts


def _writer(export: Export, folder: Path, split: str, max_bytes: int) -> RowWriter:
    if export.columns is None:
        return ImageFolder(folder, split)
    return ParquetShards(folder, split, export.columns, max_bytes)


@contextmanager
def _removed(folders: Iterable[Path]) -> Iterator[None]:
    """Empty folders to write to, removed afterwards."""
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _bytes(value: Any) -> int:
    """The size of the images in a value."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list) else 0
