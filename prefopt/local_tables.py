"""Tables in local folders and files: which files hold the rows of a split, and which table is the default."""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets import Dataset
from huggingface_hub import metadata_load

from prefopt.errors import InputError
from prefopt.files import content_key, file_state
from prefopt.images import PICTURES
from prefopt.record_files import SUFFIXES, read_metadata, read_records
from prefopt.table_files import TABLES, read_saved, read_tables, saved_splits

# In a builder's folder: new tables that are whole, while it exchanges the old ones for them.
EXCHANGED = ".new_tables"
# A file that bears one of these in its path is not read as training data.
HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")
# JSON files of a dataset's folder that hold no rows of it.
NO_ROWS = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json", "BUILD.json")
# Files that show a folder of images, which is no folder of JSON files.
IMAGEFOLDER = ("metadata.csv", "metadata.jsonl")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_ONE_SPLIT = (
    "the split 'train', not {!r}; name a folder that has both, or slices of this one, as train[:90%] and "
    "train[90%:]"
)


def table_folder(source: str, config: str | None) -> Path:
    """The sub-folder of a local folder that `config` names, as `pairs` of a builder's; else the folder.

    Without `config` it is the default of the card, the README.md that the hub reads, too.
    """
    place = Path(source)
    if place.resolve() in (Path(place.resolve().anchor), Path.home()):
        raise InputError(f"{source} is a whole disk or home folder; name the folder of one dataset")
    if place.name in IMAGEFOLDER and place.is_file():
        place = place.parent
    if place.is_dir() and any((folder / EXCHANGED).is_dir() for folder in (place, place.parent)):
        raise InputError(
            f"{place}: a builder ended while it replaced these tables by new ones. Run its command again, "
            "which goes on with that"
        )
    if not place.is_dir():
        if config and place.exists():
            raise InputError(f"--dataset_config {config}: {source} is one file; leave the option out")
        return place
    tables = ", ".join(table_names(place)) or "none"
    named, default = _configurations(place)
    name = config or default
    if name and _is_folder_name(name) and os.path.isdir(place / name):
        return place / name
    if name and named != [name]:
        more = (
            "; a builder that has --exports writes the tables it names"
            if (place / "BUILD.json").is_file()
            else ""
        )
        raise InputError(
            f"--dataset_config {name:.100}: {source} has no such sub-folder; its tables are {tables}{more}"
        )
    if not name and (len(named) > 1 or (place / "BUILD.json").is_file()):
        raise InputError(f"{source} holds several tables; name one with --dataset_config: {tables}")
    return place


def table_names(folder: Path) -> list[str]:
    """The sub-folders of a folder that hold Parquet files."""
    names = {path.parent.name for path in folder.glob("*/*.parquet")}
    return sorted(name for name in names if not name.startswith("."))


def _configurations(folder: Path) -> tuple[list[str], str | None]:
    """The configurations that the card of a folder names, and which is the default; none without a card."""
    card = folder / "README.md"
    try:
        found = (metadata_load(card) if card.is_file() else None) or {}
        configs = {entry["config_name"]: entry for entry in found.get("configs") or []}
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise InputError(
            f"{card}: its lines between --- are no dataset card ({error}); mend or delete it"
        ) from error
    names = [name for name in configs if _is_folder_name(name)]
    default = next((name for name in names if configs[name].get("default")), None)
    return names, default or (names[0] if len(names) == 1 else None)


def _is_folder_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name != ".."


def read_folder(folder: Path, split: str) -> tuple[Dataset, Path]:
    """The rows of a split of a folder, and the folder or the file that holds them."""
    if (folder / "state.json").exists():
        saved, name = read_saved(folder)
        if split not in ("train", name):
            raise InputError(f"{folder} is one saved table, whose rows are {_ONE_SPLIT.format(split)}")
        return saved, folder
    if (folder / "dataset_dict.json").exists():
        if split not in (found := saved_splits(folder)):
            raise InputError(f"{folder} has no split {split!r:.100}; it has {sorted(found)}")
        return read_saved(folder / split)[0], folder
    paths = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder))]
    for suffix in TABLES:
        if files := [path for path in paths if path.suffix == suffix and not path.is_dir()]:
            return read_tables(_of_split(files, folder, split), folder_state(folder)), folder
    if metadata := [path for path in paths if path.name in IMAGEFOLDER]:
        files = _of_split(metadata, folder, split)
        tables = [read_metadata(file, folder) for file in files]
        return datasets.concatenate_datasets(tables), files[0] if len(files) == 1 else folder
    if files := [path for path in paths if path.parent == folder and _holds_records(path)]:
        file = _record_file(files, folder, split)
        return read_records(file), file
    return _pictures_alone(folder, paths, split), folder


