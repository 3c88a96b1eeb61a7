"""Questions about pictures, each with one right answer, that the pocket's VLM was not taught.

A picture shows two groups of animals at one place, of two species and two colours. Answers are made of the
words of the world's captions: the VLM has learned to write these, and no others. Nobody asks what stands on
the left or right: the vision tower was trained on mirrored pictures, and its patches do not tell.

Pictures, questions and answers are pure functions of a split and a number, so nothing is kept on disk.
"""

import io
import re
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import datasets
import numpy as np
from PIL import Image, ImageDraw

from prefopt.errors import InputError
from prefopt.pocket.drawing import ANIMALS, COLOURS, draw_animal, set_stage
from prefopt.pocket.scenery import CANVAS, PLACES, shift
from prefopt.pocket.world import ATTRIBUTES, NUMBERS, SIZE, WHERE, Scene

Split = Literal["train", "test", "critic"]
ROWS: dict[Split, int] = {"train": 1600, "test": 200, "critic": 1600}
# Three animals at most, as in a scene of one species.
_COUNTS = ((1, 1), (1, 2), (2, 1))


class Duo(NamedTuple):
    """Two groups of animals at one place, of different species and colours; their order means nothing."""

    one: Scene
    other: Scene


class Asked(NamedTuple):
    """A question of some kind about a picture of a duo, with its right answer."""

    duo: Duo
    seed: int  # of the picture
    kind: str
    question: str
    answer: str


@cache
def duos(split: Split) -> tuple[Duo, ...]:
    """The duos of a split, about 900; no two splits share one."""
    if split not in get_args(Split):
        raise InputError(f"the pocket's questions have no split {split!r}; they have {', '.join(ROWS)}")
    residue = list(ROWS).index(split)
    return tuple(duo for duo in _all_duos() if _index_sum(duo) % len(ROWS) == residue)


@cache
def _all_duos() -> tuple[Duo, ...]:
    return tuple(
        Duo(Scene(animal, colour, count, place), Scene(animal_2, colour_2, count_2, place))
        for animal, animal_2 in product(ANIMALS, repeat=2)
        for colour, colour_2 in product(COLOURS, repeat=2)
        for (count, count_2), place in product(_COUNTS, PLACES)
        if animal < animal_2 and colour != colour_2
    )


def _index_sum(duo: Duo) -> int:
    # As in `world.is_held_out`: every value, and every pair of values, is in all splits alike.
    places = [(scene, name) for scene in duo for name in ATTRIBUTES if name != "place"]
    return PLACES.index(duo.one.place) + sum(ATTRIBUTES[n].index(getattr(s, n)) for s, n in places)


