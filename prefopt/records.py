"""What is on disk: the tables, their checks, and readers of foreign formats.

| table      | columns                                                            |
|------------|--------------------------------------------------------------------|
| sft        | prompt, image                                                      |
| pairs      | prompt, chosen, rejected, optionally margin, p_chosen              |
| pickapic   | caption, jpg_0, jpg_1, label_0, label_1 (read as pairs)            |
| imagefolder| file_name (or chosen_file_name, rejected_file_name), text          |

Open-image-preferences is a `pairs` table as it stands. Images stay encoded bytes until they are needed. A row
that cannot be a preference (a tie) is dropped and counted under its reason; a row that is broken stops the
run.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetsError
from huggingface_hub.constants import HF_HUB_CACHE
from pyarrow import ArrowException

from prefopt.errors import InputError
from prefopt.files import content_key, file_state

# `prompt` under the names that other collections give it.
PROMPT_NAMES = ("prompt", "caption", "text")
# A file that bears one of these in its name is not read as training data.
HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")
PICKAPIC = ("jpg_0", "jpg_1", "label_0", "label_1")
FACTS = datasets.Features(
    {
        "row": datasets.Value("int64"),
        "prompt": datasets.Value("string"),
        "columns": datasets.List(datasets.Value("string")),
        "sha256": datasets.List(datasets.Value("string")),
        "p_chosen": datasets.Value("float32"),
        "drop": datasets.Value("string"),
    }
)


class Order(NamedTuple):
    """What a row says of its images."""

    columns: tuple[str, ...]  # of images, from best to worst
    drop: str = ""  # why the row is not used; empty if it is
    p_chosen: float | None = None  # how likely the first is the better one


@dataclass
class Table:
    """A checked table: the rows that can be trained on, and how many were dropped for which reason.

    `facts` has a row for each row that is used: its number in `rows`, its prompt, the names and SHA-256 of
    its image columns from best to worst, and p_chosen if the table has it. The images stay where they are,
    encoded.
    """

    source: str
    rows: Dataset
    facts: Dataset
    dropped: Counter[str] = field(default_factory=Counter)
    soft_labels: bool = False  # whether the rows have p_chosen

    def __len__(self) -> int:
        return len(self.facts)

    def __str__(self) -> str:
        dropped = f" (dropped: {_reasons(self.dropped)})" if self.dropped else ""
        return f"{self.source}: {len(self)} rows{dropped}"

    def where(self, index: int) -> str:
        """What an error calls the row `index`."""
        return f"{self.source}: row {self.facts[index]['row']}"

    def column(self, name: str) -> list:
        """A column of `facts`, read at once: row by row, a million take minutes."""
        return _column(self.facts, name)

    def images(self, index: int) -> list[bytes]:
        """The encoded images of the row `index`, best first."""
        fact = self.facts[index]
        row = self.rows[fact["row"]]
        return [
            image_bytes(row[name], f"{self.where(index)}, column {name}", self.folder)
            for name in fact["columns"]
        ]

    @property
    def folder(self) -> Path | None:
        """The dataset's folder, which no path in a row may leave; None for a dataset from the hub."""
        return Path(self.source).resolve() if Path(self.source).is_dir() else None


def read_pairs(
    source: str, *, split: str = "train", config: str | None = None, revision: str | None = None
) -> Table:
    """Preference pairs of a local folder or a hub id, in the `pairs`, Pick-a-Pic or imagefolder format.

    Ties (Pick-a-Pic's equal labels, a margin of 0, the same image twice) are dropped with their reason; a
    table of nothing but ties, a missing column, a pair with one image or a prompt that is no text is an
    InputError.
    """
    source = table_folder(source, config)
    rows = load(source, split=split, config=config, revision=revision)
    if set(PICKAPIC) <= set(rows.column_names):
        return _checked(rows, source, PICKAPIC[:2], _pickapic_order)
    soft_labels = "p_chosen" in rows.column_names
    return _checked(rows, source, ("chosen", "rejected"), _margin_order, soft_labels=soft_labels)


def read_sft(
    source: str, *, split: str = "train", config: str | None = None, revision: str | None = None
) -> Table:
    """Prompts with one image each, of a folder or a hub id; a pairs table is read as its chosen images."""
    source = table_folder(source, config)
    rows = load(source, split=split, config=config, revision=revision)
    column = "chosen" if "image" not in rows.column_names and "chosen" in rows.column_names else "image"
    return _checked(rows, source, (column,), lambda row, where: Order((column,)))


