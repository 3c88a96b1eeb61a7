"""Tables of images: their formats, checks, and what each row says of its images.

A format is recognised by its columns, beside those of the prompt: of these whose columns are all there, the
one with the most.

| columns                                    | format                                                        |
|--------------------------------------------|---------------------------------------------------------------|
| chosen, rejected                           | pairs, optionally with margin, p_chosen                       |
| images, ranks                              | ranked lists, 1 = best, equal = tie                           |
| jpg_0, jpg_1, label_0, label_1             | Pick-a-Pic                                                    |
| image1, image2, votes_image1, votes_image2 | votes: p_chosen is the winner's share                         |
| image_path, rank; or human_preference      | HPDv2: lists of files with their ranks, or the preferred of 2 |
| image, rank, prompt_id                     | ImageReward: a row for each image of a prompt                 |
| image                                      | images to imitate; an imagefolder calls the prompt `text`     |

Open-image-preferences is a `pairs` table as it stands. Images stay encoded bytes until they are needed. A row
that cannot be a preference (a tie, the same image twice) is dropped and counted under its reason; a row that
is broken stops the run.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.records import check_p_chosen, folder_state, image_bytes, json_file, load, table_folder

# `prompt` under the names that other collections give it.
PROMPT_NAMES = ("prompt", "caption", "text")
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


class Order(NamedTuple):
    """What a row says of its images."""

    columns: tuple[str, ...]  # their names: of a column, or as `images[2]` of a place in a list
    ranks: tuple[float, ...]  # lower is better, equal is a tie
    p_chosen: float | None = None  # how likely the better of two is the better one
    drop: str = ""  # why the row is not used; empty if it is


@dataclass
class Table:
    """A checked table: the rows that can be trained on, and how many were dropped for which reason.

    `facts` has a row for each example: its prompt; of its images from best to worst the row in `rows` and the
    name there, the SHA-256 and the rank, 1 more than the number of better ones; and p_chosen if the table has
    it. The images stay where they are, encoded.
    """

    source: str
    split: str
    rows: Dataset
    facts: Dataset
    dropped: Counter[str] = field(default_factory=Counter)
    soft_labels: bool = False  # whether the examples have p_chosen

    def __len__(self) -> int:
        return len(self.facts)

    def __str__(self) -> str:
        dropped = f" (dropped: {_reasons(self.dropped)})" if self.dropped else ""
        return f"{self.source}: {len(self)} rows{dropped}"

    def where(self, index: int) -> str:
        """What an error calls the example `index`."""
        return f"{self.source}: row {self.facts[index]['rows'][0]}"

    def column(self, name: str) -> list:
        """A column of `facts`, read at once: row by row, a million take minutes."""
        return _column(self.facts, name)

    def image(self, index: int, candidate: int) -> tuple[bytes, str]:
        """The encoded image of an example's candidate, counted from the best, and what an error calls it."""
        fact = self.facts[index]
        row, name = fact["rows"][candidate], fact["columns"][candidate]
        where = f"{self.source}: row {row}, column {name}"
        cell = _cells(self.rows[row], [name.partition("[")[0]])[name]
        return image_bytes(cell, where, *_folders(self.source, self.split)), where

    def images(self, index: int) -> list[bytes]:
        """The encoded images of the example `index`, best first."""
        return [self.image(index, place)[0] for place in range(len(self.facts[index]["columns"]))]


# Formats


@dataclass(frozen=True)
class Format:
    """How the rows of a table are read."""

    columns: tuple[str, ...]  # that it is recognised by
    images: tuple[str, ...]  # the columns that hold images, or lists of them
    order: Callable[[Mapping[str, Any], str], Order]  # of a row and its name in errors
    soft_labels: bool = False  # whether the order always gives p_chosen
    lists: bool = False  # whether each of these columns holds several images
    group: str | None = None  # the column that is equal in all rows of one example


def _pair(row: Mapping[str, Any], where: str) -> Order:
    margin, p_chosen = row.get("margin"), row.get("p_chosen")
    if "p_chosen" in row:
        check_p_chosen(p_chosen, where)
    if margin is not None and not (isinstance(margin, Real) and math.isfinite(margin)):
        raise InputError(f"{where} has the margin {margin!r}; a margin is a finite number")
    if margin is not None and margin < 0:
        raise InputError(
            f"{where} has the margin {margin}: its rejected image scores higher than its chosen one"
        )
    return Order(("chosen", "rejected"), (1, 1) if margin == 0 else (1, 2), p_chosen)


def _ranked(row: Mapping[str, Any], where: str) -> Order:
    return _listed("images", "ranks", row, where)


def _listed(images: str, ranks: str, row: Mapping[str, Any], where: str) -> Order:
    names = tuple(_cells(row, [images])) if row[images] is not None else ()
    given = row[ranks] if row[ranks] is not None else []
    if len(names) != len(given):
        raise InputError(f"{where} has {len(names)} {images}, but {len(given)} {ranks}")
    if len(names) < 2:
        raise InputError(f"{where} has {len(names)} in its list {images}; a ranking needs two or more")
    return Order(names, tuple(_rank(rank, where) for rank in given))