def render_duo(duo: Duo, seed: int) -> Image.Image:
    """The duo as a 64 x 64 RGB picture; the seed decides all else, as in `world.render`."""
    rng = np.random.default_rng([seed, duo.one.index(), duo.other.index()])
    stage = set_stage(duo.one.colour, duo.one.count + duo.other.count, duo.one.place, rng)
    coats = stage.coat, shift(COLOURS[duo.other.colour], rng, 12)
    groups = rng.permutation([0] * duo.one.count + [1] * duo.other.count)
    draw = ImageDraw.Draw(stage.picture)
    for group, figure in zip(groups, stage.figures, strict=True):
        draw_animal(draw, duo[group].animal, figure, stage._replace(coat=coats[group]))
    return stage.picture.reduce(CANVAS // SIZE)


# Kinds of questions: from the group that is meant, and the other one, to the question and its answer


def _said(scene: Scene, colour: str = "") -> str:
    noun = scene.animal if scene.count == 1 else f"{scene.animal}s"
    return " ".join(filter(None, (NUMBERS[scene.count], colour, noun, WHERE[scene.place])))


def _colour(scene: Scene, _: Scene) -> tuple[str, str]:
    return f"Which colour are the {scene.animal}s?", _said(scene, scene.colour)


def _number(scene: Scene, _: Scene) -> tuple[str, str]:
    return f"How many {scene.animal}s are there?", _said(scene)


def _absent(scene: Scene, other: Scene) -> tuple[str, str]:
    """One of the two species that are not there; which one follows from the order of the groups."""
    absent = [animal for animal in ANIMALS if animal not in (scene.animal, other.animal)]
    animal = absent[scene.animal < other.animal]
    return f"How many {animal}s are there?", f"No {animal}s {WHERE[scene.place]}"


def _company(scene: Scene, other: Scene) -> tuple[str, str]:
    return f"Which animals are with the {other.animal}s?", _said(scene)


def _place(scene: Scene, _: Scene) -> tuple[str, str]:
    return f"Where are the {scene.animal}s?", _said(scene)


KINDS: dict[str, Callable[[Scene, Scene], tuple[str, str]]] = {
    "colour": _colour,
    "number": _number,
    "absent": _absent,
    "company": _company,
    "place": _place,
}


def ask(split: Split, number: int) -> Asked:
    """Question `number` (any, from 0) of a split; the kinds take turns."""
    rng = np.random.default_rng([list(ROWS).index(split), number])
    pool = duos(split)
    duo, seed = pool[rng.integers(len(pool))], int(rng.integers(2**31))
    kind = list(KINDS)[number % len(KINDS)]
    return Asked(duo, seed, kind, *KINDS[kind](*(duo if rng.random() < 0.5 else reversed(duo))))


def qa_rows(split: Split, count: int | None = None) -> datasets.Dataset:
    """The first `count` questions of a split (default: 1,600 for training, 200 for a test).

    Rows of trl's vision format: `images` (one PNG), `prompt` and `completion` (one message each), `kind`.
    """
    asked = [ask(split, number) for number in range(ROWS[split] if count is None else count)]
    return datasets.Dataset.from_list([_row(one) for one in asked], features=_FEATURES)


def pair_rows(split: Split, count: int | None = None) -> datasets.Dataset:
    """The same with the right answer as `chosen`, and one that says nearly the same as `rejected`."""
    numbers = range(ROWS[split] if count is None else count)
    rows = [_pair(ask(split, number), [list(ROWS).index(split), number]) for number in numbers]
    return datasets.Dataset.from_list(rows, features=_PAIR_FEATURES)


def _pair(asked: Asked, seed: list[int]) -> dict[str, Any]:
    words = set(asked.answer.split())
    others = [answer for answer in answers_to(asked.question) if answer != asked.answer]
    other_words = [len(words.symmetric_difference(answer.split())) for answer in others]
    near = [answer for answer, n in zip(others, other_words, strict=True) if n == min(other_words)]
    wrong = near[np.random.default_rng([*seed, 1]).integers(len(near))]
    row = _row(asked)
    chosen = row.pop("completion")
    return {**row, "chosen": chosen, "rejected": [{"role": "assistant", "content": wrong}]}


_MESSAGES = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
_FEATURES = datasets.Features(
    {
        "images": datasets.List(datasets.Image()),
        "prompt": _MESSAGES,
        "completion": _MESSAGES,
        "kind": datasets.Value("string"),
    }
)
_PAIR_FEATURES = datasets.Features(
    {name: feature for name, feature in _FEATURES.items() if name != "completion"}
    | {"chosen": _MESSAGES, "rejected": _MESSAGES}
)


def _row(asked: Asked) -> dict[str, Any]:
    file = io.BytesIO()
    render_duo(asked.duo, asked.seed).save(file, "PNG")
    return {
        "images": [{"bytes": file.getvalue(), "path": None}],
        "prompt": [{"role": "user", "content": asked.question}],
        "completion": [{"role": "assistant", "content": asked.answer}],
        "kind": asked.kind,
    }


def answers_to(question: str) -> tuple[str, ...]:
    """All answers that a question has about any picture, in order; none for a question of others."""
    return _answers().get(question, ())


@cache
def _answers() -> dict[str, tuple[str, ...]]:
    """Every question, and its answers over all duos."""
    found: dict[str, dict[str, None]] = {}
    for duo, kind in product(_all_duos(), KINDS.values()):
        for groups in (duo, duo[::-1]):
            question, answer = kind(*groups)
            found.setdefault(question, {})[answer] = None
    return {question: tuple(sorted(answers)) for question, answers in found.items()}


def is_right(row: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer says the row's right one; case, spaces and punctuation do not count."""
    return _normalised(answer) == _normalised(row["completion"][-1]["content"])


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
