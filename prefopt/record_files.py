"""Tables in text files, JSON, JSON Lines and CSV, whose cells name their images by path."""

import csv
import json
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import datasets
import pyarrow

from prefopt.errors import InputError
from prefopt.files import content_key, file_state

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
    fingerprint = content_key(json.dumps([str(file.resolve()), *file_state(file)]))[:32]
    found: Any = datasets.Dataset.from_generator(rows, features=features, fingerprint=fingerprint)
    return found


def _from_json(file: Path) -> list[Any]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        if file.suffix == ".json":
            return _list(json.loads(text), file)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or not text.lstrip().startswith("{"):  # else: a record on each line
            raise InputError(f"{file}: line {error.lineno} is no JSON: {error.msg}") from error
    records = []
    # Not splitlines: that also splits at characters which a text may hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise InputError(f"{file}: line {number} is no JSON: {error.msg}") from error
    return records


def _list(value: Any, file: Path) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{file} holds {shortened(value)}; it is to be a list of records")
    return value


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
    except json.JSONDecodeError:
        return text


def _paths(values: list, where: str, name: str) -> list:
    """Paths, or if any row has a list, lists of paths."""
    for row, value in enumerate(values):
        paths = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(path, str) and path for path in paths):
            raise InputError(
                f"{where} {row}, {name} is {shortened(value)}; it is to be the path of an image, or a list "
                "of them"
            )
    if not any(isinstance(value, list) for value in values):
        return values
    return [[value] if isinstance(value, str) else value for value in values]


def _feature(values: list) -> Any:
    try:
        kind = pyarrow.array(values).type
    except (pyarrow.ArrowException, OverflowError):
        return datasets.Json()
    return datasets.Features.from_arrow_schema(pyarrow.schema({"value": kind}))["value"]
