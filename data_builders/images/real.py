"""Real images: of a table, of img2dataset's shards or of the pocket's world, filtered by their scores."""

import glob
import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from data_builders.engine.stages import Record
from data_builders.export.summary import reasons
from prefopt import pocket
from prefopt.errors import InputError
from prefopt.files import check_is_file, content_key
from prefopt.local_tables import folder_state, table_folder
from prefopt.pocket.world import PHRASINGS, caption, render, train_scenes
from prefopt.records import Source, load, no_tensors_decoded, read_split, refuse_options
from prefopt.table_files import cause
from prefopt.vlm.cells import encoded_images

NO_IMAGE, DUPLICATE, NO_TEXT = "no image", "duplicate", "no text"
# Columns by the names of COYO, of img2dataset's shards, and plain ones.
IMAGES = ("image", "jpg", "jpeg", "png", "webp")
TEXTS = ("text", "caption", "prompt", "txt")
SCORES = {
    "aesthetic": ("aesthetic_score_laion_v2", "aesthetic"),
    "watermark": ("watermark_score", "watermark"),
    "nsfw": ("nsfw_score_opennsfw2", "nsfw_score_gantman", "nsfw"),
}
_NUMBERS = [name for names in SCORES.values() for name in names]
_FACTS = ("url", *TEXTS, *_NUMBERS)
_SHARDS = datasets.Features(
    {name: datasets.Image(decode=False) for name in IMAGES[1:]}
    | {"txt": datasets.Value("string")}
    | {
        "json": dict.fromkeys(("url", *TEXTS[:2]), datasets.Value("string"))
        | dict.fromkeys(_NUMBERS, datasets.Value("float64"))
    }
)


class Limits(NamedTuple):
    """Which scores an image may have; None: any, or none."""

    min_aesthetic: float | None = None
    max_watermark: float | None = None
    max_nsfw: float | None = None  # of the highest one, where a table has several

    def __call__(self, scores: Mapping[str, float | None]) -> str:
        """Why an image is left out; empty if it is not."""
        for (name, value), limit in zip(scores.items(), self, strict=True):
            if limit is not None and value is None:
                return f"no {name} score"
            if limit is not None and value is not None:
                if name == "aesthetic" and value < limit:
                    return "aesthetic score too low"
                if name != "aesthetic" and value > limit:
                    return f"{name} score too high"
        return ""


@dataclass
class RealImages:
    """The images of a table that can be used: a record for each, in its order.

    A record has `prompt_id` (the SHA-256 of the encoded image), `item` (its row), `raw` (the table's text),
    `url` and the scores of SCORES, None where the table has none. `left_out` counts the others by reason.
    """

    source: str
    rows: Dataset
    columns: tuple[str, ...]  # of the images
    folder: Path | None  # which no path in a cell may leave
    state: str  # changes with any file that the images are read from
    records: list[Record] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def where(self, item: int) -> str:
        """What an error calls a row."""
        return f"{self.source}: row {item}"

    def content(self, item: int) -> bytes:
        """The encoded image of a row; InputError if it has none."""
        return _content(self.rows[item], self.columns, self.where(item), self.folder)


def read_real(
    source: str,
    limits: Limits,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    number: int | None = None,
    seed: int = 0,
    with_text: bool = False,
) -> RealImages:
    """The first `number` images (None: all) that the limits allow; of `pocket`, renders of training scenes.

    `source` is a folder of img2dataset's shards, of Parquet, Arrow or images, or a hub id. With `with_text` a
    row without a text is left out. Of the `number`, those without an image and those repeated are left out,
    too. A missing column, a score that is no number, and a table of which nothing remains is an InputError.
    """
    found = _rows(source, split, config, revision, number, seed)
    rows, source = found.rows, found.name
    columns = tuple(name for name in IMAGES if name in rows.column_names)
    if not columns:
        raise InputError(
            f"{source}: no column {' or '.join(map(repr, IMAGES))}; its columns are {rows.column_names}. Of "
            "a table of URLs, as COYO's, download the images first, with img2dataset"
        )
    folder = found.folders[0] if found.folders else None
    real = RealImages(source, rows, columns, folder, found.state(columns))
    facts = _facts(rows)
    _check_columns(source, rows, facts, limits, with_text)
    passing = islice(_passing(real, facts, limits, with_text), number)
    seen = set()
    for record in _with_keys(real, list(passing)):
        if not record["prompt_id"] or record["prompt_id"] in seen:
            real.left_out[DUPLICATE if record["prompt_id"] else NO_IMAGE] += 1
        else:
            seen.add(record["prompt_id"])
            real.records.append(record)
    if not real.records:
        raise InputError(
            f"{source}: none of its {len(rows)} rows can be used ({reasons(real.left_out)}); allow other "
            "scores, or name another --dataset_name"
        )
    return real


# Reading


def _rows(
    source: str, split: str, config: str | None, revision: str | None, number: int | None, seed: int
) -> Source:
    if source == pocket.NAME:
        refuse_options(source, config=config, revision=revision)
        rows = read_split(split, lambda name: _pocket_rows(name, number or len(train_scenes()), seed))
        return Source(rows, source, ())
    folder = table_folder(source, config).resolve()
    if folder.is_dir() and (shards := sorted(folder.rglob("*.tar"))):
        refuse_options(source, revision=revision)
        rows = read_split(split, lambda name: _shard_rows(folder, shards, name))
        return Source(rows, str(folder), (folder,))
    return load(source, split=split, config=config, revision=revision)


