"""Rows that show a picture once and then ask for several things, each as if it were asked alone.

A row is a tree: the picture; after it the description with the questions about it, and the request to
describe the picture. A token sees its own branch and what the branch grew from, and its position is the one
that it would have alone, so the model learns what it will be asked at the cost of one reading.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Row:
    """Token ids and, of each: its branch, its position, the token to learn next (-1: none), its weight.

    `truth` says of a word about the picture whether it is true (1) or not (0); of any other token it is -1.
    """

    tokens: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    truth: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # of each branch
    ends: list[int] = field(default_factory=list)  # of each branch, the position after it

    def grow(
        self, parent: int, tokens: list[int], completion: list[int] | None = None, weight: float = 1.0
    ) -> int:
        """A new branch after `parent` (-1: the first), whose completion is to be learned; its number."""
        completion = completion or []
        start = self.ends[parent] if parent >= 0 else 0
        whole = tokens + completion[:-1]
        targets = [-1] * (len(tokens) - bool(completion)) + completion
        number = len(self.parents)
        self.tokens += whole
        self.branch += [number] * len(whole)
        self.position += range(start, start + len(whole))
        self.target += targets
        self.weight += [weight] * len(whole)
        self.truth += [-1] * len(whole)
        self.parents.append(parent)
        self.ends.append(start + len(whole))
        return number


@dataclass
class Batch:
    """Rows padded on the right."""

    tokens: Tensor  # (n, s)
    position: Tensor  # (n, s)
    seen: Tensor  # (n, 1, s, s), True where a token sees another
    target: Tensor  # (n, s), -1 where nothing is learned
    weight: Tensor  # (n, s)
    truth: Tensor  # (n, s), -1 where nothing is said of the picture


def collate(rows: list[Row], padding: int) -> Batch:
    """A batch of rows."""
    size = max(len(row.tokens) for row in rows)

    def padded(values: list[list], fill: float) -> Tensor:
        return torch.tensor([line + [fill] * (size - len(line)) for line in values])

    branch = padded([row.branch for row in rows], 0)
    most = max(len(row.parents) for row in rows)
    above = torch.zeros(len(rows), most, most, dtype=torch.bool)
    for i, row in enumerate(rows):
        for number, parent in enumerate(row.parents):
            if parent >= 0:
                above[i, number] = above[i, parent]
            above[i, number, number] = True
    index = torch.arange(len(rows))[:, None, None]
    seen = above[index, branch[:, :, None], branch[:, None, :]]
    return Batch(
        tokens=padded([row.tokens for row in rows], padding),
        position=padded([row.position for row in rows], 0),
        seen=(seen & torch.ones(size, size, dtype=torch.bool).tril())[:, None],
        target=padded([row.target for row in rows], -1),
        weight=padded([row.weight for row in rows], 0.0),
        truth=padded([row.truth for row in rows], -1),
    )
