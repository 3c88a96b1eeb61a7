"""Tables on disk: a folder's or a hub id's rows, with images as encoded bytes.

What the rows of a table of images mean is told in diffusion/tables.py, of conversations in vlm/formats.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetsError
from huggingface_hub.constants import HF_HUB_CACHE
from pyarrow import ArrowException

from prefopt.errors import InputError
from prefopt.files import content_key, file_state

# A file that bears one of these in its name is not read as training data.
HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")
# JSON files of a dataset's folder that hold no rows of it.
NO_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json", "BUILD.json")
# Files that show a folder of images, which is no folder of JSON files.
IMAGEFOLDER = ("metadata.csv", "metadata.jsonl")


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
    encoded: Any = datasets.Image(decode=False)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, encoded)
        elif isinstance(feature, datasets.List | datasets.LargeList) and isinstance(
            feature.feature, datasets.Image
        ):
            rows = rows.cast_column(name, datasets.List(encoded))
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


def json_file(folder: Path, split: str) -> Path | None:
    """The JSON file of a split among those of a folder that has no other tables; None without such files.

    A file bears the split's name as a word of its own; one that bears none is taken for training.
    """
    files = sorted(
        path for end in ("json", "jsonl") for path in folder.glob(f"*.{end}") if path.name not in NO_ROWS
    )
    if not files or any(
        path.suffix in (".parquet", ".arrow") or path.name in IMAGEFOLDER for path in folder.rglob("*")
    ):
        return None
    words = {path: set(re.split(r"[^A-Za-z0-9]", path.stem)) for path in files}
    named = [path for path in files if split in words[path]]
    if not named and split == "train":
        named = [path for path in files if not words[path].intersection(HELD_OUT)]
    if len(named) != 1:
        names = [path.name for path in named or files]
        raise InputError(f"{folder}: one JSON file is to bear the split's name {split!r}; there are {names}")
    return named[0]


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


def check_p_chosen(value: Any, where: str) -> None:
    """InputError unless a soft label is a probability."""
    if not (isinstance(value, float | int) and 0 <= value <= 1):
        raise InputError(f"{where} has the p_chosen {value!r}; it is a probability between 0 and 1")


def image_bytes(image: dict | None, where: str, *folders: Path) -> bytes:
    """The encoded bytes of an image cell.

    A path in a cell is looked for in the first of `folders`, then in those below it that follow, and may not
    leave the first. None, of a dataset from the hub, stands for the folders that downloads go to.
    """
    if image is None:
        raise InputError(f"{where} has no image; a pair has two")
    content, path = image.get("bytes"), image.get("path")
    if content is None and path:
        homes = folders[:1] or (Path(HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
        files = [Path(folder, path).resolve() for folder in folders or homes[:1]]
        file = next((file for file in files if file.is_file()), files[0])
        if not any(file.is_relative_to(home.resolve()) for home in homes):
            raise InputError(f"{where} points to {path}, outside of the dataset's folder {homes[0]}")
        if not file.is_file():
            raise InputError(f"{where} points to {path}, which is not there")
        content = file.read_bytes()
    if not content:
        raise InputError(f"{where} is an image of 0 bytes")
    return content
