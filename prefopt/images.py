"""Pictures from encoded files, and back: nothing that one holds is lost, or shown, in silence."""

import io
import struct
from base64 import b64encode
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from prefopt.errors import InputError
from prefopt.files import replacing, reporting_write_errors

# Of the kinds that PIL knows, those that hold photos and drawings: some others start programs.
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
PICTURES = tuple(ending for ending, kind in Image.registered_extensions().items() if kind in KINDS)
ORDINARY = 25_000_000  # pixels that any file may have; with more it needs a byte for every DENSEST of them
DENSEST = 200
SLIMMEST = 100  # the longer side by the shorter one
SIGNATURE = 16  # bytes at the beginning of a file that tell its kind
# What PIL raises where a file is damaged.
DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def save_image(image: Image.Image, path: Path) -> None:
    """Write lossless WebP whole or not at all; method 0 is several times faster than PNG."""
    with reporting_write_errors(path), replacing(path) as partial:
        image.save(partial, format="WEBP", lossless=True, method=0)


def read_saved(path: Path) -> Image.Image:
    """A picture that `save_image` wrote, in RGB; one that is damaged or gone since is an InputError."""
    if not path.exists():
        raise InputError(f"{path} was removed meanwhile: run the same command again")
    try:
        return open_image(path.read_bytes(), str(path))
    except (OSError, InputError) as error:
        raise InputError(f"{error}. Delete this file, and run the same command again") from error


def png_base64(image: Image.Image) -> str:
    """A picture as a PNG in base64: nothing is lost, so a server sees what a model at home would see."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=1)
    return b64encode(file.getvalue()).decode("ascii")


def check_kind(beginning: bytes, where: str) -> None:
    """InputError that says `where` unless a file begins, in SIGNATURE bytes, as those of KINDS do."""
    for kind in KINDS:
        accept = Image.OPEN[kind][1]
        said = accept(beginning) if accept else True
        if said and not isinstance(said, str):  # PIL says in words what it was built without
            return
    raise InputError(
        f"{where}: no image of {', '.join(KINDS)}, for it begins with {beginning!r}; mend it, or drop the row"
    )


def open_image(content: bytes, where: str) -> Image.Image:
    """The picture of an encoded file of one of KINDS, turned upright, in RGB; of an animation the first one.

    Transparent parts become white, 16-bit grey is scaled to 8 bits. A file that cannot be decoded, pixels of
    unknown range (floating-point numbers, 32-bit integers), and a size that no photo has, are an InputError
    that says `where`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=KINDS) as opened:
            _check_size(opened, len(content), where)
            kind, image = opened.format, ImageOps.exif_transpose(opened)
            return _in_rgb(image, kind, where)
    except InputError:
        raise
    except DAMAGE as error:
        why = "cannot be decoded" if isinstance(error, UnidentifiedImageError) else str(error)[:200]
        raise InputError(
            f"{where}: {len(content)} bytes that are no readable image of {', '.join(KINDS)}: {why}"
        ) from error


def _check_size(opened: Image.Image, length: int, where: str) -> None:
    """Refuse, by the header alone, what would fill the memory when it is decoded or resized."""
    width, height = opened.size
    pixels = width * height
    if pixels > ORDINARY and pixels > DENSEST * length:
        raise InputError(
            f"{where}: an image of {width} x {height} pixels in {length} bytes, as no photo has; drop the row"
        )
    if max(width, height) > SLIMMEST * min(width, height):
        raise InputError(
            f"{where}: an image of {width} x {height} pixels, its longer side more than {SLIMMEST} times the "
            "shorter one; drop the row"
        )


def _in_rgb(image: Image.Image, kind: str | None, where: str) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and kind != "PPM"):
        what = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise InputError(f"{where}: an image of {what}, whose range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # PIL's own conversion would cut grey off at 255
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
