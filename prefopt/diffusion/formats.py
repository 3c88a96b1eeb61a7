"""Formats of tables of images: what each row says of its images.

A format is recognised by its columns, beside those of the prompt; a table has the columns of one format. An
image is stored in its cell, or is a path that starts in the folder of the table.

| columns                                    | format                                                        |
|--------------------------------------------|---------------------------------------------------------------|
| chosen, rejected                           | pairs, optionally with margin, p_chosen                       |
| images, ranks                              | ranked lists, 1 = best, equal = tie                           |
| jpg_0, jpg_1, label_0, label_1             | Pick-a-Pic                                                    |
| image1, image2, votes_image1, votes_image2 | votes: p_chosen is the winner's share                         |
| image_path, rank                           | HPDv2: lists of files with their ranks                        |
| image_path or file_path, human_preference  | HPDv2: two files, and which of them is preferred              |
| image or image_path, rank, prompt_id       | ImageReward: a row for each image of a prompt                 |
| image                                      | images to imitate; an imagefolder calls the prompt `text`     |

Open-image-preferences is a `pairs` table as it stands.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from reprlib import repr as shortened
from typing import Any, NamedTuple

from prefopt.errors import InputError
from prefopt.records import check_p_chosen


class Order(NamedTuple):
    """What a row says of its images."""

    columns: tuple[str, ...]  # their names: of a column, or as `images[2]` of a place in a list
    ranks: tuple[float, ...]  # lower is better, equal is a tie
    p_chosen: float | None = None  # how likely the better of two is the better one
    drop: str = ""  # why the row is not used; empty if it is


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
    if margin is not None and not (_is_number(margin) and math.isfinite(margin)):
        raise InputError(f"{where} has the margin {shortened(margin)}; a margin is a finite number")
    if margin is not None and margin < 0:
        raise InputError(
            f"{where} has the margin {margin}: its rejected image scores higher than its chosen one"
        )
    return Order(("chosen", "rejected"), (1, 1) if margin == 0 else (1, 2), p_chosen)


def _ranked(row: Mapping[str, Any], where: str) -> Order:
    return _listed("images", "ranks", row, where)


def _listed(images: str, ranks: str, row: Mapping[str, Any], where: str) -> Order:
    names = tuple(cells_of(row, [images])) if row[images] is not None else ()
    given = row[ranks] if row[ranks] is not None else []
    if not isinstance(given, list):
        raise InputError(
            f"{where} has the {ranks} {shortened(given)}; it is to be a list, a rank for each image"
        )
    if len(names) != len(given):
        raise InputError(f"{where} has {len(names)} {images}, but {len(given)} {ranks}")
    if len(names) < 2:
        raise InputError(f"{where} has {len(names)} in its list {images}; a ranking needs two or more")
    return Order(names, tuple(_rank(rank, where) for rank in given))


def _rank(rank: Any, where: str) -> int:
    if isinstance(rank, bool) or not isinstance(rank, Integral) or int(rank) < 0:
        raise InputError(f"{where} has the rank {shortened(rank)}; ranks are whole numbers, 1 the best")
    return int(rank)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _pickapic(row: Mapping[str, Any], where: str) -> Order:
    has_label, labels = row.get("has_label", True), (row["label_0"], row["label_1"])
    if has_label not in (True, False):
        raise InputError(f"{where} has the has_label {shortened(has_label)}; it is true or false")
    if not has_label:
        return Order(("jpg_0", "jpg_1"), (1, 1), drop="no label")
    for label in labels:
        if not _is_number(label) or label not in (0, 0.5, 1):
            raise InputError(f"{where} has the label {shortened(label)}; labels are numbers: 0, 0.5 or 1")
    return Order(("jpg_0", "jpg_1"), (-labels[0], -labels[1]))


def _votes(row: Mapping[str, Any], where: str) -> Order:
    votes = (row["votes_image1"], row["votes_image2"])
    for count in votes:
        if not _is_number(count) or count < 0 or count % 1:
            raise InputError(f"{where} has {shortened(count)} votes; votes are counted: 0, 1, 2, ...")
    total = sum(votes)
    p_chosen = max(votes) / total if total else 0.5
    return Order(("image1", "image2"), (-votes[0], -votes[1]), p_chosen, "" if total else "no votes")


def _hpdv2_ranks(row: Mapping[str, Any], where: str) -> Order:
    return _listed("image_path", "rank", row, where)


def _hpdv2_pair(column: str) -> Callable[[Mapping[str, Any], str], Order]:
    def order(row: Mapping[str, Any], where: str) -> Order:
        preferred = row["human_preference"]
        if preferred not in ([0, 1], [1, 0], [0, 0], [1, 1]):
            raise InputError(
                f"{where} has the human_preference {shortened(preferred)}; it has a 0 or 1 for each of two "
                "images, and 1 is the preferred one"
            )
        names = tuple(cells_of(row, [column]))
        if len(names) != 2:
            raise InputError(f"{where} has {len(names)} {column}, but a human_preference of 2")
        return Order(names, (-preferred[0], -preferred[1]))

    return order


def _image_reward(column: str) -> Callable[[Mapping[str, Any], str], Order]:
    def order(row: Mapping[str, Any], where: str) -> Order:
        if row["prompt_id"] is None:
            raise InputError(f"{where} has no prompt_id, which tells the images of a prompt from others")
        return Order((column,), (_rank(row["rank"], where),))

    return order


FORMATS = (
    Format(("chosen", "rejected"), ("chosen", "rejected"), _pair),
    Format(("images", "ranks"), ("images",), _ranked, lists=True),
    Format(("jpg_0", "jpg_1", "label_0", "label_1"), ("jpg_0", "jpg_1"), _pickapic),
    Format(
        ("image1", "image2", "votes_image1", "votes_image2"), ("image1", "image2"), _votes, soft_labels=True
    ),
    Format(("image_path", "rank"), ("image_path",), _hpdv2_ranks, lists=True),
    *(
        Format((column, "human_preference"), (column,), _hpdv2_pair(column), lists=True)
        for column in ("image_path", "file_path")
    ),
    *(
        Format((column, "rank", "prompt_id"), (column,), _image_reward(column), group="prompt_id")
        for column in ("image", "image_path")
    ),
)
# `prompt` under the names that other collections give it; the first that is there counts.
PROMPT_NAMES = ("prompt", "caption", "text")
KNOWN = "; ".join(", ".join(form.columns) for form in FORMATS)


def find_format(lists: Mapping[str, bool], where: str) -> Format:
    """The format that a table's columns show; `lists` says of each column whether it holds lists.

    InputError names what is missing to the nearest one, or the two formats that it could be.
    """

    def fits(form: Format) -> tuple[bool, bool, int]:
        whole = lists.keys() >= set(form.columns)
        alike = whole and lists[form.images[0]] == form.lists
        return whole, alike, len(lists.keys() & set(form.columns))

    form = max(FORMATS, key=fits)
    if missing := [name for name in form.columns if name not in lists]:
        others = [name for name in lists if name not in PROMPT_NAMES]
        near = [alike for name in missing for alike in get_close_matches(name, others, n=1)]
        guess = f" (is it {near[0]!r}, misspelt?)" if near else ""
        more = "; images to imitate, without preferences, are for diffusion_sft" if "image" in lists else ""
        raise InputError(
            f"{where}: no column {' and no column '.join(map(repr, missing))}{guess}; its columns are "
            f"{list(lists)!s:.500}, and preferences need a prompt and one of: {KNOWN}{more}"
        )
    refuse_second_format(form, lists, where)
    return form


def refuse_second_format(form: Format, lists: Mapping[str, bool], where: str) -> None:
    """InputError if a table could be read in another format, too, which might say something else."""
    for other in FORMATS:
        alike = lists.keys() >= set(other.columns) and lists[other.images[0]] == other.lists
        # ImageRewardDB has its pictures under `image`, and their paths, too.
        if alike and set(other.columns) - {*form.columns, "image_path", "file_path"}:
            raise InputError(
                f"{where} is in two formats at once: it has the columns {', '.join(form.columns)}, and "
                f"{', '.join(other.columns)}; drop those of one"
            )


def cells_of(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, dict | None]:
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
    return {"path": value} if isinstance(value, str) and value else value or None
