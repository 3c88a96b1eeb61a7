"""Tables of images, read and checked: the examples that can be trained on, and what was left out and why.

Images stay encoded bytes until they are needed. A row
that cannot be a preference (a tie, the same image twice) is dropped and counted under its reason; a row that
is broken stops the run.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from pyarrow import ArrowException

from prefopt.diffusion.formats import (
    FORMATS,
    KNOWN,
    PROMPT_NAMES,
    Format,
    Order,
    cells_of,
    find_format,
    refuse_second_format,
)
from prefopt.errors import InputError
from prefopt.files import content_key, lines_key
from prefopt.images import SIGNATURE, check_kind
from prefopt.record_files import check_paths
from prefopt.records import Source, image_bytes, in_test, load

AT_ONCE = 32  # rows whose images are in memory together
FACTS_AT_ONCE = 1000
TIE = "tie"
SAME_IMAGE = "same image twice"
_CHECKED: dict[str, Any] = {
    "prompt": datasets.Value("string"),
    "rows": datasets.List(datasets.Value("int64")),
    "columns": datasets.List(datasets.Value("string")),
    "sha256": datasets.List(datasets.Value("string")),
    "ranks": datasets.List(datasets.Value("int64")),
    "p_chosen": datasets.Value("float32"),
    "drop": datasets.Value("string"),
}
FACTS = datasets.Features(_CHECKED)
_OF_ROWS = datasets.Features({**_CHECKED, "group": datasets.Value("string")})


@dataclass
class Table:
    """A checked table: the rows that can be trained on, and how many were dropped for which reason.

    `facts` has a row for each example: its prompt; of its images from best to worst the row in `rows` and the
    name there, the SHA-256 and the rank, 1 more than the number of better ones; and p_chosen if the table has
    it. The images stay where they are, encoded.
    """

    source: str  # what errors call it
    folders: tuple[Path, ...]  # that paths in cells start from
    rows: Dataset
    facts: Dataset
    dropped: Counter[str] = field(default_factory=Counter)
    soft_labels: bool = False  # whether the examples have p_chosen

    def __len__(self) -> int:
        return len(self.facts)

    def __str__(self) -> str:
        dropped = f" (dropped: {_reasons(self.dropped)})" if self.dropped else ""
        return f"{self.source}: {len(self)} rows{dropped}"

    def first(self, number: int | None) -> "Table":
        """The first examples; None: all."""
        if number is None or number >= len(self):
            return self
        return replace(self, facts=self.facts.select(range(number)))

    def divide(self, test_fraction: float) -> "tuple[Table, Table]":
        """The examples to train on and those held out, by prompt; InputError if a side has none."""
        prompts = self.column("prompt")
        held_out = np.fromiter((in_test(content_key(prompt), test_fraction) for prompt in prompts), bool)
        sides = [np.flatnonzero(held_out == wanted) for wanted in (False, True)]
        if not all(map(len, sides)):
            prompts = len(set(self.column("prompt")))
            raise InputError(
                f"--test_fraction {test_fraction} of the {prompts} prompts of {self.source} leaves "
                f"{len(sides[0])} examples to train on and {len(sides[1])} to measure; choose another, or "
                "name a --dataset_test_split"
            )
        train, test = (replace(self, facts=self.facts.select(side)) for side in sides)
        return train, test

    def where(self, index: int) -> str:
        """What an error calls the example `index`."""
        return f"{self.source}: row {self.facts[index]['rows'][0]}"

    def key(self) -> str:
        """The SHA-256 over the examples: prompts, images, ranks and labels."""
        facts = self.facts.select_columns(["prompt", "sha256", "ranks", "p_chosen"])
        return lines_key(repr(list(row.values())) for row in _rows(facts))

    def column(self, name: str, rows: Sequence[int] | None = None) -> Iterator[Any]:
        """The values of a column of `facts`, of these rows (default: all), one after another.

        A part at a time is read, which is in memory alone: row by row, a million take minutes, and as
        Python's objects gigabytes.
        """
        facts = self.facts if rows is None else self.facts.select(rows)
        return _values(facts, name)

    def image(self, index: int, candidate: int) -> tuple[bytes, str]:
        """The encoded image of an example's candidate, counted from the best, and what an error calls it."""
        fact = self.facts[index]
        row, name = fact["rows"][candidate], fact["columns"][candidate]
        where = f"{self.source}: row {row}, column {name}"
        cell = cells_of(self.rows[row], [name.partition("[")[0]])[name]
        return image_bytes(cell, where, *self.folders), where

    def images(self, index: int) -> list[bytes]:
        """The encoded images of the example `index`, best first."""
        return [self.image(index, place)[0] for place in range(len(self.facts[index]["columns"]))]


