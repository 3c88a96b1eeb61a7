"""Vision-language examples, read from a table and checked: a broken row is an InputError that names it.

All texts, the numbers of images, the paths of those that lie in files and how they begin are checked at the
start; the images stay encoded until an example is read.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import datasets
from PIL import Image

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.files import content_key, lines_key
from prefopt.images import SIGNATURE, check_kind
from prefopt.records import check_p_chosen, image_file, load, read_split, refuse_options
from prefopt.visits import VisitDataset
from prefopt.vlm.cells import encoded_images, image_column, image_places, open_picture
from prefopt.vlm.formats import UNREAD, Kind, find_format
from prefopt.vlm.messages import PLACEHOLDER, check_completion, place_images, text_of

BATCH = 128  # rows that are read at once, for their hashes with their encoded images


class VisionExample(TypedDict):
    """One checked row: messages whose contents are lists of blocks."""

    item: int  # the row's number in its source
    where: str  # what an error calls the row
    images: list[Image.Image]  # RGB, upright
    image_key: str  # of the encoded images in their order; "" without images
    prompt: list[dict]  # with an image block for each image; ends with the user's message
    completions: list[list[dict]]  # [chosen, rejected], or one; texts, the first and last the assistant's
    p_chosen: float | None  # how likely the chosen is the better one, if the table says so


class VisionExamples(VisitDataset):
    """Checked rows of a table, indexed with (index, visit); nothing is random, so all visits are alike.

    `kind` says whether an example is a pair or one completion to learn from; the columns show the format. A
    pair with the same text on both sides is a tie: dropped and counted in `dropped`. `items` are the numbers
    of the rows that are kept.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        source: str,
        kind: Kind,
        *,
        folder: Path | None = None,
        image_token: str = PLACEHOLDER,
    ):
        self.source, self.kind, self.image_token = source, kind, image_token
        self.folder = folder  # that paths in cells start from, and may not leave
        self.format = find_format(rows.column_names, kind, source)
        self.column = image_column(rows, source)
        self.soft_labels = kind == "pairs" and "p_chosen" in rows.column_names
        more = (*self.format.optional, *UNREAD, *(["p_chosen"] if self.soft_labels else []))
        self.texts = [*self.format.columns, *(name for name in more if name in rows.column_names)]
        self.json = {name: rows.features[name] for name in self.texts if _holds_json(rows.features[name])}
        # Arrow's cells are the encoded bytes; a cast to undecoded images would copy the whole table.
        self.rows = rows.select_columns([self.column, *self.texts]).with_format("arrow")
        self.items: list[int] = []
        self.dropped: Counter[str] = Counter()
        self._hashes: list[tuple[str, ...]] | None = None
        self._identity: dict[str, str] | None = None
        for item, (row, images) in enumerate(self._read_texts()):
            self._check_places(images, item)
            if self.soft_labels:
                check_p_chosen(row["p_chosen"], self.where(item))
            _, completions = self._messages(row, len(images), item)
            if kind == "pairs" and _said(completions[0]) == _said(completions[1]):
                self.dropped["tie"] += 1
            else:
                self.items.append(item)
        if not self.items:
            raise InputError(
                f"{source}: all of its {len(rows)} rows are ties, with the same text on both sides"
            )

    def __str__(self) -> str:
        side = "" if self.kind == self.format.kind else ", the chosen side of each pair"
        dropped = f" (dropped: {self.dropped['tie']} tie)" if self.dropped else ""
        return f"{self.source}: {len(self)} rows{side}{dropped}"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index_and_visit: tuple[int, int]) -> VisionExample:
        index = index_and_visit[0]
        item = self.items[index]
        table: Any = self.rows[item]
        row, where = self._decoded(table.to_pylist()[0]), self.where(item)
        contents = encoded_images(row[self.column], f"{where}, {self.column}", self.folder)
        hashes = tuple(map(content_key, contents))
        if self._hashes and hashes != self._hashes[index]:
            raise InputError(f"{where}: an image has changed since the table was read; start again")
        prompt, completions = self._messages(row, len(contents), item)
        return VisionExample(
            item=item,
            where=where,
            images=[open_picture(content, f"{where}, {self.column}") for content in contents],
            image_key=_joined(hashes),
            prompt=prompt,
            completions=completions,
            p_chosen=row["p_chosen"] if self.soft_labels else None,
        )

    def where(self, item: int) -> str:
        """What an error calls a row."""
        return f"{self.source}: row {item}"

    def select(self, indices: Sequence[int]) -> "VisionExamples":
        """Some of these examples; they keep the numbers of their rows."""
        part = copy.copy(self)
        part.items, part.dropped = [self.items[index] for index in indices], Counter()
        part._hashes = [self._hashes[index] for index in indices] if self._hashes else None
        part._identity = None
        return part

    # What is computed once, over all examples

    def image_hashes(self) -> list[tuple[str, ...]]:
        """Of each example, the SHA-256 of every encoded image."""
        if self._hashes is None:
            kept, hashes, item = set(self.items), {}, 0
            for batch in self.rows.select_columns([self.column]).iter(BATCH):
                table: Any = batch
                for cell in table[self.column].to_pylist():
                    if item in kept:
                        contents = encoded_images(cell, f"{self.where(item)}, {self.column}", self.folder)
                        hashes[item] = tuple(map(content_key, contents))
                    item += 1
            self._hashes = [hashes[item] for item in self.items]
        return self._hashes

    def image_keys(self) -> list[str]:
        """Of each example, its `image_key`: one image's SHA-256, or the SHA-256 over those of several."""
        return [_joined(hashes) for hashes in self.image_hashes()]

    def conversations(self) -> list[tuple[list[dict], list[list[dict]]]]:
        """Of each example, its prompt and its completions."""
        kept = set(self.items)
        found = {
            item: self._messages(row, len(images), item)
            for item, (row, images) in enumerate(self._read_texts())
            if item in kept
        }
        return [found[item] for item in self.items]

    @property
    def identity(self) -> Mapping[str, str]:
        """What the examples depend on, for what is computed from them and kept: their texts and images."""
        if self._identity is None:
            rows = zip(self.image_hashes(), self.conversations(), strict=True)
            self._identity = {"rows": content_key("\n".join(content_key(json.dumps(row)) for row in rows))}
        return self._identity

    def texts_key(self) -> str:
        """The SHA-256 over these examples' numbers and texts; no image is read for it."""
        batches: Any = self.rows.select_columns(self.texts).iter(BATCH)
        rows = enumerate(chain.from_iterable(batch.to_pylist() for batch in batches))
        kept = set(self.items)
        texts = (json.dumps(row, default=str) for item, row in rows if item in kept)
        return lines_key(chain([str(self.items)], texts))

    # Rows

    def _read_texts(self) -> Iterator[tuple[dict, list[str | bytes]]]:
        """Each row's texts, and the places of its images, which stay where they are."""
        for batch in self.rows.iter(BATCH):
            table: Any = batch
            texts = table.select(self.texts).to_pylist()
            yield from zip(map(self._decoded, texts), image_places(table[self.column]), strict=True)

    def _decoded(self, row: dict) -> dict:
        return row | {name: _from_json(row[name], feature) for name, feature in self.json.items()}

    def _messages(self, row: dict, images: int, item: int) -> tuple[list[dict], list[list[dict]]]:
        where, token = self.where(item), self.image_token
        for name in UNREAD:
            if row.get(name) not in (None, "", "[]", []):
                raise InputError(f"{where} has {name}, which are not read; drop the row or the column")
        found = self.format.read(row, self.format.columns, where)
        prompt_name, *names = [f"{where}, {name}" for name in found.names]
        prompt = place_images(found.prompt, images, prompt_name, token)
        count = 2 if self.kind == "pairs" else 1
        sides = zip(found.completions[:count], names[:count], strict=True)
        turns = self.kind == "sft"
        return prompt, [check_completion(side, name, token, turns=turns) for side, name in sides]

    def _check_places(self, images: list[str | bytes], item: int) -> None:
        where, folders = f"{self.where(item)}, {self.column}", [self.folder] if self.folder else []
        for place in images:
            if not place:
                raise InputError(f"{where} has a cell without an image")
            if isinstance(place, str):
                with image_file(place, where, *folders).open("rb") as file:
                    check_kind(file.read(SIGNATURE), where)
            else:
                check_kind(place, where)