def table_folder(source: str, config: str | None) -> str:
    """The folder that a configuration names in a local folder, as `pairs` of a builder's; else `source`."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    tables = sorted({path.relative_to(folder).parts[0] for path in folder.glob("*/*.parquet")})
    if config:
        if not (folder / config).is_dir():
            raise InputError(
                f"--dataset_config {config}: {source} has no such sub-folder; its tables are "
                f"{', '.join(tables) or 'none'}"
            )
        return str(folder / config)
    if (folder / "BUILD.json").is_file():
        raise InputError(
            f"{source} holds several tables; name one with --dataset_config: {', '.join(tables) or 'none'}"
        )
    return source


def load(source: str, *, split: str, config: str | None, revision: str | None) -> Dataset:
    """A split of a saved dataset, a folder of Parquet, Arrow or images, or a hub id; images stay encoded."""
    folder = Path(source)
    if folder.is_dir():
        try:
            rows = _load_folder(folder, split)
        except InputError:
            raise
        except (DatasetsError, OSError, ValueError, ArrowException) as error:
            raise InputError(f"{source} cannot be read as a dataset: {error}") from error
    elif folder.exists():
        raise InputError(f"{source} is a file; name the folder that holds the dataset")
    else:
        rows = _load_hub(source, split, config, revision)
    if len(rows) == 0:
        raise InputError(f"{source}: the split {split!r} has no rows")
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _load_folder(folder: Path, split: str) -> Dataset:
    if (folder / "state.json").exists():
        saved: Any = datasets.load_from_disk(str(folder))
        return saved
    if (folder / "dataset_dict.json").exists():
        return _split(datasets.load_from_disk(str(folder)), folder, split)
    for kind, pattern in (("parquet", "*.parquet"), ("arrow", "*.arrow")):
        files = sorted(folder.rglob(pattern))
        of_split = [path for path in files if _names(path.relative_to(folder), split)]
        if not of_split and split == "train":  # a folder need not say that its files are for training
            of_split = [
                path for path in files if not any(_names(path.relative_to(folder), s) for s in HELD_OUT)
            ]
        if files and not of_split:
            raise InputError(
                f"{folder}: no {kind} file of a split {split!r}; there are {[path.name for path in files]}"
            )
        if files:
            # The name is part of datasets' cache key, whose own clock is too coarse for a file's replacement.
            name, paths = folder_state(folder)[:16], list(map(str, of_split))
            return datasets.load_dataset(kind, name, data_files={split: paths}, split=split)
    if any(path.is_file() for path in folder.rglob("*")):
        found = datasets.load_dataset("imagefolder", folder_state(folder)[:16], data_dir=str(folder))
        return _split(found, folder, split)
    raise InputError(f"{folder} is empty: no Parquet, Arrow or image files in it")


def folder_state(folder: Path) -> str:
    """A hash that changes with any file below a folder, the pictures that cells name by path among them.

    Files that datasets itself writes there, as its caches of a saved dataset, do not count.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_scratch(path.name))
    return content_key(json.dumps([[str(path.relative_to(folder)), *file_state(path)] for path in files]))


def _is_scratch(name: str) -> bool:
    return bool(re.fullmatch(r"\..*|cache-.*\.arrow|tmp[^.]*", name))


def _names(path: Path, split: str) -> bool:
    """Whether a path bears a split's name as a word of its own."""
    return bool(re.search(rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z0-9])", path.as_posix()))


def _split(found: Any, folder: Path, split: str) -> Dataset:
    if split not in found:
        raise InputError(f"{folder} has no split {split!r}; it has {sorted(found)}")
    return found[split]


def _load_hub(source: str, split: str, config: str | None, revision: str | None) -> Dataset:
    try:
        return datasets.load_dataset(source, config, split=split, revision=revision)
    except Exception as error:  # the hub's client raises dozens of types for 'not there'
        raise InputError(
            f"no dataset {source!r}: no such folder here, and as a hub id it could not be loaded ({error})"
        ) from error


def _margin_order(row: dict, where: str) -> Order:
    """The order of a pair's images."""
    margin, p_chosen = row.get("margin"), row.get("p_chosen")
    if "p_chosen" in row:
        check_p_chosen(p_chosen, where)
    if margin is not None and not (isinstance(margin, Real) and math.isfinite(margin)):
        raise InputError(f"{where} has the margin {margin!r}; a margin is a finite number")
    if margin is not None and margin < 0:
        raise InputError(
            f"{where} has the margin {margin}: its rejected image scores higher than its chosen one"
        )
    return Order(("chosen", "rejected"), "tie" if margin == 0 else "", p_chosen)


