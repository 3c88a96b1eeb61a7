"""What may be wrong with a picture of the pocket world, and what a judge should then answer.

A flawed picture is drawn as `world.render` draws a sound one, but for its one flaw, so the right answers to
the ten questions of `class_conditional.yaml` are known. They come from two tables: `FLAWS` says what a flaw
changes, and `answers` what follows from a description that asks for another scene.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from prefopt.pocket.drawing import (
    ANIMALS,
    COLOURS,
    Pen,
    Stage,
    draw_animal,
    set_stage,
)
from prefopt.pocket.scenery import CANVAS, INK, RGB
from prefopt.pocket.world import SIZE, Scene

# What a sound picture is, as far as no description is needed to say it.
SOUND = {
    "realistic": True,
    "odd_pattern": False,
    "normal_shape": True,
    "natural_behaviour": True,
    "lookalike": False,
    "anatomy": True,
    "hidden_flaw": False,
}
# The questions that count for nothing if the class is not to be seen.
NEED_THE_CLASS = ("normal_shape", "natural_behaviour", "lookalike", "anatomy")
# Where a flaw's answers differ from those of a sound picture. A hidden flaw is one that leaves the picture as
# it looks at a glance: a wrong number of legs; not a missing head, an animal on its back or a blur.
FLAWS: dict[str, dict[str, bool]] = {
    "none": {},
    "legs_missing": {"normal_shape": False, "anatomy": False, "hidden_flaw": True},
    "leg_too_many": {"normal_shape": False, "anatomy": False, "hidden_flaw": True},
    "head_missing": {"normal_shape": False, "anatomy": False, "natural_behaviour": False},
    "upside_down": {"normal_shape": False, "natural_behaviour": False},
    "odd_patch": {"odd_pattern": True},
    "noise": {"realistic": False},
    "blur": {"realistic": False},
    "darkness": {"realistic": False},
    "neighbour": {"lookalike": True},  # one animal of another species, of the same colour
    "no_animal": {},  # the class is not to be seen, whatever it is
}
# What `render_parts` tells apart.
PARTS = (
    *(f"{animal} {part}" for animal in ANIMALS for part in ("body", "head", "leg")),
    "fifth leg",
    "patch",
)
_PART = 255
_MOST_ANIMALS = {"neighbour": 2}  # three stand in a picture at most

_HEIGHT = {"elephant": 1.0, "giraffe": 1.78, "zebra": 1.26, "lion": 1.08}
_BODY = {"elephant": (-0.08, 0.62), "giraffe": (-0.09, 0.83), "zebra": (-0.06, 0.62), "lion": (-0.14, 0.46)}
# Of a fifth leg that grows from the back: its width and how high it reaches.
_FIFTH_LEG = {"elephant": (0.21, 1.42), "giraffe": (0.15, 1.5), "zebra": (0.16, 1.32), "lion": (0.18, 1.16)}
# Which parts, by their middle (x, y), are the head; legs never are.
_HEAD: dict[str, Callable[[float, float], bool]] = {
    "elephant": lambda x, _: x >= 0.3,
    "giraffe": lambda _, y: y >= 1.45,
    "zebra": lambda x, _: x >= 0.46,
    "lion": lambda x, _: x >= 0.2,
}


@dataclass(frozen=True)
class _FlawedPen(Pen):
    """A pen that leaves out or adds parts of one animal."""

    animal: str = ""
    without_legs: frozenset[int] = frozenset()  # far hind, far fore, near hind, near fore
    fifth_leg: bool = False
    headless: bool = False
    upside_down: bool = False
    legs: list[float] = field(default_factory=list)  # that were asked for

    def _point(self, x: float, y: float) -> tuple[float, float]:
        return super()._point(x, _HEIGHT[self.animal] - y if self.upside_down else y)

    def _part(self, points: list[tuple[float, float]]) -> str:
        x, y = np.mean(points, axis=0)
        return "head" if _HEAD[self.animal](float(x), float(y)) else "body"

    def _left_out(self, points: list[tuple[float, float]]) -> bool:
        return self.headless and self._part(points) == "head"

    def _paint(self, part: str, colour: RGB) -> RGB:
        return colour

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        if not self._left_out([(x, y)]):
            super().ellipse(x, y, rx, ry, self._paint(self._part([(x, y)]), colour))

    def polygon(self, points: list[tuple[float, float]], colour: RGB) -> None:
        if not self._left_out(points):
            super().polygon(points, self._paint(self._part(points), colour))

    def line(self, points: list[tuple[float, float]], width: float, colour: RGB) -> None:
        if not self._left_out(points):
            super().line(points, width, self._paint(self._part(points), colour))

    def leg(self, x: float, top: float, width: float, colour: RGB) -> None:
        if self.fifth_leg and not self.legs:
            middle, (thick, high) = _BODY[self.animal], _FIFTH_LEG[self.animal]
            self._limb(middle[0] - 0.12, middle[1], high, thick, self._paint("fifth leg", colour))
        if len(self.legs) not in self.without_legs:
            self._limb(x, 0, top, width, self._paint("leg", colour))
        self.legs.append(x)

    def _limb(self, x: float, bottom: float, top: float, width: float, colour: RGB) -> None:
        left, right = x - width / 2, x + width / 2
        super().polygon([(left, bottom), (right, bottom), (right, top), (left, top)], colour)


class _PartsPen(_FlawedPen):
    """A pen that paints which part of which animal it draws."""

    def _paint(self, part: str, colour: RGB) -> RGB:
        return _paint_of(part if part in PARTS else f"{self.animal} {part}")


def _paint_of(part: str) -> RGB:
    return PARTS.index(part), _PART, 0  # no shadow and no outline has this green


def possible(scene: Scene, flaw: str) -> bool:
    """Whether a picture of this scene can have the flaw."""
    return scene.count <= _MOST_ANIMALS.get(flaw, scene.count)


def render_flawed(scene: Scene, flaw: str, seed: int) -> Image.Image:
    """The scene as a 64 x 64 RGB picture with one flaw of `FLAWS`.

    A flaw of the body is seen on every animal.
    """
    picture, rng = _draw(scene, flaw, seed, _FlawedPen)
    return _spoilt(picture.reduce(CANVAS // SIZE), flaw, rng)


def render_parts(scene: Scene, flaw: str, seed: int) -> np.ndarray:
    """Where `render_flawed` draws what: (64, 64) int, a place in `PARTS`, or -1."""
    picture, _ = _draw(scene, flaw, seed, _PartsPen)
    step = CANVAS // SIZE
    painted = np.asarray(picture)[step // 2 :: step, step // 2 :: step].astype(int)
    return np.where(painted[..., 1] == _PART, painted[..., 0], -1)


def _draw(
    scene: Scene, flaw: str, seed: int, pen: type[_FlawedPen]
) -> tuple[Image.Image, np.random.Generator]:
    rng = np.random.default_rng([seed, scene.index(), list(FLAWS).index(flaw)])
    stage = set_stage(scene.colour, scene.count + (flaw == "neighbour"), scene.place, rng)
    if pen is _PartsPen:
        stage.picture.paste((0, 0, 0), (0, 0, CANVAS, CANVAS))
    draw = ImageDraw.Draw(stage.picture)
    species = [scene.animal] * len(stage.figures)
    if flaw == "neighbour":
        species[rng.integers(len(species))] = _other(rng, ANIMALS, scene.animal)
    for animal, figure in zip(species, stage.figures, strict=True):
        if flaw != "no_animal":
            draw_animal(draw, animal, figure, stage, _held(pen, animal, flaw, rng))
    if flaw == "odd_patch":
        for box, colour in _patch(scene, stage, rng):
            draw.rectangle(box, fill=_paint_of("patch") if pen is _PartsPen else colour)
    return stage.picture, rng


def _held(pen: type[_FlawedPen], animal: str, flaw: str, rng: np.random.Generator) -> Callable[..., Pen]:
    missing = rng.permutation(4)[:3] if flaw == "legs_missing" else ()
    return lambda *place: pen(
        *place,
        animal=animal,
        without_legs=frozenset(int(leg) for leg in missing),
        fifth_leg=flaw == "leg_too_many",
        headless=flaw == "head_missing",
        upside_down=flaw == "upside_down",
    )


def _other(rng: np.random.Generator, values: tuple[str, ...], value: str) -> str:
    return str(rng.choice([other for other in values if other != value]))


def _patch(scene: Scene, stage: Stage, rng: np.random.Generator) -> Iterator[tuple[tuple[float, ...], RGB]]:
    """The boxes and colours of a chequered square on the nearest animal's coat or anywhere."""
    cell = rng.uniform(12, 16)
    left, top = rng.uniform(10, CANVAS - 10 - 4 * cell, size=2)
    if rng.random() < 0.5:
        x, y, unit, facing = stage.figures[-1]
        dx, dy = _BODY[scene.animal]
        left, top = x + facing * dx * unit * 0.9 - 2 * cell, y - dy * unit * 0.9 - 2 * cell
    bright = COLOURS[_other(rng, tuple(COLOURS), scene.colour)]
    for i, j in product(range(4), repeat=2):
        x, y = left + i * cell, top + j * cell
        yield (x, y, x + cell, y + cell), INK if (i + j) % 2 else bright


def _spoilt(picture: Image.Image, flaw: str, rng: np.random.Generator) -> Image.Image:
    """The whole picture noisy, blurred or dark."""
    if flaw == "blur":
        return picture.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 2.2)))
    pixels = np.asarray(picture).astype(np.float32)
    if flaw == "noise":
        pixels += rng.normal(0, rng.uniform(28, 60), size=pixels.shape)
    elif flaw == "darkness":
        pixels *= rng.uniform(0.25, 0.42)
    else:
        return picture
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def answers(shown: Scene, flaw: str, asked: Scene) -> dict[str, bool]:
    """What a judge should say of a picture of `shown` with this flaw that was made for the scene `asked`.

    Keys are the rubric's questions, True is yes; a question whose need fails is left out. The class that the
    questions name is the one asked for.
    """
    animals = flaw != "no_animal"
    visible = animals and shown.animal == asked.animal
    truths = SOUND | FLAWS[flaw]
    truths |= {
        "class_visible": visible,
        "colours": animals and shown.colour == asked.colour,
        "whole_prompt": animals and shown == asked,
    }
    return {name: truth for name, truth in truths.items() if visible or name not in NEED_THE_CLASS}
