"""The pocket world: 360 scenes of animals, their pictures and captions, and which of them no training sees.

A scene is four words (animal, colour, count, place); a picture adds a seed. Pictures and captions are pure
functions, so nothing of this world is kept on disk.
"""

import re
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from prefopt.errors import InputError
from prefopt.pocket.drawing import ANIMALS, COLOURS, draw_scene
from prefopt.pocket.scenery import CANVAS, PLACES

SIZE = 64
COUNTS = (1, 2, 3)
ATTRIBUTES: dict[str, tuple] = {"animal": ANIMALS, "colour": tuple(COLOURS), "count": COUNTS, "place": PLACES}

NUMBERS = {1: "one", 2: "two", 3: "three"}
WHERE = {
    "savanna": "on the savanna",
    "desert": "in the desert",
    "snow": "in the snow",
    "lake": "by the lake",
    "night": "at night",
}
_PHRASINGS = (
    "{number} {colour} {noun} {where}",
    "a picture of {number} {colour} {noun} {where}",
    "{where}, {number} {colour} {noun}",
    "{number} {noun} {where}, coloured {colour}",
    "{place}: {number} {colour} {noun}",
    "{number} {noun}, {colour}, {place}",
)
PHRASINGS = len(_PHRASINGS)


@dataclass(frozen=True, order=True)
class Scene:
    """What a picture shows, as far as a caption says it."""

    animal: str
    colour: str
    count: int
    place: str

    def index(self) -> int:
        """The scene's place, 0..359, in the order of `all_scenes`."""
        place = 0
        for name, values in ATTRIBUTES.items():
            place = place * len(values) + values.index(getattr(self, name))
        return place


@cache
def all_scenes() -> tuple[Scene, ...]:
    """All 360 scenes; the last attribute changes fastest."""
    return tuple(Scene(*values) for values in product(*ATTRIBUTES.values()))


@cache
def _divided() -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    return (
        tuple(scene for scene in all_scenes() if not is_held_out(scene)),
        tuple(scene for scene in all_scenes() if is_held_out(scene)),
    )


def train_scenes() -> list[Scene]:
    """The 240 scenes that training may show."""
    return list(_divided()[0])


def held_out_scenes() -> list[Scene]:
    """The 120 scenes that no training has seen, in picture or in words: they test composition."""
    return list(_divided()[1])


def is_held_out(scene: Scene) -> bool:
    """Whether the scene is one of `held_out_scenes`."""
    # One residue of the sum: a third of the scenes, and about a third of every value and pair of values.
    return sum(values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()) % 3 == 0


def render(scene: Scene, seed: int) -> Image.Image:
    """The scene as a 64 x 64 RGB picture; the seed decides position, size, facing, shades, sky and plants."""
    rng = np.random.default_rng([seed, scene.index()])
    return draw_scene(scene.animal, scene.colour, scene.count, scene.place, rng).reduce(CANVAS // SIZE)


def silhouette(scene: Scene, seed: int) -> Image.Image:
    """Where the animals of `render(scene, seed)` are: 64 x 64 L, 255 on them."""
    rng = np.random.default_rng([seed, scene.index()])
    return draw_scene(scene.animal, scene.colour, scene.count, scene.place, rng, silhouette=True).reduce(
        CANVAS // SIZE
    )


def caption(scene: Scene, phrasing: int) -> str:
    """The scene in words; `phrasing` counts round six ways; the first: `two red lions at night`."""
    noun = scene.animal if scene.count == 1 else f"{scene.animal}s"
    return _PHRASINGS[phrasing % PHRASINGS].format(
        number=NUMBERS[scene.count],
        colour=scene.colour,
        noun=noun,
        where=WHERE[scene.place],
        place=scene.place,
    )


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    groups = {
        "number": f"(?P<number>{'|'.join(NUMBERS.values())})",
        "colour": f"(?P<colour>{'|'.join(COLOURS)})",
        "noun": f"(?P<animal>{'|'.join(ANIMALS)})(?P<plural>s?)",
        "where": f"(?P<place>{'|'.join(WHERE.values())})",
        "place": f"(?P<place>{'|'.join(PLACES)})",
    }
    return tuple(re.compile(phrasing.format(**groups)) for phrasing in _PHRASINGS)


def parse(text: str) -> Scene:
    """The scene that `caption` would say so, whichever the phrasing; InputError for any other text."""
    counts = {word: count for count, word in NUMBERS.items()}
    places = {words: place for place, words in WHERE.items()}
    for pattern in _patterns():
        if match := pattern.fullmatch(text):
            count = counts[match["number"]]
            if (count > 1) == bool(match["plural"]):
                return Scene(
                    match["animal"], match["colour"], count, places.get(match["place"], match["place"])
                )
    raise InputError(
        f"{text!r} is no caption of the pocket world (prefopt.pocket.world); "
        f"say it like {caption(all_scenes()[0], 0)!r}"
    )