def _rank(rank: Any, where: str) -> int:
    if isinstance(rank, bool) or not isinstance(rank, Integral) or int(rank) < 0:
        raise InputError(f"{where} has the rank {rank!r}; ranks are whole numbers, 1 the best")
    return int(rank)


def _pickapic(row: Mapping[str, Any], where: str) -> Order:
    if not row.get("has_label", True):
        return Order(("jpg_0", "jpg_1"), (1, 1), drop="no label")
    labels = (row["label_0"], row["label_1"])
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, Real) or not math.isfinite(label):
            raise InputError(f"{where} has the label {label!r}; labels are numbers: 0, 0.5 or 1")
    return Order(("jpg_0", "jpg_1"), (-labels[0], -labels[1]))


def _votes(row: Mapping[str, Any], where: str) -> Order:
    votes = (row["votes_image1"], row["votes_image2"])
    for count in votes:
        whole = isinstance(count, Real) and not isinstance(count, bool) and float(count).is_integer()
        if not whole or count < 0:
            raise InputError(f"{where} has {count!r} votes; votes are counted: 0, 1, 2, ...")
    total = sum(votes)
    p_chosen = max(votes) / total if total else 0.5
    return Order(("image1", "image2"), (-votes[0], -votes[1]), p_chosen, "" if total else "no votes")


def _hpdv2(row: Mapping[str, Any], where: str) -> Order:
    if row.get("rank") is not None:
        return _listed("image_path", "rank", row, where)
    preferred = row.get("human_preference")
    if preferred not in ([0, 1], [1, 0], [0, 0], [1, 1]):
        raise InputError(
            f"{where} has the human_preference {preferred!r}; it is 1 for a preferred image, else 0"
        )
    names = tuple(_cells(row, ["image_path"]))
    if len(names) != 2:
        raise InputError(f"{where} has {len(names)} image_path, but a human_preference of 2")
    return Order(names, (-preferred[0], -preferred[1]))


def _image_reward(row: Mapping[str, Any], where: str) -> Order:
    if row["prompt_id"] is None:
        raise InputError(f"{where} has no prompt_id, which tells the images of a prompt from others")
    return Order(("image",), (_rank(row["rank"], where),))


FORMATS = (
    Format(("chosen", "rejected"), ("chosen", "rejected"), _pair),
    Format(("images", "ranks"), ("images",), _ranked, lists=True),
    Format(("jpg_0", "jpg_1", "label_0", "label_1"), ("jpg_0", "jpg_1"), _pickapic),
    Format(
        ("image1", "image2", "votes_image1", "votes_image2"), ("image1", "image2"), _votes, soft_labels=True
    ),
    Format(("image_path", "rank"), ("image_path",), _hpdv2, lists=True),
    Format(("image_path", "human_preference"), ("image_path",), _hpdv2, lists=True),
    Format(("image", "rank", "prompt_id"), ("image",), _image_reward, group="prompt_id"),
)


# Reading


def read_preferences(
    source: str, *, split: str = "train", config: str | None = None, revision: str | None = None
) -> Table:
    """Preferences of a local folder or a hub id, in any of the formats above: pairs, or ranked lists.

    Ties (a margin of 0, equal labels, votes or ranks) and the same image at two ranks are dropped with their
    reason; the same image twice at one rank counts once. A table of nothing but ties, a missing column or
    image, ranks that do not match the images and a prompt that is no text are an InputError.
    """
    rows, source = _rows(source, split, config, revision)
    names = set(rows.column_names)
    form = max(FORMATS, key=lambda form: (names.issuperset(form.columns), len(names & set(form.columns))))
    if missing := [name for name in form.columns if name not in names]:
        others = "; ".join(", ".join(form.columns) for form in FORMATS)
        raise InputError(
            f"{source}: no column {' and no column '.join(map(repr, missing))}; its columns are "
            f"{rows.column_names}, and preferences need a prompt and one of: {others}"
        )
    if "p_chosen" in rows.column_names and form is not FORMATS[0]:
        raise InputError(f"{source} has the column p_chosen, which is for the columns chosen, rejected")
    return _checked(rows, source, split, form)


def read_sft(
    source: str, *, split: str = "train", config: str | None = None, revision: str | None = None
) -> Table:
    """Prompts with one image each, of a folder or a hub id; of pairs the chosen, of lists the best image."""
    named, (rows, source) = source, _rows(source, split, config, revision)
    names = set(rows.column_names)
    column = next((name for name in ("image", "chosen") if name in names), None)
    if column and not {"rank", "prompt_id"} <= names:
        alone = Order((column,), (1,))
        return _checked(rows, source, split, Format((column,), (column,), lambda row, where: alone))
    if not any(set(form.columns) <= names for form in FORMATS):
        raise InputError(f"{source}: no column 'image'; its columns are {rows.column_names}")
    table = read_preferences(named, split=split, config=config, revision=revision)

    def best(fact: dict) -> dict:
        return {name: fact[name][:1] for name in ("rows", "columns", "sha256", "ranks")}

    table.facts, table.soft_labels = table.facts.map(best, features=FACTS, desc="the best images"), False
    return table


