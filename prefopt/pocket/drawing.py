"""How the pocket world looks: animals, places and where the animals stand, drawn by PIL.

Everything is drawn on a canvas of 256 x 256 pixels, four times the final size; `world.render` shrinks it. An
animal is a list of parts in its own units: x to the right (it faces right), y up from the ground, the height
of an elephant is 1. `Pen` turns these into pixels.
"""

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 256
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 38, 40),
    "yellow": (250, 212, 30),
    "green": (38, 150, 62),
    "blue": (36, 92, 216),
    "purple": (124, 52, 178),
    "pink": (248, 140, 190),
}

_INK: RGB = (28, 22, 30)
_IVORY: RGB = (250, 246, 232)


def _mix(a: RGB, b: RGB, weight: float) -> RGB:
    """The colour `weight` of the way from `a` to `b`."""
    return tuple(round(x + (y - x) * weight) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def _shift(colour: RGB, rng: np.random.Generator, amount: int) -> RGB:
    """`colour` a little lighter or darker, and each channel off by up to a third of that."""
    offsets = rng.integers(-amount, amount + 1) + rng.integers(-amount // 3, amount // 3 + 1, size=3)
    return tuple(int(min(255, max(0, c + o))) for c, o in zip(colour, offsets, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Pen:
    """Draws parts given in an animal's units; an outline is the parts in `ink`, fatter by `swell` pixels."""

    draw: ImageDraw.ImageDraw
    x: float
    ground: float
    unit: float
    facing: int
    swell: float = 0.0
    ink: RGB | int | None = None

    def _point(self, x: float, y: float) -> tuple[float, float]:
        return self.x + self.facing * x * self.unit, self.ground - y * self.unit

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        px, py = self._point(x, y)
        a, b = rx * self.unit + self.swell, ry * self.unit + self.swell
        self.draw.ellipse((px - a, py - b, px + a, py + b), fill=self.ink or colour)

    def polygon(self, points: list[tuple[float, float]], colour: RGB) -> None:
        corners = [self._point(*p) for p in points]
        self.draw.polygon(corners, fill=self.ink or colour)
        if self.swell:
            self.draw.line(
                [*corners, corners[0]], fill=self.ink or colour, width=round(2 * self.swell), joint="curve"
            )

    def line(self, points: list[tuple[float, float]], width: float, colour: RGB) -> None:
        pixels = max(1, round(width * self.unit + 2 * self.swell))
        self.draw.line(
            [self._point(*p) for p in points], fill=self.ink or colour, width=pixels, joint="curve"
        )

    def leg(self, x: float, top: float, width: float, colour: RGB) -> None:
        self.polygon(
            [(x - width / 2, 0), (x + width / 2, 0), (x + width / 2, top), (x - width / 2, top)], colour
        )


def _elephant(pen: Pen, coat: RGB) -> None:
    dark = _mix(coat, _INK, 0.28)
    pen.leg(-0.22, 0.5, 0.17, dark)
    pen.leg(0.14, 0.5, 0.17, dark)
    pen.line([(-0.56, 0.68), (-0.68, 0.5), (-0.68, 0.36)], 0.05, dark)
    pen.ellipse(-0.08, 0.62, 0.52, 0.36, coat)
    pen.leg(-0.44, 0.6, 0.19, coat)
    pen.leg(0.3, 0.5, 0.19, coat)
    pen.line([(0.62, 0.72), (0.77, 0.5), (0.78, 0.26), (0.9, 0.16)], 0.14, coat)
    pen.ellipse(0.5, 0.76, 0.25, 0.25, coat)
    pen.polygon([(0.6, 0.58), (0.68, 0.56), (0.86, 0.46), (0.66, 0.48)], _IVORY)
    pen.ellipse(0.32, 0.74, 0.17, 0.26, dark)
    pen.ellipse(0.58, 0.82, 0.035, 0.035, _INK)


def _giraffe(pen: Pen, coat: RGB) -> None:
    dark = _mix(coat, _INK, 0.28)
    spot = _mix(coat, (88, 40, 10), 0.62)
    pen.leg(-0.3, 0.75, 0.09, dark)
    pen.leg(0.1, 0.75, 0.09, dark)
    pen.line([(-0.4, 0.85), (-0.5, 0.55)], 0.05, dark)
    pen.ellipse(-0.09, 0.83, 0.37, 0.2, coat)
    pen.leg(-0.38, 0.85, 0.1, coat)
    pen.leg(0.2, 0.8, 0.1, coat)
    pen.polygon([(-0.02, 0.9), (0.27, 0.76), (0.5, 1.56), (0.33, 1.58)], coat)
    pen.line([(0.4, 1.6), (0.37, 1.78)], 0.05, spot)
    pen.line([(0.47, 1.6), (0.47, 1.78)], 0.05, spot)
    pen.polygon([(0.33, 1.5), (0.36, 1.66), (0.5, 1.68), (0.74, 1.54), (0.7, 1.44)], coat)
    for x, y, r in (
        (-0.3, 0.86, 0.07),
        (-0.12, 0.93, 0.06),
        (-0.1, 0.76, 0.08),
        (0.08, 0.86, 0.07),
        (0.18, 1.04, 0.055),
        (0.28, 1.2, 0.05),
        (0.34, 1.38, 0.045),
    ):
        pen.ellipse(x, y, r, r, spot)
    pen.ellipse(0.5, 1.59, 0.035, 0.035, _INK)


def _zebra(pen: Pen, coat: RGB) -> None:
    dark = _mix(coat, _INK, 0.28)
    pen.leg(-0.26, 0.5, 0.1, dark)
    pen.leg(0.16, 0.5, 0.1, dark)
    pen.line([(-0.48, 0.72), (-0.62, 0.55), (-0.62, 0.36)], 0.07, _INK)
    pen.ellipse(-0.06, 0.62, 0.46, 0.24, coat)
    pen.leg(-0.4, 0.6, 0.12, coat)
    pen.leg(0.28, 0.6, 0.12, coat)
    pen.line([(0.22, 0.82), (0.36, 1.06), (0.46, 1.16)], 0.16, _INK)
    pen.polygon([(0.1, 0.74), (0.38, 0.56), (0.6, 0.94), (0.44, 1.1)], coat)
    pen.polygon([(0.4, 1.02), (0.5, 1.16), (0.62, 1.08), (0.86, 0.84), (0.8, 0.74), (0.7, 0.76)], coat)
    pen.polygon([(0.44, 1.1), (0.47, 1.26), (0.55, 1.12)], coat)
    for x, half in ((-0.38, 0.15), (-0.22, 0.2), (-0.05, 0.22), (0.12, 0.2)):
        pen.line([(x - 0.03, 0.62 + half), (x + 0.02, 0.62 - half)], 0.065, _IVORY)
    pen.line([(0.22, 0.82), (0.42, 0.68)], 0.06, _IVORY)
    pen.line([(0.34, 0.96), (0.52, 0.84)], 0.06, _IVORY)
    pen.ellipse(0.58, 1.0, 0.035, 0.035, _INK)


def _lion(pen: Pen, coat: RGB) -> None:
    dark = _mix(coat, _INK, 0.28)
    mane = _mix(coat, (96, 44, 8), 0.66)
    pen.leg(-0.3, 0.4, 0.13, dark)
    pen.leg(0.08, 0.4, 0.13, dark)
    pen.line([(-0.52, 0.52), (-0.76, 0.6), (-0.8, 0.82)], 0.07, coat)
    pen.ellipse(-0.8, 0.9, 0.1, 0.12, mane)
    pen.ellipse(-0.14, 0.46, 0.44, 0.22, coat)
    pen.leg(-0.44, 0.45, 0.15, coat)
    pen.leg(0.22, 0.45, 0.15, coat)
    petals = [
        (0.34 + r * cos(i * pi / 10), 0.66 + r * sin(i * pi / 10))
        for i in range(20)
        for r in (0.4 - 0.06 * (i % 2),)
    ]
    pen.polygon(petals, mane)
    pen.ellipse(0.22, 0.88, 0.08, 0.08, coat)
    pen.ellipse(0.48, 0.88, 0.08, 0.08, coat)
    pen.ellipse(0.35, 0.66, 0.235, 0.235, coat)
    pen.ellipse(0.36, 0.55, 0.12, 0.09, _IVORY)
    pen.ellipse(0.36, 0.6, 0.05, 0.035, _INK)
    pen.ellipse(0.26, 0.72, 0.035, 0.035, _INK)
    pen.ellipse(0.45, 0.72, 0.035, 0.035, _INK)


_ANIMALS = {"elephant": _elephant, "giraffe": _giraffe, "zebra": _zebra, "lion": _lion}
ANIMALS = tuple(_ANIMALS)

# A giraffe is 1.8 units tall and a lion 1.1, so their units differ for the animals to fill the picture alike.
_STATURE = {"elephant": 1.0, "giraffe": 0.84, "zebra": 0.98, "lion": 1.06}


def _sky(draw: ImageDraw.ImageDraw, top: RGB, bottom: RGB, horizon: int) -> None:
    bands = 12
    for i in range(bands):
        y = horizon * i // bands
        draw.rectangle((0, y, CANVAS, horizon * (i + 1) // bands), fill=_mix(top, bottom, i / (bands - 1)))


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
    ground = _shift((214, 176, 84), rng, 9)
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
    ground = _shift((232, 152, 88), rng, 9)
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
    ground = _shift((236, 242, 250), rng, 6)
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
    ground = _shift((158, 198, 104), rng, 9)
    _sky(draw, (120, 196, 240), (214, 238, 246), horizon)
    _cloud(draw, rng, (255, 255, 255))
    _cloud(draw, rng, (255, 255, 255))
    for x in rng.uniform(0, 256, size=3):
        h, w = rng.uniform(34, 60), rng.uniform(36, 60)
        draw.polygon((x - w, horizon, x + w, horizon, x, horizon - h), fill=(128, 140, 168))
        draw.polygon(
            (x - w * 0.26, horizon - h * 0.74, x + w * 0.26, horizon - h * 0.74, x, horizon - h), fill=_IVORY
        )
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=(70, 158, 206))
    for x, y in rng.uniform((10, horizon + 6), (220, horizon + 24), size=(5, 2)):
        draw.line((x, y, x + 26, y), fill=(176, 222, 240), width=3)
    draw.rectangle((0, horizon + 32, CANVAS, CANVAS), fill=ground)
    _tufts(draw, rng, horizon + 30, (108, 152, 66))
    return ground


def _night(draw: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int) -> RGB:
    ground = _shift((86, 98, 128), rng, 6)
    _sky(draw, (16, 18, 56), (48, 58, 118), horizon)
    for x, y in rng.uniform((0, 0), (256, horizon), size=(11, 2)):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(240, 240, 210))
    x, y = _disc(draw, rng, 19, (246, 240, 204))
    draw.ellipse((x - 8, y - 24, x + 28, y + 12), fill=(20, 23, 66))
    _hills(draw, rng, horizon, 26, (30, 38, 72))
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=ground)
    _tufts(draw, rng, horizon, (64, 76, 104))
    return ground


_PLACES = {"savanna": _savanna, "desert": _desert, "snow": _snow, "lake": _lake, "night": _night}
PLACES = tuple(_PLACES)


def _standing(count: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Where `count` animals stand, farthest first: (x, ground, unit) in canvas pixels."""
    if count == 1:
        return [(rng.uniform(100, 156), rng.uniform(212, 240), rng.uniform(84, 118))]
    if count == 2:
        unit = rng.uniform(66, 84)
        near, far = (66, 190) if rng.random() < 0.5 else (190, 66)
        depths = rng.uniform(168, 200), rng.uniform(212, 244)
        return [
            (x + rng.uniform(-9, 9), y, unit * rng.uniform(0.93, 1.0))
            for x, y in zip((far, near), depths, strict=True)
        ]
    unit = rng.uniform(57, 68)
    spots = [(58, 160), (198, 164), (128, 238)]
    if rng.random() < 0.5:
        spots = [(128, 154), (56, 222), (200, 232)]
    return [(x + rng.uniform(-9, 9), y + rng.uniform(-6, 6), unit * rng.uniform(0.93, 1.0)) for x, y in spots]


def draw_scene(
    animal: str, colour: str, count: int, place: str, rng: np.random.Generator, *, silhouette: bool = False
) -> Image.Image:
    """One picture of 256 x 256 RGB; everything that the words leave open is drawn from `rng`.

    With `silhouette`, an L picture instead: 255 where the same draws put the animals, else 0.
    """
    picture = Image.new("RGB", (CANVAS, CANVAS))
    ground = _PLACES[place](ImageDraw.Draw(picture), rng, int(rng.integers(100, 122)))
    coat = _shift(COLOURS[colour], rng, 12)
    layers: tuple[tuple[float, RGB | int | None], ...] = ((3.0, _INK), (0.0, None))
    if silhouette:
        picture, layers = Image.new("L", (CANVAS, CANVAS)), ((3.0, 255),)
    draw = ImageDraw.Draw(picture)
    for x, y, unit in _standing(count, rng):
        unit *= _STATURE[animal]
        facing = 1 if rng.random() < 0.5 else -1
        if not silhouette:
            draw.ellipse((x - unit * 0.66, y - 7, x + unit * 0.66, y + 7), fill=_mix(ground, _INK, 0.3))
        for swell, ink in layers:
            _ANIMALS[animal](Pen(draw, x, y, unit, facing, swell, ink), coat)
    return picture
