"""Pictures of every kind become RGB as a person sees them, or an error."""

import io

import numpy as np
import pytest
from pictures import encoded
from PIL import Image

from prefopt.errors import InputError
from prefopt.images import open_image


def grey(image: Image.Image) -> list[int]:
    assert image.mode == "RGB"
    return [image.getpixel((x, 0))[0] for x in range(image.width)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(kind):
    """Guards: PIL's own conversion, which makes everything above 255 white."""
    deep = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    assert grey(open_image(encoded(deep, kind), "row 1")) == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.array([[np.nan, 0.5]], dtype=np.float32), "floating-point numbers"),
        (np.array([[70000, 1]], dtype=np.int32), "32-bit integers"),
    ],
)
def test_numbers_of_unknown_range_are_refused(values, what):
    """Guards: a float TIFF that becomes black."""
    with pytest.raises(InputError, match=f"row 1: an image of {what}.*8 or 16 bits"):
        open_image(encoded(Image.fromarray(values), "TIFF"), "row 1")


def test_transparent_parts_are_white():
    """Guards: alpha that is dropped, so that the colours under it appear."""
    pixels = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [255, 0, 0, 128]]], dtype=np.uint8)
    image = open_image(encoded(Image.fromarray(pixels), "PNG"), "row 1")
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (255, 0, 0)]
    assert image.getpixel((2, 0))[1] == pytest.approx(127, abs=1)
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    image = open_image(encoded(palette, "PNG", transparency=0), "row 1")
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (40, 50, 60)]


def test_a_turned_photo_stands_upright():
    image, exif = Image.new("RGB", (4, 2)), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert open_image(buffer.getvalue(), "row 1").size == (2, 4)


def one_colour(width: int, height: int) -> bytes:
    return encoded(Image.new("1", (width, height)), "PNG")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((13_000, 13_000), "in .* bytes, as no photo has"),
        ((20, 2_100), "its longer side more than 100 times"),
    ],
)
def test_sizes_that_no_photo_has_are_refused_by_the_header(size, said, monkeypatch):
    """Guards: 169 megapixels in 20 kB, and a thread that becomes an image of gigabytes when it is resized."""
    content = one_colour(*size)
    assert len(content) < 30_000
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(
        InputError, match=f"row 1: an image of {size[0]} x {size[1]} pixels.*{said}.*drop the row"
    ):
        open_image(content, "row 1")


def test_a_large_picture_is_read():
    assert open_image(one_colour(6_000, 4_000), "row 1").size == (6_000, 4_000)


def test_kinds_that_start_programs_are_not_opened(tmp_path, monkeypatch):
    """Guards: PostScript, for which PIL calls Ghostscript."""
    monkeypatch.chdir(tmp_path)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(ran) (w) file closefile\n"
    with pytest.raises(InputError, match=r"row 1: .* cannot be decoded"):
        open_image(page, "row 1")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "1", "L", "LA", "P", "YCbCr", "RGBX"])
def test_every_mode_becomes_rgb(mode):
    kind = "PNG" if mode in ("1", "L", "LA", "P") else "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF"
    assert open_image(encoded(Image.new(mode, (16, 16)), kind), "row 1").mode == "RGB"


def test_what_is_no_picture_is_named():
    with pytest.raises(
        InputError, match=r"row 1: 8 bytes that are no readable image of PNG, JPEG, .*: cannot be decoded"
    ):
        open_image(b"no image", "row 1")
