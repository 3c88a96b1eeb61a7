"""Answers of a vision-language model: greedy, or sampled so that each is a function of its seed and item.

A prompt and its images are read once, however many answers it gets: what that one pass left in the cache is
repeated for them. Positions, masks and the cache are those of transformers' `generate`; the loop is ours.

A token is the first to arrive in a race: argmax of p_j / e_j, with e_j independent and exponential, is j with
probability p_j. Other neighbours in the batch change the last bits of the logits. The race then ends
otherwise about as often as the two distributions differ, where a threshold in the cumulated vocabulary would
move with every token before it, and an answer with it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, ProcessorMixin

from prefopt.draws import ANSWER, generator
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.vlm.chat import Prompt, encode_prompt
from prefopt.vlm.vision import collate


@dataclass(frozen=True)
class Request:
    """A prompt to answer: messages of blocks, with an image block for each image.

    `item` names the request in errors, and is what its randomness depends on: requests of one item and prompt
    get the same answers. An integer in [0, 2^64), or a text such as a content key.
    """

    images: Sequence[Image.Image]
    prompt: Sequence[dict]
    item: int | str = 0


@dataclass(frozen=True)
class Generated:
    """An answer: its text without special tokens and the white space around it, and its length."""

    text: str
    tokens: int  # generated, the one that ended it included
    finished: bool  # it ended by itself, not at its longest length


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest one at temperature 0, where `top_p` has no effect, else by chance.

    `top_p` keeps the fewest likeliest tokens whose probabilities sum to it.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature >= 0 and 0 < self.top_p <= 1):
            raise InputError(
                f"temperature {self.temperature} and top_p {self.top_p}: the first is at least 0, the second "
                "above 0 and at most 1"
            )


def generate(
    model: nn.Module,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    answers: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> list[list[Generated]]:
    """`answers` answers to each request; the n-th is a function of the request, the seed and n alone.

    The model is in evaluation mode, with or without adapters; `batch_size` requests are answered at a time.
    Nothing but the tokens that end an answer is taken from its generation_config: no penalties, no top_k. An
    answer also ends, unfinished, where the model's positions do. InputError for a prompt that leaves no room
    for an answer, for several answers at temperature 0, and for logits that are no numbers.
    """
    sampling = Sampling(temperature, top_p)
    if answers < 1 or max_new_tokens < 1 or batch_size < 1:
        raise InputError(
            f"answers {answers}, max_new_tokens {max_new_tokens}, batch_size {batch_size}: each is at least 1"
        )
    if answers > 1 and not temperature:
        raise InputError(f"{answers} answers at temperature 0 would all be the same; ask for 1, or sample")
    base = _decoder_only(model)
    ends = end_tokens(base, processor)
    generated: list[list[Generated]] = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        prompts = [_prompt(processor, request) for request in batch]
        drafts = [
            _Draft(generator(seed, ANSWER, _number(request.item), answer), room)
            for request, prompt in zip(batch, prompts, strict=True)
            for room in [_room(base, prompt, request, max_new_tokens)]
            for answer in range(answers)
        ]
        _write(base, prompts, _Loop(drafts, ends, sampling))
        texts = [_finished(processor, draft, ends) for draft in drafts]
        generated += [texts[at : at + answers] for at in range(0, len(texts), answers)]
    return generated


def sample_token(logits: np.ndarray, chance: np.random.Generator, sampling: Sampling) -> int:
    """A token by its logits (vocabulary,), in float64: takes one number a logit from `chance`."""
    p = np.exp((logits.astype(np.float64) - float(logits.max())) / sampling.temperature)
    if sampling.top_p < 1:
        p = nucleus(p / p.sum(), sampling.top_p)
    times = chance.standard_exponential(len(p))
    return int((p / np.maximum(times, np.finfo(np.float64).tiny)).argmax())


def nucleus(p: np.ndarray, top_p: float) -> np.ndarray:
    """Probabilities (vocabulary,) with 0 in place of all but the fewest likeliest that sum to `top_p`."""
    # All below this together hold less than 1 - top_p: only the others need sorting.
    likely = np.flatnonzero(p >= (1 - top_p) / len(p))
    order = likely[np.argsort(-p[likely], kind="stable")]
    kept = order[: int(np.searchsorted(p[order].cumsum(), top_p)) + 1]
    cut = np.zeros_like(p)
    cut[kept] = p[kept]
    return cut


def end_tokens(model: Any, processor: Any) -> frozenset[int]:
    """The tokens that end an answer: the model's, by its generation_config, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), processor.tokenizer.eos_token_id} - {None}
    if not ends:
        raise InputError("neither generation_config nor tokenizer names an eos_token, so no answer could end")
    return frozenset(ends)


@dataclass
class _Draft:
    """An answer in the making."""

    chance: np.random.Generator
    room: int  # the most tokens it may have
    tokens: list[int] = field(default_factory=list)


