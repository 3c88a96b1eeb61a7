"""The places of the pocket world, painted on a canvas of 256 x 256 pixels, and the arithmetic of colours."""

from collections.abc import Callable

import numpy as np
from PIL import ImageDraw

CANVAS = 256
RGB = tuple[int, int, int]

INK: RGB = (28, 22, 30)
IVORY: RGB = (250, 246, 232)


def mix(a: RGB, b: RGB, weight: float) -> RGB:
    """The colour `weight` of the way from `a` to `b`."""
    red, green, blue = (round(x + (y - x) * weight) for x, y in zip(a, b, strict=True))
    return red, green, blue


def shift(colour: RGB, rng: np.random.Generator, amount: int) -> RGB:
    """`colour` a little lighter or darker, and each channel off by up to a third of that."""
    offsets = rng.integers(-amount, amount + 1) + rng.integers(-amount // 3, amount // 3 + 1, size=3)
    red, green, blue = (int(min(255, max(0, c + o))) for c, o in zip(colour, offsets, strict=True))
    return red, green, blue


def _sky(draw: ImageDraw.ImageDraw, top: RGB, bottom: RGB, horizon: int) -> None:
    bands = 12
    for i in range(bands):
        y = horizon * i // bands
        draw.rectangle((0, y, CANVAS, horizon * (i + 1) // bands), fill=mix(top, bottom, i / (bands - 1)))


def _cloud(draw: ImageDraw.ImageDraw, rng: np.random.Generator, colour: RGB) -> None:
    x, y, w = rng.uniform(20, 236), rng.uniform(16, 60), rng.uniform(14, 24)
    for dx, r in ((-1.0, 0.6), (0.0, 0.85), (1.0, 0.6)):
        draw.ellipse((x + dx * w - r * w, y - r * w * 0.7, x + dx * w + r * w, y + r * w * 0.7), fill=colour)


def _disc(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, radius: float, colour: RGB
) -> tuple[float, float]:
    x, y = rng.uniform(30, 226), rng.uniform(26, 48)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return x, y


def _hills(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int, height: int, colour: RGB
) -> None:
    for _ in range(3):
        x, w, h = rng.uniform(0, 256), rng.uniform(50, 100), rng.uniform(0.5, 1) * height
        draw.ellipse((x - w, horizon - h, x + w, horizon + h), fill=colour)


def _tufts(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int, colour: RGB) -> None:
    for x, y in rng.uniform((0, horizon + 14), (256, 252), size=(6, 2)):
        draw.line((x - 5, y - 8, x, y, x + 1, y - 11, x + 1, y, x + 6, y - 7), fill=colour, width=3)


def _savanna(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int) -> RGB:
    ground = shift((214, 176, 84), rng, 9)
    _sky(draw, (126, 190, 232), (252, 236, 190), horizon)
    _disc(draw, rng, 17, (255, 226, 96))
    _hills(draw, rng, horizon, 22, (176, 158, 96))
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=ground)
    x = rng.uniform(20, 236)
    draw.line((x, horizon + 6, x + 3, horizon - 36), fill=(96, 66, 40), width=7)
    draw.ellipse((x - 38, horizon - 58, x + 42, horizon - 32), fill=(92, 124, 52))
    _tufts(draw, rng, horizon, (160, 128, 50))
    return ground


def _desert(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int) -> RGB:
    ground = shift((232, 152, 88), rng, 9)
    _sky(draw, (250, 206, 150), (255, 240, 210), horizon)
    _disc(draw, rng, 22, (255, 252, 232))
    _hills(draw, rng, horizon, 44, (216, 128, 70))
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=ground)
    for y in rng.uniform(horizon + 20, 250, size=3):
        draw.arc(
            (rng.uniform(-80, 60), y, rng.uniform(180, 320), y + 40), 200, 340, fill=(206, 122, 66), width=4
        )
    x, green = rng.uniform(16, 240), (70, 120, 80)
    draw.line((x, horizon + 8, x, horizon - 42), fill=green, width=11)
    draw.line(
        (x - 17, horizon - 32, x - 17, horizon - 16, x, horizon - 14), fill=green, width=8, joint="curve"
    )
    draw.line(
        (x + 16, horizon - 40, x + 16, horizon - 22, x, horizon - 20), fill=green, width=8, joint="curve"
    )
    return ground


def _snow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int) -> RGB:
    ground = shift((236, 242, 250), rng, 6)
    _sky(draw, (150, 168, 190), (208, 218, 230), horizon)
    _hills(draw, rng, horizon, 34, (222, 230, 240))
    for x in rng.uniform(8, 248, size=3):
        h = rng.uniform(34, 56)
        for i in range(3):
            y, w = horizon + 4 - h * i / 3, 19 - 5 * i
            draw.polygon((x - w, y, x + w, y, x, y - h * 0.5), fill=(44, 92, 84))
    draw.rectangle((0, horizon + 4, CANVAS, CANVAS), fill=ground)
    for x, y in rng.uniform((0, 0), (256, 256), size=(14, 2)):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(255, 255, 255))
    return ground


def _lake(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int) -> RGB:
    ground = shift((158, 198, 104), rng, 9)
    _sky(draw, (120, 196, 240), (214, 238, 246), horizon)
    _cloud(draw, rng, (255, 255, 255))
    _cloud(draw, rng, (255, 255, 255))
    for x in rng.uniform(0, 256, size=3):
        h, w = rng.uniform(34, 60), rng.uniform(36, 60)
        draw.polygon((x - w, horizon, x + w, horizon, x, horizon - h), fill=(128, 140, 168))
        draw.polygon(
            (x - w * 0.26, horizon - h * 0.74, x + w * 0.26, horizon - h * 0.74, x, horizon - h), fill=IVORY
        )
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=(70, 158, 206))
    for x, y in rng.uniform((10, horizon + 6), (220, horizon + 24), size=(5, 2)):
        draw.line((x, y, x + 26, y), fill=(176, 222, 240), width=3)
    draw.rectangle((0, horizon + 32, CANVAS, CANVAS), fill=ground)
    _tufts(draw, rng, horizon + 30, (108, 152, 66))
    return ground


def _night(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int) -> RGB:
    ground = shift((86, 98, 128), rng, 6)
    _sky(draw, (16, 18, 56), (48, 58, 118), horizon)
    for x, y in rng.uniform((0, 0), (256, horizon), size=(11, 2)):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(240, 240, 210))
    x, y = _disc(draw, rng, 19, (246, 240, 204))
    draw.ellipse((x - 8, y - 24, x + 28, y + 12), fill=(20, 23, 66))
    _hills(draw, rng, horizon, 26, (30, 38, 72))
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=ground)
    _tufts(draw, rng, horizon, (64, 76, 104))
    return ground


Painter = Callable[[ImageDraw.ImageDraw, np.random.Generator, int], RGB]

# Each paints its place, the horizon at the given height, and returns the ground's colour.
PAINTERS: dict[str, Painter] = {
    "savanna": _savanna,
    "desert": _desert,
    "snow": _snow,
    "lake": _lake,
    "night": _night,
}
PLACES = tuple(PAINTERS)