def read_file(file: Path, split: str) -> Dataset:
    """The rows of a file; its only split is `train`, or one that its name bears."""
    if split != "train" and not _names(Path(file.name), split):
        raise InputError(f"{file} is one file, whose rows are {_ONE_SPLIT.format(split)}")
    if file.suffix in SUFFIXES:
        return read_records(file)
    if file.suffix not in TABLES:
        raise InputError(
            f"{file} is no table; those that can be read end with {', '.join((*TABLES, *SUFFIXES))}"
        )
    return read_tables([file], content_key(json.dumps(file_state(file))))


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """The files whose paths in the folder bear the split's name."""
    found = [path for path in files if _names(path.relative_to(folder), split)]
    if not found and split == "train":  # a folder need not say that its files are for training
        found = [path for path in files if not any(_names(path.relative_to(folder), s) for s in HELD_OUT)]
    if not found:
        there = f"no {files[0].suffix[1:]} file of a split {split!r:.100}; there are {_first_names(files)}"
        raise InputError(f"{folder}: {there}")
    return found


def _pictures_alone(folder: Path, paths: list[Path], split: str) -> Dataset:
    """A row for each picture of a split."""
    files = [path for path in paths if path.is_file()]
    if not files:
        raise InputError(f"{folder} is empty: no Parquet, Arrow, JSON, CSV or image files in it")
    if archive := next((path for path in files if path.suffix in ARCHIVES), None):
        raise InputError(f"{folder}: archives are not read; unpack {archive.name}, and delete it")
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    if not pictures:
        raise InputError(
            f"{folder} holds no table and no pictures, but {_first_names(files)}; name a folder of Parquet, "
            "Arrow, JSON, CSV or image files"
        )
    names = [str(path.relative_to(folder)) for path in _of_split(pictures, folder, split)]
    return Dataset.from_dict({"image": names})


def _record_file(files: list[Path], folder: Path, split: str) -> Path:
    """The JSON or CSV file of a split; one that bears no split's name is for training."""
    found = _of_split(files, folder, split)
    if len(found) > 1:
        raise InputError(
            f"{folder}: one file is to bear the split's name {split!r}; there are {_first_names(found)}"
        )
    return found[0]


def _holds_records(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.name not in NO_ROWS and not path.is_dir()


def _is_hidden(path: Path) -> bool:
    """Whether a part of the path begins with a dot, as what a builder has not finished."""
    return any(part.startswith(".") for part in path.parts)


def _first_names(paths: list[Path]) -> str:
    return str([path.name for path in paths[:10]]) + " and more" * (len(paths) > 10)


def folder_state(folder: Path) -> str:
    """A hash that changes with any file below a folder, the pictures that cells name by path among them.

    Files that datasets itself writes there, as its caches of a saved dataset, do not count.
    """
    return files_state(folder, (path for path in folder.rglob("*") if not _is_scratch(path.name)))


def files_state(folder: Path, paths: Iterable[Path]) -> str:
    """A hash that changes with any of these files; those that are not there, or vanish, do not count."""
    states = []
    for path in sorted(paths):
        with suppress(OSError):
            if path.is_file():
                states.append([os.path.relpath(path, folder), *file_state(path)])
    return content_key(json.dumps(states))


def _is_scratch(name: str) -> bool:
    return bool(re.fullmatch(r"\..*|cache-.*\.arrow|tmp[^.]*", name))


def _names(path: Path, split: str) -> bool:
    """Whether a path bears a split's name, in upper or lower case, and not inside of a longer word."""
    name = rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])"
    return bool(re.search(name, path.as_posix(), re.IGNORECASE))
