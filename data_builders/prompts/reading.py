"""Prompts from a text file or the pocket's captions, as records, and by the classes that they name."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from data_builders.engine.stages import Record
from prefopt.errors import InputError
from prefopt.files import content_key, text_lines
from prefopt.pocket import NAME as POCKET
from prefopt.pocket.drawing import ANIMALS
from prefopt.pocket.world import PHRASINGS, caption, held_out_scenes, parse, train_scenes

logger = logging.getLogger(__name__)


@dataclass
class Prompts:
    """Records of `prompt`, `prompt_id` and `class` (empty: none): to train on, and held out; with counts.

    `counts` of prompts of an LLM: requested and parsed, exact_duplicates, near_duplicates and
    without_their_class left out, calls of the LLM made now, and calls_kept that were made before.
    """

    training: list[Record] = field(default_factory=list)
    held_out: list[Record] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)  # given prompts, by reason


def given_prompts(texts: Iterable[str], classes: Sequence[str] = ()) -> Prompts:
    """Each different prompt once, with the one of these classes that it names; repeated ones are counted.

    With classes, a prompt that names none or several of them, and a class that no prompt names, is an
    InputError.
    """
    prompts, missing = Prompts(), set(classes)
    for record in distinct(identify(texts), prompts.left_out):
        if classes:
            record["class"] = _class_of(record["prompt"], classes)
            missing.discard(record["class"])
        prompts.training.append(record)
    if prompts.left_out:
        logger.info("%d prompts are repetitions of others, and left out", prompts.left_out.total())
    if missing:
        raise InputError(f"no prompt names {sorted(missing)[0]}; add some, or take it from --classes")
    return prompts


def read_prompts(source: str, number: int | None = None, seed: int = 0) -> list[str]:
    """The first `number` prompts (None: all) of a text file, or of `pocket` in an order that `seed` decides.

    A larger number only adds prompts at the end. A number larger than there are is an InputError.
    """
    prompts = pocket_captions(seed) if source == POCKET else list(text_lines(Path(source)))
    if number is not None and number > len(prompts):
        raise InputError(f"--num_prompts is {number}, but {source} has {len(prompts)} prompts")
    return prompts[:number]


def pocket_captions(seed: int) -> list[str]:
    """All captions of the training scenes; each scene comes once before any comes again."""
    chance, scenes = np.random.default_rng(seed), train_scenes()
    first = chance.integers(PHRASINGS, size=len(scenes))
    return [
        caption(scenes[i], int(first[i]) + turn)
        for turn in range(PHRASINGS)
        for i in chance.permutation(len(scenes))
    ]


def held_out_captions(animals: Sequence[str] | None = None) -> list[str]:
    """The captions of the pocket's scenes that no model was trained on, of these animals (None: all)."""
    if unknown := [name for name in animals or () if name not in ANIMALS]:
        raise InputError(f"--classes {unknown[0]} is no animal of the pocket: {', '.join(ANIMALS)}")
    scenes = [scene for scene in held_out_scenes() if animals is None or scene.animal in animals]
    return [caption(scene, i + turn) for turn in range(PHRASINGS) for i, scene in enumerate(scenes)]


def scenes_of(captions: Iterable[str]) -> dict[str, str]:
    """The first caption of each caption's scene: what it asks for, in whichever words."""
    return {text: caption(parse(text), 0) for text in captions}


def identify(prompts: Iterable[str]) -> Iterator[Record]:
    """A record for each prompt, with the hash of its text as `prompt_id`."""
    for prompt in prompts:
        yield {"prompt": prompt, "prompt_id": content_key(prompt), "class": ""}


def distinct(records: Iterable[Record], left_out: Counter[str]) -> Iterator[Record]:
    """Each different prompt once; the repetitions are counted."""
    seen = set()
    for record in records:
        if record["prompt_id"] in seen:
            left_out["duplicate"] += 1
        else:
            seen.add(record["prompt_id"])
            yield record


@cache
def naming(name: str) -> re.Pattern[str]:
    """What finds the name of a class, or its plural, as a word of a text."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?:e?s)?(?!\w)", re.IGNORECASE)


def _class_of(prompt: str, classes: Sequence[str]) -> str:
    named = [name for name in classes if naming(name).search(prompt)]
    if len(named) != 1:
        raise InputError(
            f"the prompt {prompt!r} names {' and '.join(named) or 'none'} of the classes "
            f"{', '.join(classes)}; it has to name one"
        )
    return named[0]
