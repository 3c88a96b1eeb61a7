"""Rows of trees: what completions share, an image or a whole prompt, is read once, in one forward pass.

A tree begins with a prompt; completions, or the rest of other prompts, continue it. A token sees its
ancestors and its own segment so far, nothing else, and stands at the position it would have alone, so each
path from the root reads as it does in a row of its own. A row holds one tree or several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

ROOT = -1  # the parent of a tree's first segment


@dataclass
class Tree:
    """Segments of tokens, each after its parent; the first holds all placeholders of the images."""

    segments: list[list[int]]
    positions: Tensor  # of the first segment: (p,), or (3, p) on three axes
    shown: int | None = None  # the number of the set of images that the first segment shows
    parents: list[int] = field(default_factory=lambda: [ROOT])

    def add(self, parent: int, tokens: list[int]) -> int:
        """Continue a segment; the number of the new one, or of its parent if there is nothing to add."""
        if not tokens:
            return parent
        self.segments.append(tokens)
        self.parents.append(parent)
        return len(self.segments) - 1

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    def all_positions(self) -> Tensor:
        """The positions of all segments' tokens, (length,) or (3, length)."""
        ends, pieces = [self.positions.amax() + 1], [self.positions]  # an image may take fewer than tokens
        for segment, parent in zip(self.segments[1:], self.parents[1:], strict=True):
            following = ends[parent] + torch.arange(len(segment))
            ends.append(following[-1] + 1)
            pieces.append(following.expand(*self.positions.shape[:-1], -1))
        return torch.cat(pieces, dim=-1)


class Rows(NamedTuple):
    """Trees in rows, as tensors."""

    input_ids: Tensor  # (n, length), padded on the right
    position_ids: Tensor  # (n, length), or (3, n, length) on three axes
    segment: Tensor  # (n, length), the token's segment, counted within its row; -1 on padding
    sees: Tensor  # (n, segments, segments), whether the first sees the second: an ancestor, or itself
    shown: list[int]  # sets of images in the order of their placeholders
    starts: list[list[int]]  # of each tree and segment, the place of its first token among all n * length


def lay_out(trees: Sequence[Tree], *, room: int = 0, fill: int = 0) -> Rows:
    """Trees in as few rows as a first fit finds, each of at most `room` tokens or the longest tree's.

    `fill` is the token of the padding: one of text, for an image's would ask for pixels.
    """
    rows = _first_fit([len(tree) for tree in trees], max(room, max(map(len, trees))))
    length = max(sum(len(trees[place]) for place in row) for row in rows)
    starts: list[list[int]] = [[] for _ in trees]
    tokens, positions, segments, sees, shown = [], [], [], [], []
    for number, row in enumerate(rows):
        ids, numbers, count, place = list[int](), list[int](), 0, number * length
        for at in row:
            for number_in_tree, segment in enumerate(trees[at].segments):
                starts[at].append(place + len(ids))
                ids += segment
                numbers += [count + number_in_tree] * len(segment)
            count += len(trees[at].segments)
            shown += [] if trees[at].shown is None else [trees[at].shown]
        tokens.append(torch.tensor(ids))
        segments.append(torch.tensor(numbers))
        positions.append(torch.cat([trees[at].all_positions() for at in row], dim=-1))
        sees.append(torch.block_diag(*(_ancestors(trees[at].parents) for at in row)).bool())
    most = max(map(len, sees))
    padded = torch.nn.functional.pad
    return Rows(
        input_ids=pad_sequence(tokens, batch_first=True, padding_value=fill),
        position_ids=torch.stack([padded(p, (0, length - p.shape[-1])) for p in positions], dim=-2),
        segment=pad_sequence(segments, batch_first=True, padding_value=-1),
        sees=torch.stack([padded(one, (0, most - len(one), 0, most - len(one))) for one in sees]),
        shown=shown,
        starts=starts,
    )


def attention_mask(segment: Tensor, sees: Tensor) -> Tensor:
    """Which token attends to which, (n, 1, length, length); padding to itself, so that none sees nothing."""
    length = segment.shape[1]
    index = segment.clamp(min=0)
    queries = sees.gather(1, index[:, :, None].expand(-1, -1, sees.shape[2]))
    allowed = queries.gather(2, index[:, None, :].expand(-1, length, -1))
    real = segment >= 0
    square = torch.ones(length, length, dtype=torch.bool, device=segment.device)
    allowed = allowed & real[:, :, None] & real[:, None, :] & square.tril()
    return (allowed | torch.eye(length, dtype=torch.bool, device=segment.device))[:, None]


class PromptPositions:
    """The positions that a model gives to the tokens of a prompt."""

    def __init__(self, model: PreTrainedModel):
        body: Any = model.base_model
        self._numbers_images = hasattr(body, "get_rope_index")
        if self._numbers_images:
            with torch.device("meta"):  # it needs the configuration alone; workers are sent a copy
                self._body = type(body)(body.config)

    def __call__(
        self, ids: Sequence[int], kinds: Mapping[str, Sequence[int]], images: Mapping[str, Tensor]
    ) -> Tensor:
        """(p,), or (3, p) where an image's tokens have a time, a height and a width."""
        if not self._numbers_images:
            return torch.arange(len(ids))
        grid = {name: value for name, value in images.items() if name.endswith("grid_thw")}
        types = torch.tensor([kinds["mm_token_type_ids"]])
        return self._body.get_rope_index(torch.tensor([ids]), mm_token_type_ids=types, **grid)[0][:, 0]


def _first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The numbers of what goes into each row: the longest first, each into the first row it fits into."""
    rows, left = list[list[int]](), list[int]()
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        place = next((i for i, free in enumerate(left) if free >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(room)
        rows[place].append(number)
        left[place] -= lengths[number]
    return rows


def _ancestors(parents: Sequence[int]) -> Tensor:
    """(segments, segments), 1 where the second is the first one itself or comes before it on its path."""
    seen = torch.eye(len(parents))
    for number, parent in enumerate(parents):
        if parent != ROOT:
            seen[number] += seen[parent]
    return seen
