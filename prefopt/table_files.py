"""Parquet and Arrow files, and datasets saved as such; one that is damaged is named."""

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset, config
from datasets.exceptions import DatasetsError

from prefopt.errors import InputError
from prefopt.files import advice, check_is_file, read_object
from prefopt.paths import file_inside

TABLES = (".parquet", ".arrow")
# What the libraries raise where a file, or what it says of its columns, is damaged.
DAMAGE = (
    DatasetsError,
    pyarrow.ArrowException,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)


def read_tables(files: Sequence[Path], state: str) -> Dataset:
    """The rows of Parquet or Arrow files with the same columns; `state` changes whenever one of them does."""
    place = files[0] if len(files) == 1 else files[0].parent
    for file in files:
        _check_columns(file)
    if not any(map(_has_rows, files)):
        raise InputError(f"{place} has no rows")
    # The name is part of datasets' cache key, whose own clock is too coarse for a file's replacement.
    # It takes paths for patterns, in which a bracket or an asterisk stands for something else.
    kind, paths = files[0].suffix[1:], [glob.escape(str(file)) for file in files]
    try:
        rows: Any = datasets.load_dataset(kind, state[:16], data_files=paths, split="train")
    except DAMAGE as error:
        check_cache(error)
        _name_the_damaged(files)
        raise InputError(f"{place} cannot be read as a dataset: {cause(error)}") from error
    return rows


def check_cache(error: BaseException | None) -> None:
    """InputError if it was datasets' own cache that failed, and not the table."""
    cache = Path(config.HF_DATASETS_CACHE)
    while error is not None:
        if isinstance(error, OSError) and error.filename:
            place = Path(str(error.filename))
            if place.is_relative_to(cache) or cache.is_relative_to(place):
                raise InputError(
                    f"could not write the cache of tables {cache}: {error}. {advice(error.errno)} in the "
                    "environment variable HF_DATASETS_CACHE"
                ) from error
        error = error.__cause__ or error.__context__


def read_saved(folder: Path) -> tuple[Dataset, str]:
    """The rows that `save_to_disk` wrote to a folder, by the files that its state.json names; the split.

    The files say what their columns are; dataset_info.json and a format that was set are not read.
    """
    place = folder / "state.json"
    state = read_object(place, "Save the dataset again")
    files = state.get("_data_files")
    parts = []
    for entry in files if isinstance(files, list) and files else [None]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise InputError(f"{place} names no files under _data_files; save the dataset again")
        file = Path(file_inside(name, f"{place}: _data_files", [folder], [folder]))
        _check_columns(file)
        with _naming(file):
            parts.append(Dataset.from_file(str(file)))
    return datasets.concatenate_datasets(parts), str(state.get("_split") or "train")


def saved_splits(folder: Path) -> list[str]:
    """The splits of a saved DatasetDict: folders with these names."""
    place = folder / "dataset_dict.json"
    splits = read_object(place, "Save the dataset again").get("splits")
    if not isinstance(splits, list) or not all(
        isinstance(name, str) and re.fullmatch(r"\w+([.-]\w+)*", name) for name in splits
    ):
        raise InputError(f"{place} has no list of names under splits; save the dataset again")
    return splits


def cause(error: BaseException) -> str:
    """What is behind an error of datasets, in one line."""
    lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".:")


def check_values(table: Any, source: object) -> None:
    """InputError for values that cannot be touched: text that is no UTF-8, or beyond the end of the data."""
    for name, values in zip(table.schema.names, table.columns, strict=True):
        try:
            values.validate(full=True)
        except pyarrow.ArrowException as error:
            raise InputError(
                f"{source}: the column {name!r} is damaged ({cause(error)}); write or download it again"
            ) from error


def _check_columns(file: Path) -> pyarrow.Schema:
    """The columns of a file; InputError unless datasets can read them, and each has a name of its own."""
    with _naming(file):
        if file.suffix == ".parquet":
            schema = pyarrow.parquet.read_schema(file)
        else:
            with _opened(file) as opened:
                schema = opened.schema
        if twice := next((name for name in schema.names if schema.names.count(name) > 1), None):
            raise InputError(f"{file} has two columns {twice!r}; name each once")
        datasets.Features.from_arrow_schema(schema)
    return schema


def _has_rows(file: Path) -> bool:
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_metadata(file).num_rows > 0
    with _naming(file):
        return any(batch.num_rows for batch in _batches(file))


def _name_the_damaged(files: Sequence[Path]) -> None:
    """InputError for the first file that cannot be read to its end, or whose columns are not the first's."""
    expected = _check_columns(files[0])
    for file in files:
        with _naming(file):
            for batch in _batches(file):
                check_values(batch, file)
        if not (found := _check_columns(file)).equals(expected):
            raise InputError(
                f"{file} has the columns {_named(found)}, but {files[0].name} {_named(expected)}; a split's "
                "files need the same"
            )


def _named(schema: pyarrow.Schema) -> str:
    return f"{', '.join(f'{field.name} ({field.type})' for field in schema):.300}"


def _batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    if file.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(1000)
        return
    with _opened(file) as opened:
        if isinstance(opened, pyarrow.ipc.RecordBatchStreamReader):
            yield from opened
        else:
            yield from map(opened.get_batch, range(opened.num_record_batches))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An Arrow file: a stream, or a file that has an index at its end."""
    with pyarrow.memory_map(str(file)) as mapped:
        try:
            opened: Any = pyarrow.ipc.open_stream(mapped)
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(mapped)
        with opened:
            yield opened


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn what a damaged file raises into an InputError that names it."""
    check_is_file(file, "Name a file")
    try:
        yield
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(
            f"{file} is damaged, or no {file.suffix[1:]} file ({cause(error)}); write or download it again"
        ) from error
