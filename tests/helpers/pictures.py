"""Small random pictures, and tables of them written to folders in every format that is read."""

import hashlib
import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
from PIL import Image
from tiny import SIZE

PAIRS = datasets.Features(
    {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
)

RANKED = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "ranks": datasets.List(datasets.Value("int64")),
    }
)


def picture(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int, width: int = SIZE, height: int = SIZE) -> bytes:
    """A random picture as PNG."""
    return encoded(picture(seed, width, height))


def pair_rows(count: int) -> dict[str, list]:
    """The columns of `count` pairs, no two images alike."""
    return {
        "prompt": [f"prompt {i % 5}" for i in range(count)],
        "chosen": [cell(png(2 * i)) for i in range(count)],
        "rejected": [cell(png(2 * i + 1)) for i in range(count)],
    }


def cell(content: bytes | None, path: str | None = None) -> dict:
    """An image as it lies in a table."""
    return {"bytes": content, "path": path}


def write_table(
    folder: Path, columns: dict, features: datasets.Features | None = None, name="train.parquet"
) -> str:
    """Write columns as one Parquet file; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # Dataset.to_parquet would read the files behind paths; a broken table must be writable here.
    pyarrow.parquet.write_table(datasets.Dataset.from_dict(columns, features).data.table, folder / name)
    return str(folder)


def write_pairs(folder: Path, count: int = 4, **columns: list) -> str:
    """Write a pairs table, with the given columns in place of, or beside, its own."""
    features = {name: PAIRS[name] for name in PAIRS} | {
        name: datasets.Dataset.from_dict({name: values}).features[name]
        for name, values in columns.items()
        if name not in ("chosen", "rejected")
    }
    return write_table(folder, {**pair_rows(count), **columns}, datasets.Features(features))


def ranked_rows(lists: list[list[int]], ranks: list) -> dict[str, list]:
    """The columns of ranked lists of random pictures, named by their seeds."""
    return {
        "prompt": [f"prompt {i}" for i in range(len(lists))],
        "images": [[cell(png(seed)) for seed in seeds] for seeds in lists],
        "ranks": ranks,
    }


def write_ranked(folder: Path, lists: list[list[int]], ranks: list) -> str:
    """Write a table of ranked lists; ranks may be of any type."""
    rows = ranked_rows(lists, ranks)
    kind = datasets.Dataset.from_dict({"ranks": ranks}).features["ranks"]
    return write_table(folder, rows, datasets.Features({**RANKED, "ranks": kind}))


def sha(content: bytes) -> str:
    """The SHA-256 of an encoded picture."""
    return hashlib.sha256(content).hexdigest()