def _rows(source: str, split: str, config: str | None, revision: str | None) -> tuple[Dataset, str]:
    source = table_folder(source, config)
    file = json_file(Path(source), split) if Path(source).is_dir() else None
    if file is None:
        return load(source, split=split, config=config, revision=revision), source
    try:
        # As in records.load: the name is part of datasets' cache key.
        name, files = folder_state(Path(source))[:16], {split: str(file)}
        rows: Any = datasets.load_dataset("json", name, data_files=files, split=split)
    except (DatasetsError, ValueError, ArrowException, StopIteration) as error:
        raise InputError(f"{file} cannot be read as JSON: {str(error) or 'it is empty'}") from error
    return rows, source


def _checked(rows: Dataset, source: str, split: str, form: Format) -> Table:
    prompt = next((name for name in PROMPT_NAMES if name in rows.column_names), None)
    if prompt is None:
        raise InputError(
            f"{source}: no column 'prompt'; its columns are {rows.column_names}, and "
            f"{['prompt', *form.columns]} are needed"
        )
    for name in form.images:
        rows = _as_images(rows, name, source, lists=form.lists)
    folders = _folders(source, split)

    def check(row: dict, index: int, files: str) -> dict:  # `files` is for datasets' cache key
        where = f"{source}: row {index}"
        if not isinstance(row[prompt], str):
            raise InputError(f"{where} has the prompt {row[prompt]!r}; a prompt is text")
        order, cells = form.order(row, where), _cells(row, form.images)
        contents = [image_bytes(cells[name], f"{where}, column {name}", *folders) for name in order.columns]
        found = {
            "prompt": row[prompt],
            "rows": [index] * len(contents),
            "columns": order.columns,
            "sha256": [content_key(content) for content in contents],
            "ranks": order.ranks,
            "p_chosen": order.p_chosen,
            "drop": order.drop,
        }
        return {**found, "group": str(row[form.group])} if form.group else _in_order(found)

    facts = rows.map(
        check,
        with_indices=True,
        fn_kwargs={"files": folder_state(Path(source)) if Path(source).is_dir() else ""},
        remove_columns=rows.column_names,
        features=_OF_ROWS if form.group else FACTS,
        desc=f"checking {source}",
    )
    if form.group:
        facts = Dataset.from_list(list(_examples(facts, source)), FACTS)
    reasons = _column(facts, "drop")
    dropped = Counter(reason for reason in reasons if reason)
    kept = [index for index, reason in enumerate(reasons) if not reason]
    if not kept:
        raise InputError(f"{source}: none of its {len(facts)} rows can be used ({_reasons(dropped)})")
    soft_labels = form.soft_labels or "p_chosen" in rows.column_names
    return Table(source, split, rows, facts.select(kept), dropped, soft_labels)


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
    groups: dict[str, dict] = {}
    for fact in facts.to_list():
        key = fact.pop("group")
        group = groups.setdefault(key, fact)
        if group["prompt"] != fact["prompt"]:
            raise InputError(
                f"{source}: rows {group['rows'][0]} and {fact['rows'][0]} have the prompt_id {key}, but the "
                f"prompts {group['prompt']!r} and {fact['prompt']!r}"
            )
        if group is not fact:
            for name in ("rows", "columns", "sha256", "ranks"):
                group[name] += fact[name]
    for group in groups.values():
        alone = "" if len(group["rows"]) > 1 else "no second image"
        yield _in_order(group | {"drop": alone})


def _as_images(rows: Dataset, name: str, source: str, *, lists: bool) -> Dataset:
    kind: Any = rows.features[name]
    listed = isinstance(kind, datasets.List | datasets.LargeList)
    if listed != lists:
        wanted = "lists of images" if lists else "images"
        raise InputError(f"{source}: the column {name!r} holds no {wanted} ({kind})")
    kind = kind.feature if listed else kind
    if isinstance(kind, datasets.Image) or (isinstance(kind, datasets.Value) and kind.dtype == "string"):
        return rows
    image: Any = datasets.Image(decode=False)
    try:
        return rows.cast_column(name, datasets.List(image) if listed else image)
    except (ArrowException, TypeError, ValueError) as error:
        raise InputError(f"{source}: the column {name!r} holds no images ({error})") from error


def _cells(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, dict | None]:
    """The image cells of a row by name: `chosen`, or `images[0]`, `images[1]` of a list."""
    cells = {}
    for column in columns:
        value = row[column]
        if isinstance(value, list):
            cells |= {f"{column}[{place}]": _cell(entry) for place, entry in enumerate(value)}
        else:
            cells[column] = _cell(value)
    return cells


def _cell(value: Any) -> dict | None:
    return {"path": value} if isinstance(value, str) else value


def _folders(source: str, split: str) -> list[Path]:
    """The dataset's folder, and where HPDv2 has a split's files; none for a dataset from the hub."""
    folder = Path(source).resolve()
    return [folder, folder / split] if folder.is_dir() else []


def _column(facts: Dataset, name: str) -> list:
    values: Any = facts.with_format("arrow")[name][:]
    return values.to_pylist()


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
