"""Rows of trl's vision preference format, read and checked: a broken row is an InputError that names it.

`images` is a list of encoded images (or `image` a single one); `prompt` is a list of messages or plain text,
read as one user turn; `chosen` and `rejected` are one assistant message each, or plain text. Where the prompt
has no placeholder, the images go before its first user turn, as trl does; an image token that a text spells
out is a placeholder, too.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import datasets
import pyarrow
import pyarrow.compute
import torch
from PIL import Image

from prefopt.errors import InputError
from prefopt.images import open_image
from prefopt.records import check_p_chosen, image_bytes, load, table_folder

TEXTS = ("prompt", "chosen", "rejected")
ROLES = ("system", "user", "assistant")


class VisionPair(TypedDict):
    """One checked row: messages whose contents are lists of blocks, an image block for each image."""

    item: int  # the row's number in its source
    where: str  # what an error calls the row
    images: list[Image.Image]
    prompt: list[dict]
    chosen: list[dict]
    rejected: list[dict]
    p_chosen: float | None  # how likely the chosen is the better one, if the table says so


class VisionPairs(torch.utils.data.Dataset):
    """Pairs to train on, indexed with (index, visit); nothing here is random, so all visits are alike.

    Every row's text and number of images is checked at the start; the images are opened when they are read.
    A pair with the same text on both sides is a tie: dropped and counted in `dropped`.
    """

    def __init__(self, rows: datasets.Dataset, source: str, *, image_token: str = "<image>"):
        self.column = _image_column(rows, source)
        self.soft_labels = "p_chosen" in rows.column_names
        self.columns = [*TEXTS, *(["p_chosen"] if self.soft_labels else [])]
        # Arrow's cells are the encoded bytes; a cast to undecoded images would copy the whole table.
        self.rows = rows.select_columns([self.column, *self.columns]).with_format("arrow")
        self.source, self.image_token = source, image_token
        self.items: list[int] = []  # numbers of the kept rows
        self.dropped: Counter[str] = Counter()
        for item, (row, images) in enumerate(self._texts()):
            _, chosen, rejected = self._messages(row, images, item)
            if self.soft_labels:
                check_p_chosen(row["p_chosen"], self.where(item))
            if _text(chosen) == _text(rejected):
                self.dropped["tie"] += 1
            else:
                self.items.append(item)
        if not self.items:
            raise InputError(
                f"{source}: all of its {len(rows)} rows are ties, with the same text on both sides"
            )

    def __str__(self) -> str:
        dropped = f" (dropped: {self.dropped['tie']} tie)" if self.dropped else ""
        return f"{self.source}: {len(self)} rows{dropped}"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index_and_visit: tuple[int, int]) -> VisionPair:
        item = self.items[index_and_visit[0]]
        table: Any = self.rows[item]
        row, where = table.to_pylist()[0], self.where(item)
        inside = Path(self.source).resolve() if Path(self.source).is_dir() else None
        images = [_picture(cell, where, inside) for cell in _listed(row[self.column])]
        prompt, chosen, rejected = self._messages(row, len(images), item)
        sides: Any = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        return VisionPair(item=item, where=where, images=images, **sides, p_chosen=row.get("p_chosen"))

    def _texts(self) -> Iterator[tuple[dict, int]]:
        """Each row's texts and number of images, read off the table's offsets: the pixels stay on disk."""
        for batch in self.rows.iter(1000):
            table: Any = batch
            cells = table[self.column]
            if self.column == "image":
                lengths = cells.is_valid().to_pylist()
            else:
                lengths = pyarrow.compute.call_function("list_value_length", [cells]).to_pylist()
            for row, length in zip(table.select(self.columns).to_pylist(), lengths, strict=True):
                yield row, int(length or 0)

    def where(self, item: int) -> str:
        """What an error calls a row."""
        return f"{self.source}: row {item}"

    def _messages(self, row: Any, images: int, item: int) -> tuple[list[dict], list[dict], list[dict]]:
        where, token = self.where(item), self.image_token
        return (
            _prompt(row["prompt"], images, f"{where}, prompt", token),
            _completion(row["chosen"], f"{where}, chosen", token),
            _completion(row["rejected"], f"{where}, rejected", token),
        )


def read_vision_pairs(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    image_token: str = "<image>",
) -> VisionPairs:
    """The pairs of a local folder or a hub id; `image_token` is how the processor spells an image in text."""
    source = table_folder(source, config)
    rows = load(source, split=split, config=config, revision=revision)
    return VisionPairs(rows, source, image_token=image_token)


def _image_column(rows: datasets.Dataset, source: str) -> str:
    """The column that holds the images, `images` or `image`; a missing column is an InputError."""
    names = rows.column_names
    column = "image" if "image" in names and "images" not in names else "images"
    missing = [name for name in (*TEXTS, column) if name not in names]
    if missing:
        raise InputError(
            f"{source}: no column {' and no column '.join(map(repr, missing))}; its columns are {names}, and "
            f"{['images', *TEXTS]} are needed"
        )
    kind: Any = rows.features.arrow_schema.field(column).type
    if column == "images" and not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        raise InputError(
            f"{source}: the column 'images' holds no lists; name a column of single images 'image'"
        )
    return column


def _listed(cell: Any) -> list:
    return cell if isinstance(cell, list) else [] if cell is None else [cell]


def _picture(cell: Any, where: str, inside: Path | None) -> Image.Image:
    """The image of a cell, upright and in RGB; one that cannot be read, or of 1 x 1, is an InputError."""
    cell = {"bytes": None, "path": cell} if isinstance(cell, str) else cell
    picture = open_image(image_bytes(cell, f"{where}, images", inside), f"{where}, images")
    if min(picture.size) < 2:
        raise InputError(f"{where} has an image of {picture.width} x {picture.height} pixels; drop the row")
    return picture


def _prompt(value: Any, images: int, where: str, image_token: str) -> list[dict]:
    """The prompt's messages, with one image block for each image."""
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where} is {value!r}; it is to be text or a list of messages")
    prompt = [_message(message, where, image_token) for message in messages]
    if prompt[-1]["role"] != "user":
        raise InputError(
            f"{where} ends with a message of {prompt[-1]['role']!r}; it is to end with the user's"
        )
    placeholders = sum(block["type"] == "image" for message in prompt for block in message["content"])
    plain = [i for i, old in enumerate(messages) if old["role"] == "user" and isinstance(old["content"], str)]
    if plain and not placeholders:
        prompt[plain[0]]["content"][:0] = [{"type": "image"} for _ in range(images)]
    elif placeholders != images:
        raise InputError(
            f"{where} has {placeholders} image placeholders, and the row has {images} images; "
            "give each image its placeholder"
        )
    return prompt


