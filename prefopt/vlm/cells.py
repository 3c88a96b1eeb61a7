"""Cells that hold images: encoded bytes, paths, or lists of them."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
from PIL import Image

from prefopt.errors import InputError
from prefopt.images import SIGNATURE, open_image
from prefopt.records import image_bytes


def image_column(rows: datasets.Dataset, source: str) -> str:
    """The column that holds the images, `images` or `image`.

    Images in another column, which nothing would show, and a column that holds none are an InputError.
    """
    names = rows.column_names
    column = "images" if "images" in names else "image"
    others = [name for name in names if name != column and _holds_images(rows.features[name])]
    if column == "images" and "image" in names and "image" not in others:
        others.append("image")
    if others:
        raise InputError(
            f"{source}: nothing would show the images of {' and '.join(map(repr, others))}; put all images "
            f"of a row into {column!r}, or drop the column"
        )
    kind: Any = rows.features.arrow_schema.field(column).type
    listed = isinstance(kind, pyarrow.ListType | pyarrow.LargeListType)
    if column == "images" and not listed:
        raise InputError(
            f"{source}: the column 'images' holds no lists; name a column of single images 'image'"
        )
    kind = kind.value_type if listed else kind
    if not any(test(kind) for test in (_is_image, _is_path, _is_bytes, pyarrow.types.is_null)):
        raise InputError(f"{source}: the column {column!r} holds no images but {kind}")
    return column


def image_places(cells: pyarrow.ChunkedArray) -> list[list[str | bytes]]:
    """Of each row, where its images are: a path, or the beginning of the stored bytes; empty for nothing.

    No more of the bytes is read.
    """
    call = pyarrow.compute.call_function
    found: Any = cells
    if isinstance(cells.type, pyarrow.ListType | pyarrow.LargeListType):
        lengths = call("list_value_length", [found]).to_pylist()
        found = call("list_flatten", [found])
    else:
        lengths = found.is_valid().to_pylist()
        found = found.drop_null()
    if _is_image(found.type):
        content, path = (
            call("struct_field", [found], pyarrow.compute.StructFieldOptions([name]))
            for name in ("bytes", "path")
        )
        both = zip(_beginnings(content), path.to_pylist(), strict=True)
        places = iter([(path or b"") if stored is None else stored for stored, path in both])
    elif _is_path(found.type):
        places = iter([path or "" for path in found.to_pylist()])
    else:
        places = iter([stored or b"" for stored in _beginnings(found)])
    return [[next(places) for _ in range(length or 0)] for length in lengths]


def _beginnings(content: Any) -> list[bytes | None]:
    if pyarrow.types.is_null(content.type):
        return content.to_pylist()
    options = pyarrow.compute.SliceOptions(0, SIGNATURE)
    return pyarrow.compute.call_function("binary_slice", [content], options).to_pylist()


def encoded_images(cell: Any, where: str, folder: Path | None) -> list[bytes]:
    """The encoded images of a cell; `folder` is what no path may leave, see `image_bytes`."""
    cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
    folders = [folder] if folder else []
    return [image_bytes(_as_struct(one), where, *folders) for one in cells]


def open_picture(content: bytes, where: str) -> Image.Image:
    """An encoded image, upright and in RGB; one that cannot be read, or of 1 x 1, is an InputError."""
    picture = open_image(content, where)
    if min(picture.size) < 2:
        raise InputError(f"{where} has an image of {picture.width} x {picture.height} pixels; drop the row")
    return picture


def _as_struct(cell: Any) -> dict | None:
    if isinstance(cell, str):
        return {"bytes": None, "path": cell}
    return {"bytes": cell, "path": None} if isinstance(cell, bytes) else cell


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _holds_images(feature.feature)
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image)


def _is_image(kind: Any) -> bool:
    fields = {field.name: field.type for field in kind} if isinstance(kind, pyarrow.StructType) else {}
    none = pyarrow.types.is_null
    return fields.keys() == {"bytes", "path"} and (
        (_is_bytes(fields["bytes"]) or none(fields["bytes"]))
        and (_is_path(fields["path"]) or none(fields["path"]))
    )


def _is_path(kind: Any) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _is_bytes(kind: Any) -> bool:
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