class _Loop:
    """The loop that transformers' `generate` calls with what it has prepared; it fills the drafts.

    Drafts come in the order of the rows, equally many for each. The row of an answer that ended is dropped.
    """

    def __init__(self, drafts: Sequence[_Draft], ends: frozenset[int], sampling: Sampling):
        self.drafts, self.ends, self.sampling = drafts, ends, sampling

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: object,
        stopping_criteria: object,
        generation_config: object,
        **state: Any,
    ) -> Tensor:
        drafts, count = list(self.drafts), len(input_ids)
        rows = np.arange(count).repeat(len(drafts) // count)  # of each draft
        for step in itertools.count():
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1 if step else None, is_first_iteration=not step, **state
            )
            output = model(**inputs, return_dict=True)
            state = model._update_model_kwargs_for_generation(output, state)
            tokens = self._next(output.logits[:, -1].float(), rows, drafts)
            for draft, token in zip(drafts, tokens, strict=True):
                draft.tokens.append(token)
            going = [number for number, draft in enumerate(drafts) if not self._ended(draft)]
            if not going:
                break
            kept = torch.as_tensor(rows[going], device=input_ids.device)
            following = input_ids.new_tensor([[tokens[number]] for number in going])
            input_ids = torch.cat([input_ids[kept], following], dim=1)
            if not step or len(going) < count:
                state = _of_rows(state, kept, (count, input_ids.shape[1]))
            drafts, count, rows = [drafts[number] for number in going], len(going), np.arange(len(going))
        return input_ids

    def _ended(self, draft: _Draft) -> bool:
        return draft.tokens[-1] in self.ends or len(draft.tokens) == draft.room

    def _next(self, logits: Tensor, rows: np.ndarray, drafts: Sequence[_Draft]) -> list[int]:
        """The next token of each draft, by the logits (rows, vocabulary) of its row."""
        if not logits.amax(-1).isfinite().all():
            raise InputError("the model's logits are no numbers; load it in bfloat16 or float32")
        if not self.sampling.temperature:
            return logits.argmax(-1).cpu()[rows].tolist()
        on_cpu = logits.cpu().numpy()
        return [
            sample_token(on_cpu[row], draft.chance, self.sampling)
            for row, draft in zip(rows, drafts, strict=True)
        ]


def _of_rows(state: dict[str, Any], rows: Tensor, shape: tuple[int, int]) -> dict[str, Any]:
    """These rows of the cache and of all that has a value for each token, (..., *shape); no images."""
    state["past_key_values"].reorder_cache(rows)
    return {
        name: value.index_select(-2, rows) if isinstance(value, Tensor) else value
        for name, value in state.items()
        if not isinstance(value, Tensor) or value.shape[-2:] == shape
    }


def _write(model: Any, prompts: Sequence[Prompt], loop: _Loop) -> None:
    """Fill the loop's drafts: one pass over all prompts, padded on the left, then one a token."""
    length, ends = max(len(prompt.ids) for prompt in prompts), sorted(loop.ends)
    fill = ends[0]  # a token of text: an image's would ask for pixels
    names = {name for prompt in prompts for name in prompt.kinds}
    inputs = {
        "input_ids": _padded([prompt.ids for prompt in prompts], length, fill),
        "attention_mask": _padded([[1] * len(prompt.ids) for prompt in prompts], length, 0),
        **{name: _padded([prompt.kinds.get(name, []) for prompt in prompts], length, 0) for name in names},
        **collate([prompt.images for prompt in prompts if prompt.images]),
    }
    config = GenerationConfig(
        max_length=length + max(draft.room for draft in loop.drafts),
        eos_token_id=ends,
        pad_token_id=fill,
        do_sample=True,
        num_beams=1,
        num_return_sequences=1,
    )
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    model.generate(**moved, generation_config=config, custom_generate=loop)


def _decoder_only(model: nn.Module) -> Any:
    """The transformers model inside of peft's, whose layers hold the adapters."""
    if model.training:
        raise ValueError("the model is in training mode, with its dropout: call model.eval() first")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config.is_encoder_decoder:
        raise InputError(f"{type(base).__name__} has an encoder apart from its decoder; name another model")
    return base


def _prompt(processor: Any, request: Request) -> Prompt:
    """A request's tokens and tensors; InputError if the template does not show its images."""
    text = processor.apply_chat_template(list(request.prompt), tokenize=False, add_generation_prompt=True)
    token = getattr(processor, "image_token", None)
    if token is not None and text.count(token) != len(request.images):
        raise InputError(
            f"item {request.item} has {len(request.images)} images, but the chat template writes "
            f"{text.count(token)} placeholders {token!r} for them; give each image a block of type 'image'"
        )
    return encode_prompt(processor, text, request.images)


def _room(model: Any, prompt: Prompt, request: Request, most: int) -> int:
    """The most tokens that an answer may have."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        return most
    if len(prompt.ids) >= limit:
        raise InputError(
            f"item {request.item}: the prompt takes {len(prompt.ids)} tokens, and the model reads {limit}; "
            "shorten the prompt, or make its images smaller"
        )
    return min(most, limit - len(prompt.ids))


def _finished(processor: Any, draft: _Draft, ends: frozenset[int]) -> Generated:
    finished = draft.tokens[-1] in ends
    said = draft.tokens[:-1] if finished else draft.tokens  # not every model's end is a special token
    text = processor.tokenizer.decode(said, skip_special_tokens=True)
    return Generated(text.strip(), len(draft.tokens), finished)


def _number(item: int | str) -> int:
    """An item's number for the generator."""
    return item if isinstance(item, int) else int(content_key(item)[:16], 16)


def _padded(rows: Sequence[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([[value] * (length - len(row)) + row for row in rows])
