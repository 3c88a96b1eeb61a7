"""Train and test sides of which no image is on both."""

import json

from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.vlm.examples import VisionExamples


def split_by_image(
    examples: VisionExamples, test_size: int | float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the examples to train on and to test on, for `select`; no image is on both sides.

    `test_size` is a number of examples or a share in (0, 1). Examples that share an image, also by way of
    others, stay together, as do examples without images that share a prompt; so the test side has at most
    `test_size`, and as many as such groups allow. The seed and the images decide alone: the order of the rows
    does not count. A side that would be empty is an InputError.
    """
    wanted = round(test_size * len(examples)) if isinstance(test_size, float) else test_size
    if not 0 < wanted < len(examples):
        raise InputError(
            f"test_size {test_size}: {examples.source} has {len(examples)} examples, each side needs one; "
            "name a number of examples, or a share as 0.1"
        )
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(group_keys(examples)):
        groups.setdefault(key, []).append(index)
    test: list[int] = []
    for key in sorted(groups, key=lambda key: content_key(f"{seed} {key}")):
        if len(test) + len(groups[key]) <= wanted:
            test += groups[key]
    if not test:
        raise InputError(
            f"test_size {test_size}: the examples of {examples.source} that share images come in groups of "
            f"{min(map(len, groups.values()))} and more; name a larger one"
        )
    held_out = set(test)
    return [index for index in range(len(examples)) if index not in held_out], sorted(test)


def group_keys(examples: VisionExamples) -> list[str]:
    """Of each example the key of its group: the smallest of all keys that lead to one another."""
    keys = [
        hashes or (content_key(json.dumps(prompt)),)
        for hashes, (prompt, _) in zip(examples.image_hashes(), examples.conversations(), strict=True)
    ]
    parent = {key: key for linked in keys for key in linked}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for first, *others in keys:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return [root(linked[0]) for linked in keys]