def check_p_chosen(value: Any, where: str) -> None:
    """InputError unless a soft label is a probability."""
    if not (isinstance(value, float | int) and 0 <= value <= 1):
        raise InputError(f"{where} has the p_chosen {value!r}; it is a probability between 0 and 1")


def _pickapic_order(row: dict, where: str) -> Order:
    """The same for Pick-a-Pic: the higher label wins; a tie has the label 0.5 twice."""
    if not row.get("has_label", True):
        return Order(PICKAPIC[:2], "no label")
    left, right = row["label_0"], row["label_1"]
    for label in (left, right):
        if isinstance(label, bool) or not isinstance(label, Real) or not math.isfinite(label):
            raise InputError(f"{where} has the label {label!r}; labels are numbers: 0, 0.5 or 1")
    return Order(("jpg_0", "jpg_1") if left > right else ("jpg_1", "jpg_0"), "tie" if left == right else "")


def _checked(
    rows: Dataset, source: str, images: tuple[str, ...], order: Callable, *, soft_labels: bool = False
) -> Table:
    prompt = next((name for name in PROMPT_NAMES if name in rows.column_names), None)
    missing = [name for name in images if name not in rows.column_names] + ([] if prompt else ["prompt"])
    if missing:
        raise InputError(
            f"{source}: no column {' and no column '.join(map(repr, missing))}; its columns are "
            f"{rows.column_names}, and {['prompt', *images]} are needed"
        )
    for name in images:
        if not isinstance(rows.features[name], datasets.Image):
            try:
                rows = rows.cast_column(name, datasets.Image(decode=False))
            except (ArrowException, TypeError, ValueError) as error:
                raise InputError(f"{source}: the column {name!r} holds no images ({error})") from error
    inside = Path(source).resolve() if Path(source).is_dir() else None

    def check(row: dict, index: int, files: str) -> dict:  # `files` is for datasets' cache key
        where = f"{source}: row {index}"
        if not isinstance(row[prompt], str):
            raise InputError(f"{where} has the prompt {row[prompt]!r}; a prompt is text")
        columns, drop, p_chosen = order(row, where)
        contents = [image_bytes(row[name], f"{where}, column {name}", inside) for name in columns]
        hashes = [content_key(content) for content in contents]
        if not drop and len(set(hashes)) < len(hashes):
            drop = "same image twice"
        facts = {"row": index, "prompt": row[prompt], "columns": columns, "sha256": hashes}
        return facts | {"p_chosen": p_chosen, "drop": drop}

    facts = rows.map(
        check,
        with_indices=True,
        fn_kwargs={"files": folder_state(inside) if inside else ""},
        remove_columns=rows.column_names,
        features=FACTS,
        desc=f"checking {source}",
    )
    reasons = _column(facts, "drop")
    dropped = Counter(reason for reason in reasons if reason)
    kept = [index for index, reason in enumerate(reasons) if not reason]
    if not kept:
        raise InputError(f"{source}: none of its {len(rows)} rows can be used ({_reasons(dropped)})")
    return Table(source, rows, facts.select(kept), dropped, soft_labels=soft_labels)


def _column(facts: Dataset, name: str) -> list:
    values: Any = facts.with_format("arrow")[name][:]
    return values.to_pylist()


def image_bytes(image: dict | None, where: str, inside: Path | None) -> bytes:
    """The encoded bytes of an image cell.

    `inside` is the folder that a path in a cell may not leave; None, of a dataset from the hub, stands for
    the folders that downloads go to.
    """
    if image is None:
        raise InputError(f"{where} has no image; a pair has two")
    content, path = image.get("bytes"), image.get("path")
    if content is None and path:
        homes = [inside] if inside else [Path(HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
        file = Path(homes[0], path).resolve()
        if not any(file.is_relative_to(home.resolve()) for home in homes):
            raise InputError(f"{where} points to {path}, outside of the dataset's folder {homes[0]}")
        if not file.is_file():
            raise InputError(f"{where} points to {path}, which is not there")
        content = file.read_bytes()
    if not content:
        raise InputError(f"{where} is an image of 0 bytes")
    return content


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
