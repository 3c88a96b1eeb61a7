"""How the pocket world looks: the animals and where they stand, drawn by PIL in front of their scenery.

Everything is drawn on a canvas of 256 x 256 pixels, four times the final size; `world.render` shrinks it. An
animal is a list of parts in its own units: x to the right (it faces right), y up from the ground, the height
of an elephant is 1. `Pen` turns these into pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from prefopt.pocket.scenery import CANVAS, INK, IVORY, PAINTERS, RGB, mix, shift

COLOURS: dict[str, RGB] = {
    "red": (214, 38, 40),
    "yellow": (250, 212, 30),
    "green": (38, 150, 62),
    "blue": (36, 92, 216),
    "purple": (124, 52, 178),
    "pink": (248, 140, 190),
}


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
    dark = mix(coat, INK, 0.28)
    pen.leg(-0.22, 0.5, 0.17, dark)
    pen.leg(0.14, 0.5, 0.17, dark)
    pen.line([(-0.56, 0.68), (-0.68, 0.5), (-0.68, 0.36)], 0.05, dark)
    pen.ellipse(-0.08, 0.62, 0.52, 0.36, coat)
    pen.leg(-0.44, 0.6, 0.19, coat)
    pen.leg(0.3, 0.5, 0.19, coat)
    pen.line([(0.62, 0.72), (0.77, 0.5), (0.78, 0.26), (0.9, 0.16)], 0.14, coat)
    pen.ellipse(0.5, 0.76, 0.25, 0.25, coat)
    pen.polygon([(0.6, 0.58), (0.68, 0.56), (0.86, 0.46), (0.66, 0.48)], IVORY)
    pen.ellipse(0.32, 0.74, 0.17, 0.26, dark)
    pen.ellipse(0.58, 0.82, 0.035, 0.035, INK)


def _giraffe(pen: Pen, coat: RGB) -> None:
    dark = mix(coat, INK, 0.28)
    spot = mix(coat, (88, 40, 10), 0.62)
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
    pen.ellipse(0.5, 1.59, 0.035, 0.035, INK)


def _zebra(pen: Pen, coat: RGB) -> None:
    dark = mix(coat, INK, 0.28)
    pen.leg(-0.26, 0.5, 0.1, dark)
    pen.leg(0.16, 0.5, 0.1, dark)
    pen.line([(-0.48, 0.72), (-0.62, 0.55), (-0.62, 0.36)], 0.07, INK)
    pen.ellipse(-0.06, 0.62, 0.46, 0.24, coat)
    pen.leg(-0.4, 0.6, 0.12, coat)
    pen.leg(0.28, 0.6, 0.12, coat)
    pen.line([(0.22, 0.82), (0.36, 1.06), (0.46, 1.16)], 0.16, INK)
    pen.polygon([(0.1, 0.74), (0.38, 0.56), (0.6, 0.94), (0.44, 1.1)], coat)
    pen.polygon([(0.4, 1.02), (0.5, 1.16), (0.62, 1.08), (0.86, 0.84), (0.8, 0.74), (0.7, 0.76)], coat)
    pen.polygon([(0.44, 1.1), (0.47, 1.26), (0.55, 1.12)], coat)
    for x, half in ((-0.38, 0.15), (-0.22, 0.2), (-0.05, 0.22), (0.12, 0.2)):
        pen.line([(x - 0.03, 0.62 + half), (x + 0.02, 0.62 - half)], 0.065, IVORY)
    pen.line([(0.22, 0.82), (0.42, 0.68)], 0.06, IVORY)
    pen.line([(0.34, 0.96), (0.52, 0.84)], 0.06, IVORY)
    pen.ellipse(0.58, 1.0, 0.035, 0.035, INK)


def _lion(pen: Pen, coat: RGB) -> None:
    dark = mix(coat, INK, 0.28)
    mane = mix(coat, (96, 44, 8), 0.66)
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
    pen.ellipse(0.36, 0.55, 0.12, 0.09, IVORY)
    pen.ellipse(0.36, 0.6, 0.05, 0.035, INK)
    pen.ellipse(0.26, 0.72, 0.035, 0.035, INK)
    pen.ellipse(0.45, 0.72, 0.035, 0.035, INK)


_ANIMALS = {"elephant": _elephant, "giraffe": _giraffe, "zebra": _zebra, "lion": _lion}
ANIMALS = tuple(_ANIMALS)

OUTLINE = 3.0  # canvas pixels
# A giraffe is 1.8 units tall and a lion 1.1, so their units differ for the animals to fill the picture alike.
_STATURE = {"elephant": 1.0, "giraffe": 0.84, "zebra": 0.98, "lion": 1.06}


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


class Figure(NamedTuple):
    """Where one animal stands, in canvas pixels, and which way it faces (1: right, -1: left)."""

    x: float
    ground: float
    unit: float
    facing: int


class Stage(NamedTuple):
    """A place painted for its animals: the ground's colour, their coat, and where each will stand."""

    picture: Image.Image
    ground: RGB
    coat: RGB
    figures: list[Figure]


def set_stage(colour: str, count: int, place: str, rng: np.random.Generator) -> Stage:
    """The scenery of 256 x 256 RGB, and all draws that its animals need, farthest animal first."""
    picture = Image.new("RGB", (CANVAS, CANVAS))
    ground = PAINTERS[place](ImageDraw.Draw(picture), rng, int(rng.integers(100, 122)))
    coat = shift(COLOURS[colour], rng, 12)
    spots = _standing(count, rng)
    return Stage(picture, ground, coat, [Figure(*spot, 1 if rng.random() < 0.5 else -1) for spot in spots])


def draw_animal(
    draw: ImageDraw.ImageDraw, animal: str, figure: Figure, stage: Stage, pen: Callable[..., Pen] = Pen
) -> None:
    """One animal with its shadow and outline; `pen` makes what draws its parts."""
    x, y, unit, facing = figure
    unit *= _STATURE[animal]
    draw.ellipse((x - unit * 0.66, y - 7, x + unit * 0.66, y + 7), fill=mix(stage.ground, INK, 0.3))
    for swell, ink in ((OUTLINE, INK), (0.0, None)):
        _ANIMALS[animal](pen(draw, x, y, unit, facing, swell, ink), stage.coat)


def draw_scene(
    animal: str, colour: str, count: int, place: str, rng: np.random.Generator, *, silhouette: bool = False
) -> Image.Image:
    """One picture of 256 x 256 RGB; everything that the words leave open is drawn from `rng`.

    With `silhouette`, an L picture instead: 255 where the same draws put the animals, else 0.
    """
    stage = set_stage(colour, count, place, rng)
    if not silhouette:
        draw = ImageDraw.Draw(stage.picture)
        for figure in stage.figures:
            draw_animal(draw, animal, figure, stage)
        return stage.picture
    mask = Image.new("L", (CANVAS, CANVAS))
    for x, y, unit, facing in stage.figures:
        pen = Pen(ImageDraw.Draw(mask), x, y, unit * _STATURE[animal], facing, OUTLINE, 255)
        _ANIMALS[animal](pen, stage.coat)
    return mask