def read_preferences(
    source: str, *, split: str = "train", config: str | None = None, revision: str | None = None
) -> Table:
    """Preferences of a local folder, a file or a hub id, in any of the formats of formats.py.

    Ties (a margin of 0, equal labels, votes or ranks) and the same image at two ranks are dropped with their
    reason; the same image twice at one rank counts once. A table of nothing but ties, a missing column or
    image, ranks that do not match the images and a prompt that is no text are an InputError.
    """
    return _preferences(load(source, split=split, config=config, revision=revision))


def read_sft(
    source: str, *, split: str = "train", config: str | None = None, revision: str | None = None
) -> Table:
    """Prompts with one image each, of the same sources; of pairs the chosen, of lists the best image."""
    found = load(source, split=split, config=config, revision=revision)
    names = set(found.rows.column_names)
    column = next((name for name in ("image", "chosen") if name in names), None)
    if column and not {"rank", "prompt_id"} <= names:
        alone = Order((column,), (1,))
        form = Format((column,), (column,), lambda row, where: alone)
        refuse_second_format(form if column == "image" else FORMATS[0], _lists(found), found.name)
        return _checked(found, form)
    if not any(names.issuperset(form.columns) for form in FORMATS):
        raise InputError(
            f"{found.name}: no column 'image'; its columns are {found.rows.column_names!s:.500}, and it "
            f"needs a prompt with an image, or one of: {KNOWN}"
        )
    table = _preferences(found)

    def best(fact: dict) -> dict:
        return {name: fact[name][:1] for name in ("rows", "columns", "sha256", "ranks")}

    table.facts, table.soft_labels = table.facts.map(best, features=FACTS, desc="the best images"), False
    return table


def _preferences(found: Source) -> Table:
    form = find_format(_lists(found), found.name)
    if "p_chosen" in found.rows.features and form is not FORMATS[0]:
        raise InputError(f"{found.name} has the column p_chosen, which is for the columns chosen, rejected")
    return _checked(found, form)


def _checked(found: Source, form: Format) -> Table:
    rows, source, folders, _ = found
    prompt = next((name for name in PROMPT_NAMES if name in rows.column_names), None)
    if prompt is None:
        raise InputError(
            f"{source}: no column 'prompt'; its columns are {rows.column_names!s:.500}, and "
            f"{['prompt', *form.columns]} are needed"
        )
    for name in form.images:
        rows = _as_images(rows, name, source, lists=form.lists)

    def check(row: dict, index: int) -> dict:
        where = f"{source}: row {index}"
        if not isinstance(row[prompt], str):
            raise InputError(f"{where} has the prompt {shortened(row[prompt])}; a prompt is text")
        order, cells = form.order(row, where), cells_of(row, form.images)
        contents = [image_bytes(cells[name], f"{where}, column {name}", *folders) for name in order.columns]
        for name, content in zip(order.columns, contents, strict=True):
            check_kind(content[:SIGNATURE], f"{where}, column {name}")
        checked = {
            "prompt": row[prompt],
            "rows": [index] * len(contents),
            "columns": order.columns,
            "sha256": [content_key(content) for content in contents],
            "ranks": order.ranks,
            "p_chosen": order.p_chosen,
            "drop": order.drop,
        }
        return {**checked, "group": str(row[form.group])} if form.group else _in_order(checked)

    features = rows.features

    def check_all(batch: Any, indices: list[int], files: str) -> dict:  # `files` is for datasets' cache key
        parts = (batch.slice(start, AT_ONCE).to_pylist() for start in range(0, len(batch), AT_ONCE))
        cells = zip(indices, chain.from_iterable(parts), strict=True)
        found = [check(features.decode_example(row), index) for index, row in cells]
        return {name: [fact[name] for fact in found] for name in found[0]}

    facts = (
        rows.with_format("arrow")
        .map(
            check_all,
            with_indices=True,
            batched=True,
            fn_kwargs={"files": found._replace(rows=rows).state(form.images)},
            remove_columns=rows.column_names,
            features=_OF_ROWS if form.group else FACTS,
            desc=f"checking {source}",
        )
        .with_format(None)
    )
    if form.group:
        facts = _in_memory(_examples(facts, source))
    dropped = Counter(filter(None, _values(facts, "drop")))
    kept = np.flatnonzero(np.fromiter((not reason for reason in _values(facts, "drop")), bool))
    if not len(kept):
        raise InputError(f"{source}: none of its {len(facts)} rows can be used ({_reasons(dropped)})")
    soft_labels = form.soft_labels or "p_chosen" in rows.column_names
    return Table(source, folders, rows, facts.select(kept) if dropped else facts, dropped, soft_labels)


