"""Whatever stands in a file: rows, or an InputError that names the file; never another error."""

import contextlib
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from pictures import encoded, picture, png

from prefopt.diffusion.tables import read_preferences, read_sft
from prefopt.errors import InputError
from prefopt.images import open_image
from prefopt.vlm.examples import read_vision_examples

READERS: list[Callable[[str], Any]] = [
    read_preferences,
    read_sft,
    lambda source: read_vision_examples(source, "pairs"),
    lambda source: read_vision_examples(source, "sft"),
]
COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "image",
    "images",
    "ranks",
    "messages",
    "margin",
    "system",
    "p_chosen",
)
PLAIN = some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=5)
VALUES = some.recursive(
    PLAIN | some.sampled_from(["pictures/0.png", "../x.png", "/", "file:///x", "\0", "\ud800"]),
    lambda part: some.lists(part, max_size=3) | some.dictionaries(some.text(max_size=3), part, max_size=3),
    max_leaves=5,
)
RECORDS = some.lists(
    some.dictionaries(some.sampled_from(COLUMNS), VALUES, min_size=4), min_size=1, max_size=3
)


def few(count: int) -> Any:
    """As many examples as the suite has time for, the same ones each time."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=quiet
    )


def assert_rows_or_an_error(read: Callable[[str], Any], file: Path) -> None:
    """Either some rows, or one short message that names the file."""
    try:
        rows, said = len(read(str(file))), ""
    except InputError as error:
        rows, said = 0, str(error)
    assert rows > 0 or (file.name in said and len(said) < 1000)


@few(20)
@given(records=RECORDS, read=some.sampled_from(READERS), ending=some.sampled_from(["json", "jsonl", "csv"]))
def test_any_values_in_any_column(tmp_path: Path, records: list[dict], read: Any, ending: str) -> None:
    (tmp_path / "pictures").mkdir(exist_ok=True)
    (tmp_path / "pictures" / "0.png").write_bytes(png(0))
    file = tmp_path / f"table.{ending}"
    if ending == "csv":
        names = list(dict.fromkeys(name for record in records for name in record))
        lines = [names, *([json.dumps(record.get(name)) for name in names] for record in records)]
        text = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines)
    else:
        text = json.dumps(records) if ending == "json" else "\n".join(map(json.dumps, records))
    file.write_text(text, encoding="utf-8")
    assert_rows_or_an_error(read, file)


TEXT = some.text(some.sampled_from(string.printable + '{}[]":,\0\ufeff\u2028'), max_size=30)


@few(40)
@given(
    content=some.binary(max_size=30)
    | TEXT.map(str.encode)
    | VALUES.map(lambda value: json.dumps(value).encode()),
    ending=some.sampled_from(["json", "jsonl", "csv", "parquet", "arrow", "txt"]),
)
def test_any_bytes_in_a_file(tmp_path: Path, content: bytes, ending: str) -> None:
    file = tmp_path / f"table.{ending}"
    file.write_bytes(content)
    assert_rows_or_an_error(read_preferences, file)


@few(40)
@given(
    kind=some.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"]),
    changes=some.lists(some.tuples(some.integers(0, 300), some.integers(0, 255)), max_size=5),
    length=some.integers(0, 3000),
)
@pytest.mark.filterwarnings("ignore")  # PIL's, of damaged files
def test_any_bytes_as_a_picture(kind: str, changes: list[tuple[int, int]], length: int) -> None:
    content = bytearray(encoded(picture(0), kind))
    for place, value in changes:
        content[place % len(content)] = value
    with contextlib.suppress(InputError):
        assert open_image(bytes(content[:length]), "row 1").mode == "RGB"
