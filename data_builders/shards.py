"""Tables made from candidates, and how they are written: bounded Parquet files, split by prompt."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Sequence, Value

from data_builders.blocks import DRAWN
from data_builders.stages import Record
from prefopt.store import writing

PAIRS = Features(
    {
        "prompt": Value("string"),
        "chosen": Image(),
        "rejected": Image(),
        "margin": Value("float32"),
        "chosen_score": Value("float32"),
        "rejected_score": Value("float32"),
        "prompt_id": Value("string"),
        "chosen_seed": Value("int64"),
        "rejected_seed": Value("int64"),
    }
)
SFT = Features(
    {
        "prompt": Value("string"),
        "image": Image(),
        "class": Value("string"),
        "hard_score": Value("float32"),
        "soft_score": Value("float32"),
        "confidence": Value("float32"),
        "prompt_id": Value("string"),
        "seed": Value("int64"),
    }
)
RANKED = Features(
    {
        "prompt": Value("string"),
        "images": Sequence(Image()),
        "ranks": Sequence(Value("int32")),  # 1 = best, equal = tie
        "scores": Sequence(Value("float32")),
        "prompt_id": Value("string"),
    }
)
PICKAPIC = Features(
    {
        "jpg_0": Value("binary"),
        "jpg_1": Value("binary"),
        "label_0": Value("float32"),
        "label_1": Value("float32"),
        "caption": Value("string"),
    }
)
JUDGED = Features(
    {
        **DRAWN,
        "class": Value("string"),
        "questions": Sequence(Value("string")),  # the rubric's names; the next five have one value for each
        "verdicts": Sequence(Value("string")),  # yes, no, or empty: unclear
        "log_odds": Sequence(Value("float32")),  # ln p(yes) / p(no)
        "empty_log_odds": Sequence(Value("float32")),  # of the same question about an empty image
        "leaked": Sequence(Value("float32")),  # share of the mass on neither yes nor no
        "points": Sequence(Value("float32")),
        "hard_score": Value("float32"),  # the sum of the points; null: dropped before it was judged
        "soft_score": Value("float32"),
        "boxes": [
            {"label": Value("string"), "confidence": Value("float32")}
            | {side: Value("float32") for side in ("left", "top", "right", "bottom")}  # pixels
        ],
        "confidence": Value("float32"),  # of the surest box; 0: none
        "rank": Value("int32"),  # by soft score; 1 = best, equal = tie, null = dropped before
        "selected": Value("bool"),  # the prompt's optimal image; else reject_reason says why not
        "judge": Value("string"),
        "judge_identity": Value("string"),
        "detector": Value("string"),
        "detector_identity": Value("string"),
    }
)


class Writer(Protocol):
    """Takes rows, one after the other; `flush` ends it."""

    def add(self, row: Record) -> None: ...
    def flush(self) -> None: ...


class Shards:
    """Parquet files of one split, a new one whenever the images of the last exceed `max_bytes`."""

    def __init__(self, folder: Path, split: str, features: Features, max_bytes: int):
        self.folder, self.split, self.features, self.max_bytes = folder, split, features, max_bytes
        self.files, self.size = 0, 0
        self.rows: list[Record] = []

    def add(self, row: Record) -> None:
        """Take a row; write a file if it is full."""
        self.rows.append(row)
        self.size += sum(map(_bytes, row.values()))
        if self.size >= self.max_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        if self.rows:
            table = pa.Table.from_pylist(self.rows, schema=self.features.arrow_schema)
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


@dataclass(frozen=True)
class Export:
    """One table: the candidates of a prompt go in, its rows come out; no features: an imagefolder."""

    name: str
    features: Features | None
    rows: Callable[[list[Record]], Iterable[Record]]

    def writer(self, folder: Path, split: str, max_bytes: int) -> Writer:
        """Who writes a split."""
        if self.features is None:
            return ImageFolder(folder, split)
        return Shards(folder, split, self.features, max_bytes)


def write_exports(
    groups: Iterable[list[Record]],
    output: Path,
    exports: list[Export],
    *,
    test_fraction: float,
    max_bytes: int,
) -> dict[str, Counter[str]]:
    """Write each export's folder under `output`, replacing it; the number of rows by export and split."""
    counts = {export.name: Counter[str]() for export in exports}
    staging = {export.name: output / f".{export.name}" for export in exports}
    with writing(output), _removed(staging.values()):
        writers = {
            (export.name, split): export.writer(staging[export.name], split, max_bytes)
            for export in exports
            for split in ("train", "test")
        }
        for group in groups:
            split = "test" if in_test(group[0]["prompt_id"], test_fraction) else "train"
            for export in exports:
                for row in export.rows(group):
                    writers[export.name, split].add(row)
                    counts[export.name][split] += 1
        for writer in writers.values():
            writer.flush()
        for name, folder in staging.items():
            shutil.rmtree(output / name, ignore_errors=True)
            os.replace(folder, output / name)
    return counts


@contextmanager
def _removed(folders: Iterable[Path]) -> Iterator[None]:
    """Empty folders to work in; what is left of them goes."""
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def in_test(prompt_id: str, fraction: float) -> bool:
    """Whether a prompt is held out: a property of its text, whatever else is in the dataset."""
    return int(prompt_id[:8], 16) < fraction * 2**32


def _bytes(value: Any) -> int:
    """The size of the images in a value."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list) else 0