def _in_order(found: dict) -> dict:
    """The facts of an example with its images from best to worst, an image of one rank once."""
    places = sorted(range(len(found["ranks"])), key=lambda place: found["ranks"][place])
    first: dict[tuple, int] = {}
    for place in places:
        first.setdefault((found["sha256"][place], found["ranks"][place]), place)
    kept = list(first.values())
    ranks = [found["ranks"][place] for place in kept]
    drop = found["drop"]
    if not drop and len(places) > 1 and len(set(ranks)) == 1:
        drop = TIE
    if not drop and len({found["sha256"][place] for place in kept}) < len(kept):
        drop = SAME_IMAGE
    return found | {
        **{name: [found[name][place] for place in kept] for name in ("rows", "columns", "sha256")},
        "ranks": [1 + sum(other < rank for other in ranks) for rank in ranks],
        "drop": drop,
    }


def _examples(facts: Dataset, source: str) -> Iterator[dict]:
    """The facts of examples whose images have a row each; the rows of one need not follow one another."""
    numbers: dict[str, int] = {}
    groups = np.fromiter((numbers.setdefault(key, len(numbers)) for key in _values(facts, "group")), int)
    together = facts.select(np.argsort(groups, kind="stable"))
    for key, of_group in groupby(_rows(together), itemgetter("group")):
        example, *others = of_group
        for other in others:
            if example["prompt"] != other["prompt"]:
                raise InputError(
                    f"{source}: rows {example['rows'][0]} and {other['rows'][0]} have the prompt_id "
                    f"{key:.100}, but the prompts {shortened(example['prompt'])} and "
                    f"{shortened(other['prompt'])}"
                )
            for name in ("rows", "columns", "sha256", "ranks"):
                example[name] += other[name]
        alone = "" if others else "no second image"
        yield _in_order(example | {"drop": alone})


def _as_images(rows: Dataset, name: str, source: str, *, lists: bool) -> Dataset:
    kind: Any = rows.features[name]
    if isinstance(kind, datasets.Json):  # values of several types
        for row, value in enumerate(rows[name]):
            check_paths(value, f"{source}: row {row}, column {name}")
    listed = _is_list(kind)
    if listed != lists:
        wanted = "lists of images" if lists else "images"
        raise InputError(f"{source}: the column {name!r} holds no {wanted} ({kind})")
    kind = kind.feature if isinstance(kind, datasets.List | datasets.LargeList) else kind
    if isinstance(kind, datasets.Image) or (isinstance(kind, datasets.Value) and kind.dtype == "string"):
        return rows
    image: Any = datasets.Image(decode=False)
    try:
        return rows.cast_column(name, datasets.List(image) if listed else image)
    except (ArrowException, TypeError, ValueError) as error:
        raise InputError(f"{source}: the column {name!r} holds no images ({error})") from error


def _lists(found: Source) -> dict[str, bool]:
    """Of each column, whether it holds lists."""
    return {name: _is_list(kind) for name, kind in found.rows.features.items()}


def _is_list(kind: Any) -> bool:
    return isinstance(kind, datasets.List | datasets.LargeList)


def _values(facts: Dataset, name: str) -> Iterator[Any]:
    return (row[name] for row in _rows(facts.select_columns([name])))


def _rows(facts: Dataset) -> Iterator[dict]:
    """The rows one after another, of which a part at a time is in memory as Python's objects."""
    for batch in facts.with_format("arrow").iter(FACTS_AT_ONCE):
        yield from cast(pa.Table, batch).to_pylist()


def _in_memory(facts: Iterator[dict]) -> Dataset:
    """The rows as a table that no file holds."""
    schema, parts = FACTS.arrow_schema, []
    while part := list(islice(facts, FACTS_AT_ONCE)):
        parts.append(pa.Table.from_pylist(part, schema))
    return Dataset(pa.concat_tables(parts))


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
