"""Tables in text files, JSON, JSON Lines and CSV, whose cells name their images by path."""

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import datasets
import pyarrow

from prefopt.errors import InputError
from prefopt.files import check_is_file, content_key, file_state

LONGEST = 100_000_000  # characters of a line
DEEPEST = 16  # levels of a column's type; Arrow stores no more than 64
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # a surrogate, alone or one of a pair
SUFFIXES = (".json", ".jsonl", ".csv")
# Of these columns a row may hold one path, and another row a list of them.
IMAGES = ("image", "images")
# The columns of a CSV file that are no text.
NUMBERS = ("rank", "margin", "p_chosen", "label_0", "label_1", "has_label", "votes_image1", "votes_image2")


def read_records(file: Path) -> datasets.Dataset:
    """The records of a .json list, of the lines of a .jsonl, or of the rows of a .csv; datasets caches them.

    A column whose values are of several types is stored as JSON. InputError names the file, and the line or
    row that cannot be read.
    """
    return _table(_records(file), file, "")


def read_metadata(file: Path, folder: Path) -> datasets.Dataset:
    """The rows of a folder of images by the metadata file in it, .jsonl or .csv, as `imagefolder` reads them.

    `file_name` becomes `image`, `file_names` becomes `images`, and `chosen_file_name` becomes `chosen`; their
    paths, which start beside the file, are told from the folder.
    """
    records, below = _records(file), os.path.relpath(file.parent, folder)
    names = list(dict.fromkeys(name for record in records for name in record))
    plain = {name: image for name in names if (image := _image_of(name)) != name}
    if not plain:
        raise InputError(f"{file}: no column 'file_name' or '..._file_name'; its columns are {names}")
    if taken := next((name for name in plain.values() if [*names, *plain.values()].count(name) > 1), None):
        raise InputError(
            f"{file} has two columns for {taken!r}, which its file name stands for; name each once"
        )
    for row, record in enumerate(records):
        for name in plain.keys() & record.keys():
            check_paths(record[name], f"{file}: row {row}, {name}")
            record[name] = _below(below, record[name])
    return _table([{plain.get(k, k): v for k, v in record.items()} for record in records], file, below)


def check_paths(value: Any, where: str) -> None:
    """InputError unless a cell holds a path, a list of them or nothing."""
    paths = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise InputError(
            f"{where} is {shortened(value)}; it is to be the path of an image, or a list of them"
        )


def _image_of(name: str) -> str:
    """The column of images that a column of file names stands for; another name as it is."""
    found = re.fullmatch(r"(?:(.+)_)?file_name(s?)", name)
    return (found[1] or f"image{found[2]}") if found else name


def _below(folder: str, paths: Any) -> Any:
    if isinstance(paths, list):
        return [_below(folder, path) for path in paths]
    return os.path.normpath(os.path.join(folder, paths)) if paths and folder != "." else paths


def _records(file: Path) -> list[dict[str, Any]]:
    """The records of a file, each with at least one value."""
    check_is_file(file, "Name a file")
    try:
        records = _from_csv(file) if file.suffix == ".csv" else _from_json(file)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text: {error}") from error
    if not records:
        raise InputError(f"{file} holds no records")
    for row, record in enumerate(records):
        if not isinstance(record, dict) or not record:
            raise InputError(
                f"{file}: row {row} is {shortened(record)}; it is to be a record of named values"
            )
    return records


def _table(records: list[dict[str, Any]], file: Path, key: str) -> datasets.Dataset:
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    for name in filter(columns.__contains__, IMAGES):
        columns[name] = _paths(columns[name], f"{file}: row", name)
    features = datasets.Features({name: _feature(values) for name, values in columns.items()})
    for name, values in columns.items():
        if isinstance(features[name], datasets.Json):  # which would take the text "7" for a number
            columns[name] = [None if value is None else json.dumps(value) for value in values]

    def rows() -> Any:
        return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))

    # datasets' own key of a file is its name and its time in whole seconds.
    fingerprint = content_key(json.dumps([str(file.resolve()), key, *file_state(file)]))[:32]
    found: Any = datasets.Dataset.from_generator(rows, features=features, fingerprint=fingerprint)
    return found


# JSON


def _from_json(file: Path) -> list[Any]:
    if file.suffix == ".json":
        text = file.read_text(encoding="utf-8-sig")
        try:
            return _list(_parsed(text, str(file)), file, _HALF.search(text) is not None)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data" or not text.lstrip().startswith("{"):  # else: a record on each line
                raise InputError(f"{file}: line {error.lineno} is no JSON: {error.msg}") from error
    records = []
    for line, where in _lines(file):
        try:
            records.append(_parsed(line, where))
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is no JSON: {error.msg}") from error
        if _HALF.search(line):
            _check_text(records[-1], where)
    return records


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not empty, and what errors call them."""
    # Lines end with a line feed alone: a text may hold other ends of lines, such as U+2028.
    with file.open(encoding="utf-8-sig", newline="\n") as opened:
        for number, line in enumerate(iter(lambda: opened.readline(LONGEST), ""), start=1):
            where = f"{file}: line {number}"
            if len(line) == LONGEST:
                raise InputError(f"{where} has more than {LONGEST:,} characters; pictures are named by path")
            if line.strip():
                yield line, where


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise InputError(f"{where} is nested too deep; a record is nested a few levels") from error
    except ValueError as error:  # a name twice, a number of more digits than Python reads
        raise InputError(f"{where} cannot be read: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} has two values; name it once")
    return found


def _list(value: Any, file: Path, suspicious: bool) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{file} holds {shortened(value)}; it is to be a list of records")
    for row, record in enumerate(value if suspicious else ()):
        _check_text(record, f"{file}: row {row}")
    return value


def _check_text(record: Any, where: str) -> None:
    """InputError for half of a character, which JSON can spell and no text can hold."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InputError(f"{where} has half of a character, {half!r}; where was the text cut?") from error


# CSV


def _from_csv(file: Path) -> list[dict]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, strict=True)
        try:
            names, records = next(reader, []), []
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise InputError(f"{file} has two columns {twice!r}; name each once")
            for cells in filter(None, reader):
                if len(cells) != len(names):
                    raise InputError(
                        f"{file}: line {reader.line_num} has {len(cells)} cells, its first line {len(names)}"
                    )
                records.append({name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)})
        except csv.Error as error:
            raise InputError(f"{file}: line {reader.line_num} is no CSV: {error}") from error
    return records


def _cell(name: str, text: str) -> Any:
    """A cell of a CSV file; what is no number stays text, and the format of the table names it."""
    if name not in NUMBERS or not text:
        return text or None
    try:
        return json.loads(text.lower())
    except (ValueError, RecursionError):
        return text


def _paths(values: list, where: str, name: str) -> list:
    """Paths, or if any row has a list, lists of paths."""
    for row, value in enumerate(values):
        check_paths(value, f"{where} {row}, {name}")
    if not any(isinstance(value, list) for value in values):
        return values
    return [[value] if isinstance(value, str) else value for value in values]


def _feature(values: list) -> Any:
    try:
        kind = pyarrow.array(values).type
    except (pyarrow.ArrowException, OverflowError):
        return datasets.Json()
    if _is_deeper(kind, DEEPEST):
        return datasets.Json()
    return datasets.Features.from_arrow_schema(pyarrow.schema({"value": kind}))["value"]


def _is_deeper(kind: pyarrow.DataType, levels: int) -> bool:
    parts = [kind.field(place).type for place in range(kind.num_fields)]
    return bool(parts) and (levels == 1 or any(_is_deeper(part, levels - 1) for part in parts))
