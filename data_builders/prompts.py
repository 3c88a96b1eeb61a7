"""Sources of prompts: a text file or the captions of the pocket's world; and prompts as records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_builders.stages import Record, Stage
from prefopt.pocket.world import PHRASINGS, caption, train_scenes
from prefopt.records import InputError
from prefopt.store import content_key

POCKET = "pocket"


def read_prompts(source: str, number: int | None, seed: int) -> list[str]:
    """The first `number` prompts (None: all) of a text file, or of `pocket` in an order drawn by `seed`.

    A larger number only adds prompts at the end. A number larger than there are is an InputError.
    """
    prompts = pocket_captions(seed) if source == POCKET else list(lines(Path(source)))
    if number is not None and number > len(prompts):
        raise InputError(f"--num_prompts is {number}, but {source} has {len(prompts)} prompts")
    return prompts[:number]


def lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, stripped; an empty one is an InputError that names its number."""
    if not file.is_file():
        raise InputError(f"no prompts file {file}: name a text file, one prompt a line, or {POCKET}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text: {error}") from error
    if not text.strip():
        raise InputError(f"{file} is empty; it needs one prompt a line")
    # Not splitlines: that also splits at characters which a prompt may hold, such as U+2028.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if not line.strip():
            raise InputError(f"{file}: line {number} is empty; each line is a prompt, so delete it")
        yield line.strip()


def pocket_captions(seed: int) -> list[str]:
    """All captions of the training scenes; each scene comes once before any comes again."""
    chance, scenes = np.random.default_rng(seed), train_scenes()
    first = chance.integers(PHRASINGS, size=len(scenes))
    return [
        caption(scenes[i], int(first[i]) + turn)
        for turn in range(PHRASINGS)
        for i in chance.permutation(len(scenes))
    ]


def identify(prompts: Iterable[str]) -> Iterator[Record]:
    """A record for each prompt, with the hash of its text as `prompt_id`."""
    for prompt in prompts:
        yield {"prompt": prompt, "prompt_id": content_key(prompt)}


def distinct(dropped: Counter[str]) -> Stage:
    """The stage that lets each prompt pass once, and counts the others."""

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        seen = set()
        for record in records:
            if record["prompt_id"] in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(record["prompt_id"])
                yield record

    return stage