def read_vision_examples(
    source: str,
    kind: Kind,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    image_token: str = PLACEHOLDER,
) -> VisionExamples:
    """The examples of a local folder or file or a hub id, in any format of `prefopt.vlm.formats`.

    `pocket` has questions with answers, right ones or pairs, in the splits train and test. `image_token` is
    how the processor spells an image in text.
    """
    if source == pocket.NAME:
        refuse_options(source, config=config, revision=revision)
        rows = read_split(split, partial(_pocket_rows, kind))
        return VisionExamples(rows, source, kind, image_token=image_token)
    found = load(source, split=split, config=config, revision=revision)
    folder = found.folders[0] if found.folders else None
    return VisionExamples(found.rows, found.name, kind, folder=folder, image_token=image_token)


def _pocket_rows(kind: Kind, split: str) -> datasets.Dataset:
    from prefopt.pocket.questions import pair_rows, qa_rows  # they draw, which nobody else needs

    make = pair_rows if kind == "pairs" else qa_rows
    return make(split)  # pyright: ignore[reportArgumentType] (it refuses a split that it does not have)


def _said(completion: list[dict]) -> list[str]:
    return [text_of(message) for message in completion]


def _joined(hashes: tuple[str, ...]) -> str:
    return hashes[0] if len(hashes) == 1 else content_key(" ".join(hashes)) if hashes else ""


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_json, feature.values()))
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _holds_json(feature.feature)
    return isinstance(feature, datasets.Json)


def _from_json(value: Any, feature: Any) -> Any:
    """A cell with the values that datasets stores as JSON decoded."""
    if value is None:
        return None
    if isinstance(feature, datasets.Json):
        return json.loads(value)
    if isinstance(feature, dict):
        return {name: _from_json(value[name], kind) for name, kind in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return [_from_json(part, feature.feature) for part in value]
    return value
