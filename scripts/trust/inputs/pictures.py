"""Pictures that are damaged, huge, of other kinds or none: one in a table of pairs, one of answers."""

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pictures import cell, png, write_table
from pictures import encoded as _encoded
from pictures import picture as _picture
from PIL import Image
from rows import or_refused
from trial import Trial
from world import World

from prefopt.diffusion.latents import prepare_image
from prefopt.diffusion.tables import read_preferences
from prefopt.vlm.examples import read_vision_examples

PAIRS = datasets.Features(prompt=datasets.Value("string"), chosen=datasets.Image(), rejected=datasets.Image())
ANSWERS = datasets.Features(
    images=datasets.List(datasets.Image()),
    prompt=datasets.Value("string"),
    completion=datasets.Value("string"),
)


def in_a_pair(content: bytes) -> Callable[[Path], Any]:
    """Read a table of pairs of which the second row's rejected picture has this content, and prepare that."""

    def act(folder: Path) -> Any:
        columns = {
            "prompt": ["a", "b"],
            "chosen": [cell(png(0)), cell(png(1))],
            "rejected": [cell(png(2)), cell(content)],
        }
        table = read_preferences(write_table(folder / "data", columns, PAIRS))
        return prepare_image(*table.image(1, 1), 16)

    return act


def in_an_answer(content: bytes) -> Callable[[Path], Any]:
    """Read a table of answers of which the second row's picture has this content, and look at that row."""

    def act(folder: Path) -> Any:
        columns = {
            "images": [[cell(png(0))], [cell(content)]],
            "prompt": ["What?"] * 2,
            "completion": ["A cat."] * 2,
        }
        return read_vision_examples(write_table(folder / "data", columns, ANSWERS), "sft")[1, 0]

    return act


def big_png(width: int, height: int) -> bytes:
    """A PNG of one colour whose file is as small as its kind allows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    packed = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _claiming(width: int, height: int) -> bytes:
    """A good PNG whose header says another size."""
    content = bytearray(png(3))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def _text_bomb() -> bytes:
    """A PNG with a text of 200 MB, packed."""
    name, packed = b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000))
    chunk = struct.pack(">I", len(packed)) + name + packed + struct.pack(">I", zlib.crc32(name + packed))
    content = png(3)
    return content[:33] + chunk + content[33:]


GOOD = _picture(3, 24, 16)
FLOAT = Image.fromarray(np.full((16, 16), 0.5, np.float32))
DEEP = Image.fromarray(np.full((16, 16), 32896, np.uint16))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="16" height="16"><script>alert(1)</script></svg>'
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(ran) (w) file closefile\nshowpage\n"
)
REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x89",
    "text": b"no picture",
    "HTML": b"<!DOCTYPE html><html></html>",
    "a pickle": b"cos\nsystem\n(S'touch ran'\ntR.",
    "a zip": b"PK\x03\x04" + bytes(100),
    "SVG": SVG,
    "EPS": EPS,
    "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "1 x 1": _encoded(_picture(3, 1, 1)),
    "floating-point": _encoded(FLOAT, "TIFF"),
    "32-bit integers": _encoded(Image.fromarray(np.full((16, 16), 70000, np.int32)), "TIFF"),
    "13,000 x 13,000 in 21 kB": big_png(13_000, 13_000),
    "20,000 x 20,000 in 50 kB": big_png(20_000, 20_000),
    "a header of 2**31 pixels": _claiming(2**16, 2**15),
    "a header of 30,000 x 30,000": _claiming(30_000, 30_000),
    "a header of 0 x 0": _claiming(0, 0),
    "a header of 2**32 - 1": _claiming(2**32 - 1, 2**32 - 1),
    "a thread of 16 x 60,000": _encoded(_picture(3, 16, 60_000)),
    "a text of 200 MB in a PNG": _text_bomb(),
    **{
        f"half a {kind}": _encoded(_picture(3, 64, 64), kind)[:700]
        for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
    },
    **{
        f"a {kind} of zeros after its header": _encoded(_picture(3, 64, 64), kind)[:40] + bytes(2000)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF")
    },
}


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded(Image.new("RGB", (32, 16), (255, 0, 0)), "JPEG", exif=exif)


READ: dict[str, bytes] = {
    **{
        kind: _encoded(GOOD, kind)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
    },
    "CMYK": _encoded(GOOD.convert("CMYK"), "JPEG"),
    "LAB": _encoded(Image.new("LAB", (16, 16)), "TIFF"),
    "YCbCr": _encoded(GOOD.convert("YCbCr"), "JPEG"),
    "a palette": _encoded(GOOD.convert("P"), "PNG"),
    "a palette with a clear colour": _encoded(GOOD.convert("P"), "PNG", transparency=0),
    "grey": _encoded(GOOD.convert("L"), "PNG"),
    "grey with transparency": _encoded(GOOD.convert("LA"), "PNG"),
    "black and white": _encoded(GOOD.convert("1"), "PNG"),
    "16 bits": _encoded(DEEP, "PNG"),
    "an animated GIF": _encoded(GOOD, "GIF", save_all=True, append_images=[GOOD.rotate(90)]),
    "an animated WebP": _encoded(GOOD, "WEBP", save_all=True, append_images=[GOOD.rotate(90)]),
    "pages of TIFF": _encoded(GOOD, "TIFF", save_all=True, append_images=[GOOD.rotate(90)]),
    "turned by EXIF": _turned(),
    "bytes after the end": png(3) + b"PK\x03\x04" + bytes(100),
    "24 megapixels of one colour": big_png(6000, 4000),
}


def _flipped(kind: str, seed: int) -> bytes:
    chance, content = random.Random(f"{kind} {seed}"), bytearray(_encoded(GOOD, kind))
    for _ in range(4):
        content[chance.randrange(min(len(content), 200))] = chance.randrange(256)
    return bytes(content)


def _upright(folder: Path) -> None:
    (example,) = [in_an_answer(_turned())(folder / "again")]
    (image,) = example["images"]
    assert image.size == (16, 32), f"a picture of {image.size} lies on its side"


def trials(world: World) -> Iterator[Trial]:
    """What is no picture, or too big a one, is named with its row; every kind that is read is read."""
    for side, act, column in (("pair", in_a_pair, "column rejected"), ("answer", in_an_answer, "images")):
        for what, content in REFUSED.items():
            yield Trial(f"{side}: {what}", act(content), ("row 1", column))
        for what, content in READ.items():
            yield Trial(f"{side}: {what}", act(content), check=_upright if what == "turned by EXIF" else None)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"):
            for seed in range(3):
                yield Trial(f"{side}: {kind} changed {seed}", or_refused(act(_flipped(kind, seed))))
