"""How exports are written: Parquet files or a folder of pictures, split by prompt, all of them or none.

New tables are written beside the old ones, in a hidden folder, and wait until the last is whole and on the
disk. Then one renaming decides: before it the old tables are the build's, after it the new ones are, whatever
ends the process. Where it ended while folders were exchanged, readers say so, and the next build goes on with
the exchange.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_builders.engine.stages import Group, Record
from data_builders.engine.tables import Columns, features
from data_builders.export.tables import Export
from prefopt.files import flush_to_disk, reporting_write_errors
from prefopt.local_tables import EXCHANGED
from prefopt.records import in_test

ROWS, BYTES = 1000, 2**24  # of rows that wait, and of their images
WRITTEN, OLD = ".tables", ".old_tables"  # folders of tables: half written ones, and those to be removed


class RowWriter(Protocol):
    """Takes the rows of a split, one after the other; `close` ends it."""

    def add(self, row: Record) -> None: ...
    def close(self) -> None: ...


class ParquetShards:
    """Parquet files of one split, a new one whenever the images of the last exceed `max_bytes`."""

    def __init__(self, folder: Path, split: str, columns: Columns, max_bytes: int):
        self.folder, self.split, self.max_bytes = folder, split, max_bytes
        self.schema = features(columns).arrow_schema
        self.images = [name for name, kind in columns.items() if kind in ("image", ["image"], "binary")]
        self.files, self.size, self.waiting = 0, 0, 0  # files, and bytes of images in this one and in `rows`
        self.rows: list[Record] = []
        self.file: pq.ParquetWriter | None = None

    def add(self, row: Record) -> None:
        """Take a row; write those that wait if they are many enough, and end a file that is large enough."""
        self.rows.append(row)
        self.waiting += sum(_bytes(row.get(name)) for name in self.images)
        if len(self.rows) >= ROWS or self.waiting >= min(BYTES, self.max_bytes - self.size):
            self._write()
        if self.size >= self.max_bytes:
            self.close()

    def close(self) -> None:
        """Write the rows that wait, and end the file."""
        self._write()
        if self.file:
            self.file.close()
            self.file, self.size = None, 0

    def _write(self) -> None:
        if not self.rows:
            return
        if not self.file:
            self.file = pq.ParquetWriter(self.folder / f"{self.split}-{self.files:05d}.parquet", self.schema)
            self.files += 1
        self.file.write_table(pa.Table.from_pylist(self.rows, schema=self.schema))
        self.size, self.waiting, self.rows = self.size + self.waiting, 0, []


class ImageFolder:
    """One split as pictures and a metadata.jsonl that names each one's text, as `imagefolder` reads them."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.count = folder / split, 0

    def add(self, row: Record) -> None:
        """Take a row with `image` and `prompt`."""
        self.folder.mkdir(exist_ok=True)
        name = f"{self.count:06d}.webp"
        self.count += 1
        (self.folder / name).write_bytes(row["image"]["bytes"])
        with (self.folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file_name": name, "text": row["prompt"]}) + "\n")

    def close(self) -> None:
        """All is written."""


def write_exports(
    groups: Iterable[Group],
    output: Path,
    exports: Mapping[str, Export],
    *,
    test_fraction: float,
    max_bytes: int,
) -> dict[str, Counter[str]]:
    """Write each export's folder under `output`, replacing all at once; its rows by export and split."""
    counts = {name: Counter[str]() for name in exports}
    with reporting_write_errors(output):
        exchange(output)
        with _removed(output / WRITTEN) as written:
            writers = {
                (name, split): _writer(export, written / name, split, max_bytes)
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
                writer.close()
            with ThreadPoolExecutor(16) as pool:  # a disk takes many in little more than the time of one
                list(pool.map(flush_to_disk, [written, *written.rglob("*")]))
            os.replace(written, output / EXCHANGED)
        exchange(output)
    return counts


def exchange(output: Path) -> None:
    """Put new tables that are whole in the place of the old ones; goes on with what a killed build began."""
    new = output / EXCHANGED
    if new.is_dir():
        flush_to_disk(output)
        with _removed(output / OLD) as old:
            for folder in sorted(new.iterdir()):
                if (before := output / folder.name).exists():
                    os.replace(before, old / folder.name)
                os.replace(folder, before)
            flush_to_disk(output)
            new.rmdir()


def _writer(export: Export, folder: Path, split: str, max_bytes: int) -> RowWriter:
    folder.mkdir(exist_ok=True)
    if export.columns is None:
        return ImageFolder(folder, split)
    return ParquetShards(folder, split, export.columns, max_bytes)


@contextmanager
def _removed(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, removed afterwards if it is still there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _bytes(image: Any) -> int:
    """The size of an image, or of several."""
    if isinstance(image, list):
        return sum(map(_bytes, image))
    content = image["bytes"] if isinstance(image, dict) else image
    return len(content or b"")