def _completion(value: Any, where: str, image_token: str) -> list[dict]:
    """The one assistant message of a side, which holds text and nothing else."""
    messages = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or len(messages) != 1:
        raise InputError(f"{where} is {value!r}; it is to be text or a list of one assistant message")
    message = _message(messages[0], where, image_token)
    if message["role"] != "assistant":
        raise InputError(f"{where} is a message of {message['role']!r}; it is to be one of 'assistant'")
    if any(block["type"] != "text" for block in message["content"]):
        raise InputError(f"{where} holds an image placeholder; only a prompt can show images")
    if not any(block["text"].strip() for block in message["content"]):
        raise InputError(f"{where} is empty; a completion needs at least one word")
    return [message]


def _text(messages: list[dict]) -> str:
    return "".join(block["text"] for message in messages for block in message["content"]).strip()


def _message(message: Any, where: str, image_token: str) -> dict:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise InputError(f"{where} has the message {message!r}; a message has a role and a content")
    if message["role"] not in ROLES:
        raise InputError(f"{where} has a message of {message['role']!r}; roles are {', '.join(ROLES)}")
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list):
        raise InputError(f"{where} has the content {content!r}; it is to be text or a list of blocks")
    parts = [new for old in blocks for new in _blocks(old, where, image_token)]
    return {"role": message["role"], "content": parts}


def _blocks(block: Any, where: str, image_token: str) -> list[dict]:
    """A block as it is, or a text parted at the image tokens that it spells out, without their line ends."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "image":
        if block.get("image") is not None:
            raise InputError(f"{where} carries an image inside of a message; put it into the column images")
        return [{"type": "image"}]
    if kind != "text" or not isinstance(block.get("text"), str):
        raise InputError(
            f"{where} has the block {block!r}; a block is of type 'text', with a text, or 'image'"
        )
    if image_token not in block["text"]:
        return [{"type": "text", "text": block["text"]}]
    blocks: list[dict] = []
    for part in block["text"].split(image_token):
        blocks += [{"type": "text", "text": part.strip("\n")}] if part.strip("\n") else []
        blocks.append({"type": "image"})
    return blocks[:-1]
