"""From examples to batches: rows of trees or the plain duplicated batch, what is scored in it, its images."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from prefopt.errors import InputError
from prefopt.store import TensorStore
from prefopt.vlm.chat import Completion, Encoded, Encoder
from prefopt.vlm.trees import PromptPositions, Tree, lay_out


class Place(NamedTuple):
    """Where a completion stands."""

    tree: int
    segment: int  # its own
    parent: int


class Collator:
    """Makes the batches that CompletionScore scores.

    Of B examples with k completions each, `item` (B,), `tokens` (B, k), the numbers of scored tokens, `ranks`
    and `mask` (B, k), and if the examples have them `p_chosen` (B,) and `reference` (B, k). The model reads
    `input_ids` (rows, length); a scored token is a `target` (scored,), predicted at its `place` among all
    rows * length, and belongs to the completion `owner` of the B * k.

    With `positions`, prompts are shared: examples of one image, or of one prompt, are a tree, and trees are
    put into rows of up to `row_tokens`. Without, each completion is a row of its own, with its prompt: the
    plain duplicated batch that any model reads.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        max_length: int | None = None,
        positions: PromptPositions | None = None,
        row_tokens: int = 0,
    ):
        self.encode = Encoder(processor, max_length=max_length)
        self.positions, self.row_tokens = positions, row_tokens
        self.features: TensorStore | None = None  # by image_key, in place of the images
        self.fill = self.encode.tokenizer.eos_token_id

    @property
    def identity(self) -> Mapping[str, str]:
        """What the scores of a batch depend on besides the examples and the model."""
        return self.encode.identity

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        encoded = [self.encode(example) for example in examples]
        sizes = {len(one.completions) for one in encoded}
        if len(sizes) > 1:
            raise InputError(f"a batch has examples of {sorted(sizes)} completions; they need equally many")
        sets, shown_by = _image_sets(examples, encoded)
        rows = self._shared(encoded, shown_by) if self.positions else self._plain(encoded, shown_by)
        tokens = [[sum(completion.scored) for completion in one.completions] for one in encoded]
        shape = (len(examples), sizes.pop())
        batch = {
            "item": torch.tensor([example["item"] for example in examples]),
            "tokens": torch.tensor(tokens),
            "ranks": torch.arange(1, shape[1] + 1).expand(shape),
            "mask": torch.ones(shape, dtype=torch.bool),
            "counts": [len(examples[place]["images"]) for place in sets],
            **rows,
        }
        if self.features is not None and sets:
            batch["features"] = [self.features[examples[place]["image_key"]] for place in sets]
        else:
            batch["images"] = [encoded[place].prompt.images for place in sets]
        if examples[0]["p_chosen"] is not None:
            batch["p_chosen"] = torch.tensor([example["p_chosen"] for example in examples])
        if "reference" in examples[0]:
            batch["reference"] = torch.stack([example["reference"] for example in examples])
        return batch

    def _shared(self, encoded: Sequence[Encoded], shown_by: Sequence[int | None]) -> dict[str, Any]:
        trees, places = self._trees(encoded, shown_by)
        rows = lay_out(trees, room=self.row_tokens, fill=self.fill)

        def predicted_at(place: Place) -> tuple[int, int]:
            """Where the token in front of a completion stands, and its own first one."""
            starts, tree = rows.starts[place.tree], trees[place.tree]
            return starts[place.parent] + len(tree.segments[place.parent]) - 1, starts[place.segment]

        completions = [completion for one in encoded for completion in one.completions]
        scored = _scored(completions, [predicted_at(place) for place in places])
        return {
            "input_ids": rows.input_ids,
            "position_ids": rows.position_ids,
            "segment": rows.segment,
            "sees": rows.sees,
            "shown": rows.shown,
            **scored,
        }

    def _trees(
        self, encoded: Sequence[Encoded], shown_by: Sequence[int | None]
    ) -> tuple[list[Tree], list[Place]]:
        """One tree for the examples of a set of images, or of a prompt without any, and its completions."""
        groups: dict[Any, list[int]] = {}
        for number, one in enumerate(encoded):
            alike = tuple(one.prompt.ids) if shown_by[number] is None else shown_by[number]
            groups.setdefault(alike, []).append(number)
        trees, places = list[Tree](), dict[int, list[Place]]()
        for members in groups.values():
            shared = self._shared_start([encoded[number] for number in members])
            for together in [members] if shared else [[number] for number in members]:
                prompt = encoded[together[0]].prompt
                length = shared if len(together) > 1 else len(prompt.ids)
                positions: Any = self.positions
                numbered = positions(prompt.ids, prompt.kinds, prompt.images)[..., :length]
                tree = Tree([prompt.ids[:length]], numbered, shown_by[together[0]])
                for number in together:
                    rest = tree.add(0, encoded[number].prompt.ids[length:])
                    places[number] = [
                        Place(len(trees), tree.add(rest, completion.ids), rest)
                        for completion in encoded[number].completions
                    ]
                trees.append(tree)
        return trees, [place for number in range(len(encoded)) for place in places[number]]

    def _shared_start(self, group: Sequence[Encoded]) -> int:
        """How many tokens the prompts of a group begin alike with; 0 if an image comes after that."""
        prompts = [one.prompt.ids for one in group]
        shortest = min(map(len, prompts))
        length = next(
            (i for i in range(shortest) if any(ids[i] != prompts[0][i] for ids in prompts)), shortest
        )
        image = getattr(self.encode.processor, "image_token_id", None)
        return 0 if any(image in ids[length:] for ids in prompts) else length

    def _plain(self, encoded: Sequence[Encoded], shown_by: Sequence[int | None]) -> dict[str, Any]:
        rows = [(number, one.prompt, c) for number, one in enumerate(encoded) for c in one.completions]
        length = max(len(prompt.ids) + len(completion.ids) for _, prompt, completion in rows)
        starts = [row * length + len(prompt.ids) for row, (_, prompt, _) in enumerate(rows)]
        names = rows[0][1].kinds
        return {
            "input_ids": _padded([p.ids + c.ids for _, p, c in rows], self.fill),
            "attention_mask": _padded([[1] * (len(p.ids) + len(c.ids)) for _, p, c in rows], 0),
            "kinds": {
                name: _padded([p.kinds[name] + [0] * len(c.ids) for _, p, c in rows], 0) for name in names
            },
            "shown": [shown_by[number] for number, _, _ in rows if shown_by[number] is not None],
            **_scored([c for _, _, c in rows], [(start - 1, start) for start in starts]),
        }


def _scored(completions: Sequence[Completion], starts: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """The scored tokens of completions, each with where it is predicted; see Collator.

    `starts` has of each completion the place of the token in front of it, and of its first one.
    """
    places, targets, owner = list[int](), list[int](), list[int]()
    for number, (completion, (before, start)) in enumerate(zip(completions, starts, strict=True)):
        for offset, (token, scored) in enumerate(zip(completion.ids, completion.scored, strict=True)):
            if scored:
                places.append(start + offset - 1 if offset else before)
                targets.append(token)
                owner.append(number)
    return {"places": torch.tensor(places), "targets": torch.tensor(targets), "owner": torch.tensor(owner)}


def _image_sets(
    examples: Sequence[Mapping[str, Any]], encoded: Sequence[Encoded]
) -> tuple[list[int], list[int | None]]:
    """The examples whose images are the batch's sets, each set once; and of each example its set's number."""
    numbers: dict[str, int] = {}
    sets, shown_by = list[int](), list[int | None]()
    for place, example in enumerate(examples):
        key = example["image_key"]
        if key and key not in numbers:
            numbers[key] = len(sets)
            sets.append(place)
        shown_by.append(numbers.get(key))
    return sets, shown_by


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
