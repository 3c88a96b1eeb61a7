"""Pictures from encoded files, and back: nothing that one holds is lost, or shown, in silence."""

import io
from base64 import b64encode
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from prefopt.errors import InputError
from prefopt.files import replacing, reporting_write_errors


def save_image(image: Image.Image, path: Path) -> None:
    """Write lossless WebP whole or not at all; method 0 is several times faster than PNG."""
    with reporting_write_errors(path), replacing(path) as partial:
        image.save(partial, format="WEBP", lossless=True, method=0)


def read_saved(path: Path) -> Image.Image:
    """A picture that `save_image` wrote, in RGB; one that is damaged since is an InputError."""
    try:
        return open_image(path.read_bytes(), str(path))
    except (OSError, InputError) as error:
        raise InputError(f"{error}. Delete this file, and run the same command again") from error


def png_base64(image: Image.Image) -> str:
    """A picture as a PNG in base64: nothing is lost, so a server sees what a model at home would see."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=1)
    return b64encode(file.getvalue()).decode("ascii")


def open_image(content: bytes, where: str) -> Image.Image:
    """The picture of an encoded file, turned upright, in RGB.

    Transparent parts become white, 16-bit grey is scaled to 8 bits. A file that cannot be decoded, and pixels
    of unknown range (floating-point numbers, 32-bit integers), are an InputError that says `where`.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            kind, image = opened.format, ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = "cannot be decoded" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{where}: {len(content)} bytes that are no readable image: {why}") from error
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
