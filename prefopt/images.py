"""Encoded pictures to upright RGB: nothing that a picture holds is lost, or shown, in silence."""

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from prefopt.errors import InputError

SMALLEST = 16  # pixels of the shorter side under which an image is taken to be broken


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


class Prepared(NamedTuple):
    """An image ready for the VAE."""

    pixels: Tensor  # (3, resolution, resolution), in [-1, 1]
    sizes: Tensor  # (6,) height and width: original, of the crop's top left, and target: SDXL's conditioning


def prepare_image(content: bytes, where: str, resolution: int) -> Prepared:
    """Decode, resize the shorter side to `resolution` and crop the centre.

    SDXL's size conditioning (arXiv 2307.01952, section 2.2) is this image's own. An image that cannot be
    decoded, or whose shorter side is under 16 pixels, is an InputError that says `where`.
    """
    image = open_image(content, where)
    width, height = image.size
    if min(width, height) < SMALLEST:
        raise InputError(f"{where}: an image of {width} x {height} pixels; the shorter side needs {SMALLEST}")
    scale = resolution / min(width, height)
    resized = image.resize(
        (max(resolution, round(width * scale)), max(resolution, round(height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (resized.width - resolution) // 2, (resized.height - resolution) // 2
    cropped = np.asarray(resized.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    pixels = torch.from_numpy(cropped).permute(2, 0, 1) / 127.5 - 1
    return Prepared(
        pixels, torch.tensor([height, width, top, left, resolution, resolution], dtype=torch.float32)
    )
