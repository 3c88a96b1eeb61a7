"""From rows of trl's vision preference format to batches of token ids, masks and pixels.

A chat template that leaves a turn open, as LLaVA-1.5's does, would never teach the model to stop: BOS is
added where the tokenizer would add it and the template does not, and EOS where the template has not closed
the completion. Both are part of what the model reads, and EOS is part of the score.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from prefopt.errors import InputError
from prefopt.vlm.pairs import VisionPair
from prefopt.vlm.scoring import sides


class Texts(NamedTuple):
    """A pair as the chat template writes it; the prompt ends where the sides begin."""

    prompt: str
    chosen: str
    rejected: str


class PairCollator:
    """Makes the plain duplicated batch: all prompts with their chosen completion, then all with the rejected.

    Of B pairs: `input_ids`, `attention_mask`, `completion_mask` (2B, length), padded on the right; the
    images' tensors twice over, in the rows' order; `tokens`, the completions' lengths, `ranks` and `mask`
    (B, 2), `item` (B,), and `p_chosen` (B,) if the pairs have it. A sequence over `max_length` loses the end
    of its completion; a prompt that leaves no room for one is an InputError, since its images cannot be cut.
    """

    def __init__(self, processor: ProcessorMixin, *, max_length: int | None = None):
        self.processor: Any = processor
        self.tokenizer: Any = self.processor.tokenizer
        self.max_length = max_length
        if self.tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no eos_token, so no completion could be ended; set one")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, examples: Sequence[VisionPair]) -> dict[str, Tensor]:
        texts = [render(self.processor, example) for example in examples]
        prompts, per_token, per_image = self._prompts(examples, [text.prompt for text in texts])
        rows = []
        for side in ("chosen", "rejected"):
            for example, text, prompt in zip(examples, texts, prompts, strict=True):
                ids = completion_ids(self.tokenizer, text.prompt, getattr(text, side))
                rows.append((prompt, self._fit(prompt, ids, example["where"])))
        self._check_sides_differ(rows, examples)
        lengths = [(len(prompt), len(completion)) for prompt, completion in rows]
        ids = [prompt + completion for prompt, completion in rows]
        batch = {
            "input_ids": _padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": _padded([[1] * (p + c) for p, c in lengths], 0),
            "completion_mask": _padded([[0] * p + [1] * c for p, c in lengths], 0),
            "item": torch.tensor([example["item"] for example in examples]),
            "tokens": sides(torch.tensor([completion for _, completion in lengths])),
            "ranks": torch.tensor([[1, 2]]).expand(len(examples), -1),
            "mask": torch.ones(len(examples), 2, dtype=torch.bool),
        }
        if examples[0]["p_chosen"] is not None:
            batch["p_chosen"] = torch.tensor([example["p_chosen"] for example in examples])
        for name, values in per_token.items():
            kinds = [value + [0] * c for value, (_, c) in zip(values * 2, lengths, strict=True)]
            batch[name] = _padded(kinds, 0)
        return batch | {name: torch.cat([value, value]) for name, value in per_image.items()}

    def _prompts(
        self, examples: Sequence[VisionPair], prompts: list[str]
    ) -> tuple[list[list[int]], dict[str, list[list[int]]], dict[str, Tensor]]:
        """Token ids of the prompts, what else the processor says of each token, and the images' tensors."""
        images = [example["images"] for example in examples]
        made = self.processor(
            text=prompts,
            images=images if any(images) else None,
            padding=True,
            add_special_tokens=False,  # the template has written its own; BOS is added below where it did not
            return_tensors="pt",
        )
        real = made.pop("attention_mask").bool()
        shape = made["input_ids"].shape
        token_wise = {name: value for name, value in made.items() if value.shape == shape}
        rows = {
            name: [row[keep].tolist() for row, keep in zip(value, real, strict=True)]
            for name, value in token_wise.items()
        }
        ids = rows.pop("input_ids")
        for row, prompt in enumerate(ids):
            if needs_bos(self.tokenizer, prompt):
                prompt.insert(0, self.tokenizer.bos_token_id)
                for values in rows.values():
                    values[row].insert(0, 0)
        return ids, rows, {name: value for name, value in made.items() if name not in token_wise}

    def _fit(self, prompt: list[int], completion: list[int], where: str) -> list[int]:
        """The completion, cut at its end to what `max_length` leaves beside the prompt."""
        if self.max_length is None:
            return completion
        if len(prompt) >= self.max_length:
            raise InputError(
                f"{where}: the prompt with its images takes {len(prompt)} tokens, and max_length "
                f"{self.max_length} leaves no room for a completion; raise --max_length or shorten the prompt"
            )
        return completion[: self.max_length - len(prompt)]

    def _check_sides_differ(self, rows: list[tuple[list[int], list[int]]], examples: Sequence[VisionPair]):
        for index, example in enumerate(examples):
            if rows[index] == rows[index + len(examples)]:
                raise InputError(
                    f"{example['where']}: chosen and rejected are the same {len(rows[index][1])} tokens "
                    f"within max_length {self.max_length}; raise --max_length or drop the row"
                )


def render(processor: ProcessorMixin, example: VisionPair) -> Texts:
    """The pair's texts by the processor's chat template; an image that it leaves out is an InputError."""
    template: Any = processor.apply_chat_template
    opened = template(example["prompt"], tokenize=False, add_generation_prompt=True)
    chosen = template([*example["prompt"], *example["chosen"]], tokenize=False)
    rejected = template([*example["prompt"], *example["rejected"]], tokenize=False)
    # Some templates open the answer with a tag that they leave out of a finished one.
    prompt = _common_start(_common_start(opened, chosen), rejected)
    token, images = getattr(processor, "image_token", None), len(example["images"])
    if token is not None and prompt.count(token) != images:
        raise InputError(
            f"{example['where']} has {images} images, but the chat template writes {prompt.count(token)} "
            f"placeholders {token!r} for them; use a processor whose template renders images"
        )
    return Texts(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def completion_ids(tokenizer: Any, prompt: str, completion: str) -> list[int]:
    """Token ids of a completion that follows a prompt, closed by EOS or by the template.

    In the prompt an image is one bare placeholder. The ids are what the tokenizer adds for the completion
    when it reads both together: a SentencePiece tokenizer begins a text that it reads alone with a space.
    """
    ids = _ids_after(tokenizer, prompt, completion)
    if not _is_closed(tokenizer, ids):
        ids = [*_ids_after(tokenizer, prompt, completion.rstrip()), tokenizer.eos_token_id]
    return ids


def needs_bos(tokenizer: Any, ids: list[int]) -> bool:
    """Whether the tokenizer would begin these ids with BOS and the template has not."""
    bos = tokenizer.bos_token_id
    return bos is not None and ids[:1] != [bos] and tokenizer("").input_ids[:1] == [bos]


def _common_start(one: str, other: str) -> str:
    end = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return one[:end]


def _ids_after(tokenizer: Any, prompt: str, completion: str) -> list[int]:
    texts = [prompt, prompt + completion, completion]
    before, both, alone = tokenizer(texts, add_special_tokens=False).input_ids
    return both[len(before) :] if both[: len(before)] == before else alone


def _is_closed(tokenizer: Any, ids: list[int]) -> bool:
    """Whether a special token ends the ids, but for white space, such as the line end after <|im_end|>."""
    known: Mapping[int, Any] = tokenizer.added_tokens_decoder
    for token in reversed(ids):
        if token in known and known[token].special:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