def _pocket_rows(split: str, number: int, seed: int) -> Dataset:
    """Renders of training scenes with captions; each scene comes once before any comes again."""
    if split != "train":
        raise InputError(f"the pocket has no renders of a split {split!r}, those for training alone")

    def rows() -> Iterator[Record]:
        scenes = train_scenes()
        for turn in count():
            for index in np.random.default_rng([seed, turn]).permutation(len(scenes)):
                chance = np.random.default_rng([seed, turn, int(index)])
                file = io.BytesIO()
                render(scenes[index], int(chance.integers(2**31))).save(file, "PNG")
                text = caption(scenes[index], int(chance.integers(PHRASINGS)))
                yield {"image": {"bytes": file.getvalue(), "path": None}, "text": text}

    features = datasets.Features(image=datasets.Image(decode=False), text=datasets.Value("string"))
    return Dataset.from_list(list(islice(rows(), number)), features=features)


def _shard_rows(folder: Path, shards: list[Path], split: str) -> Dataset:
    """The samples of img2dataset's shards; of its other files, such as a Parquet file beside each, none."""
    if split != "train":
        raise InputError(f"{folder}: shards have no split {split!r}; name the folder that holds its shards")
    files = {"train": [glob.escape(str(shard)) for shard in shards]}  # taken for patterns
    try:
        with no_tensors_decoded():
            rows: Any = datasets.load_dataset(
                "webdataset", folder_state(folder)[:16], data_files=files, features=_SHARDS, split="train"
            )
    except (DatasetsError, OSError, ValueError, ArrowException) as error:
        for shard in shards:
            _check_shard(shard)
        raise InputError(f"{folder}: its shards cannot be read: {cause(error)}") from error
    return rows


def _check_shard(shard: Path) -> None:
    """InputError for the first file of a shard that is damaged, or is no object of JSON or no text."""
    where = str(shard)
    check_is_file(shard, "Delete it")
    try:
        with tarfile.open(shard) as opened:
            for member in opened:
                where = f"{shard}: {member.name}"
                content = opened.extractfile(member) if member.isfile() else None
                if content and where.endswith(".json") and not isinstance(json.load(content), dict):
                    raise InputError(f"{where} holds no JSON object")
                if content and where.endswith(".txt"):
                    content.read().decode()
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} cannot be read: {cause(error)}") from error


def _facts(rows: Dataset) -> dict[str, list]:
    """The columns beside the images, also those inside of shards' json, unless they hold nothing."""
    found = {name: rows[name][:] for name in _FACTS if name in rows.column_names}
    if "json" in rows.column_names:
        inside = [one or {} for one in rows["json"][:]]
        found = {name: [one.get(name) for one in inside] for name in _FACTS} | found
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def _check_columns(
    source: str, rows: Dataset, facts: Mapping[str, list], limits: Limits, with_text: bool
) -> None:
    needed = {
        f"--{option}": SCORES[name]
        for (option, limit), name in zip(limits._asdict().items(), SCORES, strict=True)
        if limit is not None
    }
    if with_text:
        needed["caption=raw"] = TEXTS
    for option, names in needed.items():
        if not any(name in facts for name in names):
            raise InputError(
                f"{source}: {option} needs a column {' or '.join(map(repr, names))} with values; the columns "
                f"are {sorted({*rows.column_names, *facts})}. Leave {option} out, or name another table"
            )


def _passing(
    real: RealImages, facts: Mapping[str, list], limits: Limits, with_text: bool
) -> Iterator[Record]:
    """The records that the limits allow; the others are counted."""
    for item in range(len(real.rows)):
        row = {name: values[item] for name, values in facts.items()}
        scores = {name: _score(row, name, real.where(item)) for name in SCORES}
        texts = (row[name].strip() for name in TEXTS if isinstance(row.get(name), str))
        raw = next(filter(None, texts), "")
        reason = limits(scores) or (NO_TEXT if with_text and not raw else "")
        if reason:
            real.left_out[reason] += 1
        else:
            yield {"item": item, "raw": raw, "url": row.get("url") or "", **scores}


def _score(row: Mapping[str, Any], name: str, where: str) -> float | None:
    """The highest of a row's scores of a kind; None if it has none."""
    values = {column: row[column] for column in SCORES[name] if row.get(column) is not None}
    for column, value in values.items():
        if not isinstance(value, Real):
            raise InputError(f"{where} has the {column} {value!r}; a score is a number")
    return max((float(value) for value in values.values() if not math.isnan(value)), default=None)


def _with_keys(real: RealImages, records: list[Record]) -> list[Record]:
    """The records with the SHA-256 of their image, empty for one that is not there."""
    if not records:
        return []
    rows = real.rows.select([record["item"] for record in records]).select_columns(list(real.columns))
    keys = rows.map(
        _key,
        fn_kwargs={
            "columns": real.columns,
            "folder": str(real.folder or ""),
            "files": real.state,
        },
        remove_columns=rows.column_names,
        features=datasets.Features(key=datasets.Value("string")),
        desc=f"reading {real.source}",
    )
    return [record | {"prompt_id": key} for record, key in zip(records, keys["key"], strict=True)]


def _key(row: Mapping[str, Any], columns: tuple[str, ...], folder: str, files: str) -> dict[str, str]:
    """The hash of a row's image; `files` is for datasets' cache key."""
    try:
        return {"key": content_key(_content(row, columns, "the row", Path(folder) if folder else None))}
    except InputError:
        return {"key": ""}


def _content(row: Mapping[str, Any], columns: tuple[str, ...], where: str, folder: Path | None) -> bytes:
    """The encoded image of a row, in the first column that has one; InputError unless there is one."""
    contents = next(filter(None, (encoded_images(row[name], where, folder) for name in columns)), [])
    if len(contents) != 1:
        raise InputError(f"{where} has {len(contents)} images; one is needed")
    return contents[0]
