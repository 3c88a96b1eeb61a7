"""Questions of a rubric that a detector answers: is the class there, as often as asked for, in its colour.

Count and colour are read from the prompt: a number word or figure before the class ('two red elephants'), and
the first of the eleven basic colour terms (Berlin and Kay, 1969). A prompt that says neither makes the
answer unclear, which counts nothing.
"""

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from prefopt.detectors import Box
from prefopt.judges.questions import NO, YES, Answer
from prefopt.judges.rubric import Check

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: number for number, word in enumerate(_WORDS)}
NUMBERS |= {"a": 1, "an": 1}
# Hues in degrees, of the middle of each colour; brown is dark orange, pink is light red.
HUES = {"red": 0, "orange": 30, "yellow": 55, "green": 125, "blue": 222, "purple": 275, "pink": 330}
GREYS = ("black", "white", "grey", "gray")
SHARE = 0.15  # of the pixels of a box that must have the colour: a slender animal fills a third of its box
SATURATED = 0.25

UNCLEAR = Answer({YES: 0.5, NO: 0.5})


def check(
    kind: Check, image: Image.Image, prompt: str, class_name: str, boxes: Sequence[Box], threshold: float
):
    """The answer to one check: yes, no, or unclear; `boxes` are those of the class, any confidence."""
    found = [box for box in boxes if box.confidence >= threshold]
    if kind == "presence":
        return _answer(bool(found))
    if kind == "count":
        count = expected_count(prompt, class_name)
        return UNCLEAR if count is None else _answer(len(found) == count)
    colour = expected_colour(prompt)
    if colour is None or not found:
        return UNCLEAR
    return _answer(all(_stands_out(image, box, colour) for box in found))


def expected_count(prompt: str, class_name: str) -> int | None:
    """The number of the class that a prompt asks for; None if it names none.

    `two red elephants in the snow` -> 2.
    """
    name = re.escape(class_name.lower())
    numbers = "|".join([*NUMBERS, r"\d+"])
    # Up to two words may stand between the number and the class.
    match = re.search(rf"\b({numbers})\s+(?:[\w-]+\s+){{0,2}}{name}(?:s|es)?\b", prompt.lower())
    if match is None:
        return None
    word = match.group(1)
    return NUMBERS[word] if word in NUMBERS else int(word)


def expected_colour(prompt: str) -> str | None:
    """The first colour that a prompt names; None if it names none."""
    match = re.search(rf"\b({'|'.join([*HUES, *GREYS, 'brown'])})\b", prompt.lower())
    return match.group(1) if match else None


def crop(image: Image.Image, box: Box) -> Image.Image:
    """The part of an image inside of a box, at least one pixel."""
    left, top = max(0, int(box.left)), max(0, int(box.top))
    right, bottom = min(image.width, int(np.ceil(box.right))), min(image.height, int(np.ceil(box.bottom)))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _stands_out(image: Image.Image, box: Box, colour: str) -> bool:
    """Whether a box has the colour, and more of it than the whole image: grass is not a green animal."""
    inside = colour_share(crop(image, box), colour)
    return inside >= SHARE and inside >= colour_share(image, colour)


def colour_share(image: Image.Image, colour: str) -> float:
    """The share of an image's pixels, 0..1, that a person would call by this colour term."""
    hue, saturation, value = np.moveaxis(np.asarray(image.convert("HSV"), dtype=np.float32) / 255, -1, 0)
    if colour in GREYS:
        dull = saturation < SATURATED
        bright = {"black": value < 0.25, "white": value > 0.8}.get(colour, (value >= 0.25) & (value <= 0.8))
        return float((bright if colour == "black" else dull & bright).mean())
    vivid = (saturation >= SATURATED) & (value >= 0.2)
    if colour == "brown":
        return float((vivid & (value < 0.65) & (np.abs(hue * 360 - 25) < 20)).mean())
    away = np.abs((hue[..., None] * 360 - np.array(list(HUES.values())) + 180) % 360 - 180)
    return float((vivid & (away.argmin(-1) == list(HUES).index(colour))).mean())


def _answer(yes: bool) -> Answer:
    return Answer({YES: float(yes), NO: float(not yes)})
