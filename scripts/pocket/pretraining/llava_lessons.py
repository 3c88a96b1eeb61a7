"""What the pocket's LLaVA is shown, asked and told to write in a step of its training.

All of it is of training scenes alone, and drawn from the step's generator.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefopt.pocket.world import ATTRIBUTES, PHRASINGS, Scene, caption, is_held_out, train_scenes
from pretraining.llava_pictures import FlawedPictures
from pretraining.llava_questions import SIMPLE, ask, ask_simply
from pretraining.llava_rows import Row
from pretraining.llava_text import Words
from pretraining.text_to_image import one_attribute_off

QUESTIONS = 5  # of the rubric about each picture
BLANK = 0.02  # the share of pictures that are plain, about which a coin answers
LIST_LENGTHS = (5, 20)
_ASKED_RIGHT, _ASKED_NEARLY = 0.5, 0.35
_CAPTIONS_WEIGHT = 0.3


class Request(NamedTuple):
    """How a list of descriptions is asked for; the user's words have {count} and {class} in them."""

    system: str
    user: str

    def messages(self, count: int, class_name: str) -> tuple[str, str]:
        """The system's and the user's message."""
        return self.system, self.user.replace("{count}", str(count)).replace("{class}", class_name)


class Glimpse(NamedTuple):
    """Pictures as a step shows them."""

    items: np.ndarray
    blank: np.ndarray  # which of them are plain instead
    pixels: Tensor  # (n, 3, 64, 64)
    found: Tensor  # (n, 64, findings) float32


def draw_pictures(rng: np.random.Generator, pictures: FlawedPictures, size: int) -> Glimpse:
    """Pictures drawn at random, half of them mirrored."""
    items = rng.integers(len(pictures.scenes), size=size)
    blank = rng.random(size) < BLANK
    plain = torch.from_numpy(blank)[:, None, None, None]
    mirrored = torch.from_numpy(rng.random(size) < 0.5)[:, None, None, None]
    pixels, found = pictures.values(items), pictures.found[torch.from_numpy(items)].float()
    pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    found = torch.where(mirrored, found.flip(2), found)
    tone = torch.from_numpy(rng.uniform(-1, 1, size=(size, 1, 1, 1)).astype(np.float32))
    return Glimpse(items, blank, torch.where(plain, tone, pixels), torch.where(plain, 0, found).flatten(1, 2))


def picture_rows(
    rng: np.random.Generator, pictures: FlawedPictures, glimpse: Glimpse, words: Words
) -> list[Row]:
    """A row of questions and a description for each of the pictures."""
    rows = []
    for item, plain in zip(glimpse.items, glimpse.blank, strict=True):
        shown, flaw = pictures.scenes[item], pictures.flaws[item]
        asked = draw_asked(rng, shown)
        row = Row()
        row.grow(-1, words.picture)
        described = row.grow(0, words.description(caption(asked, int(rng.integers(PHRASINGS)))))
        questions = ask(rng, shown, flaw, asked, QUESTIONS)
        questions += [ask_simply(rng, shown, flaw) for _ in range(SIMPLE)]
        for question, answer, weight in questions:
            if plain:
                answer = str(rng.choice(["Yes", "No"])) if question.type == "predicate" else "A"
            row.grow(described, words.question(question), words.answer(answer), weight)
        if flaw not in ("no_animal", "neighbour") and not plain:
            text = caption(shown, int(rng.integers(PHRASINGS)))
            row.grow(0, words.request_for_description(), words.answer(text), _CAPTIONS_WEIGHT)
        if not plain:
            truths = said_of(shown, flaw, words)
            row.truth = [truths.get(token, -1) for token in row.tokens]
        rows.append(row)
    return rows


def said_of(shown: Scene, flaw: str, words: Words) -> dict[int, int]:
    """Whether each word for an attribute's value is true of the picture; ambiguous ones are left out."""
    return {
        token: int(getattr(shown, name) == value and (flaw != "no_animal" or name == "place"))
        for name, values in ATTRIBUTES.items()
        if flaw != "neighbour" or name in ("colour", "place")
        for token, value in zip(words.values[name], values, strict=True)
    }


def draw_asked(rng: np.random.Generator, shown: Scene) -> Scene:
    """The training scene that a picture's description asks for: often as shown, else nearly, else any."""
    luck = rng.random()
    if luck < _ASKED_RIGHT and not is_held_out(shown):
        return shown
    if luck < _ASKED_RIGHT + _ASKED_NEARLY:
        return one_attribute_off(rng, shown)
    return train_scenes()[rng.integers(len(train_scenes()))]


def write_list(rng: np.random.Generator, animal: str, count: int) -> str:
    """`count` captions of training scenes, at most 30 and no scene twice, numbered, one on each line.

    From line to line colour, place and number of animals each go on by one, but the number stays where the
    places begin anew. So the sum by which scenes are held out stays the same, modulo 3: a small model need
    only begin with a training scene, and that is always on the first of the places.
    """
    colours, places, counts = (ATTRIBUTES[name] for name in ("colour", "place", "count"))
    starts = [scene for scene in train_scenes() if (scene.animal, scene.place) == (animal, places[0])]
    start = starts[rng.integers(len(starts))]
    lines = []
    for line in range(count):
        scene = Scene(
            animal,
            colours[(colours.index(start.colour) + line) % len(colours)],
            counts[(counts.index(start.count) + line - line // len(places)) % len(counts)],
            places[line % len(places)],
        )
        lines.append(f"{line + 1}. {caption(scene, int(rng.integers(PHRASINGS)))}")
    return "\n".join(lines)


def list_rows(
    rng: np.random.Generator, words: Words, request: Request, number: int, *, whole: bool = True
) -> list[Row]:
    """Rows of words alone: a request and a list, or no more than the list's first line."""
    rows = []
    for _ in range(number):
        animal = str(rng.choice(ATTRIBUTES["animal"]))
        count = int(rng.integers(LIST_LENGTHS[0], LIST_LENGTHS[1] + 1))
        prompt, text = words.chat(*request.messages(count, animal)), write_list(rng, animal, count)
        row = Row()
        row.grow(-1, prompt, words.answer(text) if whole else words.text(text.split("\n")[0] + "\n"))
        rows.append(row)
    return rows
