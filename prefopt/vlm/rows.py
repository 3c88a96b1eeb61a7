"""Several completions of one prompt in one row: the prompt is read once, then all completions in one pass.

The keys and values of the shared prefix are kept; the suffixes follow in one row, each at the positions it
would have alone, under a mask that lets it attend to the prefix and to itself. Nothing is computed twice.
Shorter prefixes are padded on the right, where causal attention never looks and the second mask hides it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from prefopt.vlm.vision import collate

# The families whose shared rows are compared with plain forward passes, in test_shared_prefix.py and
# test_scoring.py. Another one might add to attention what its config does not tell.
COMPARED = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm")
# One entry a token, where an image's tensors have other shapes.
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


class SharedPrefix(NamedTuple):
    """Texts about one image that begin alike: their common prefix, and the rest of each."""

    prefix: Tensor  # (p,), with all of the image's tokens
    kinds: Tensor  # (p,), 1 at the image's tokens
    suffixes: list[Tensor]  # of (s,), s >= 1
    images: dict[str, Tensor]  # the model's other inputs, a batch of one


class Suffixes(NamedTuple):
    """The suffixes of n rows, one after another."""

    tokens: Tensor  # (n, s)
    owner: Tensor  # (n, s), the number of the suffix that a token belongs to; -1 on padding
    offset: Tensor  # (n, s), the distance from its suffix's first token
    last: list[Tensor]  # of each row, the places of its suffixes' last tokens


def unshareable(config: PretrainedConfig) -> str | None:
    """Why a model of this config cannot read several completions in one row; None if it can."""
    text: Any = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder apart from its decoder"
    layers = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    if others := sorted(set(layers) - {"full_attention", "attention"}):
        return f"some of its layers are {' and '.join(others)}"
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return f"its attention slides over {text.sliding_window} tokens"
    if text._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {text._attn_implementation}, which takes no mask of ours; sdpa does"
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"its {rope} positions change with a text's length"
    if config.model_type not in COMPARED:
        return f"shared rows were never compared with plain forward passes on {config.model_type}"
    return None


def split_prefix(texts: Sequence[Mapping[str, Tensor]], image_token: int) -> SharedPrefix:
    """Split a processor's outputs for texts about one image, each a batch of one, where the texts differ.

    The image has to come before that place.
    """
    tokens = [text["input_ids"][0] for text in texts]
    shortest = min(len(one) for one in tokens)
    ahead = torch.stack([one[: shortest - 1] for one in tokens])
    length = int((ahead == ahead[0]).all(0).long().cumprod(0).sum())
    return SharedPrefix(
        prefix=tokens[0][:length],
        kinds=(tokens[0][:length] == image_token).long(),
        suffixes=[one[length:] for one in tokens],
        images={name: value for name, value in texts[0].items() if name not in PER_TOKEN},
    )


@torch.no_grad()
def next_token_logits(model: PreTrainedModel, rows: Sequence[SharedPrefix]) -> list[Tensor]:
    """The next token's logits after each suffix: of each row (suffixes, vocabulary), float32.

    The rows share two forward passes; no row's logits depend on the other rows.
    """
    device = model.device
    body: Any = model.base_model  # without the head, so that only what is read becomes logits
    lengths = torch.tensor([len(row.prefix) for row in rows], device=device)
    # Padding is a token of text: an image's would ask for pixels.
    fill = int(rows[0].suffixes[0][-1])
    tokens = pad_sequence([row.prefix for row in rows], batch_first=True, padding_value=fill).to(device)
    images = {name: value.to(device) for name, value in collate([row.images for row in rows]).items()}
    positions, following = _positions(body, tokens, lengths, rows, images)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    body(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, **images)

    suffixes = _suffixes(rows, fill, device)
    hidden = body(
        input_ids=suffixes.tokens,
        # On three axes the tokens of text are at equal places.
        position_ids=(following[:, None] + suffixes.offset).expand(*positions.shape[:-1], -1),
        attention_mask=_mask(suffixes, lengths, tokens.shape[1], model),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    head: Any = model.get_output_embeddings()
    return [head(hidden[row, ends]).float() for row, ends in enumerate(suffixes.last)]


def _positions(
    body: Any, tokens: Tensor, lengths: Tensor, rows: Sequence[SharedPrefix], images: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Positions of the prefixes, (n, p) or with three axes (3, n, p), and (n,) the next position of each."""
    n, width = tokens.shape
    if not hasattr(body, "get_rope_index"):
        return torch.arange(width, device=tokens.device).expand(n, -1), lengths
    kinds = pad_sequence([row.kinds for row in rows], batch_first=True).to(tokens.device)
    real = torch.arange(width, device=tokens.device) < lengths[:, None]
    positions, _ = body.get_rope_index(
        tokens, mm_token_type_ids=kinds, image_grid_thw=images["image_grid_thw"], attention_mask=real
    )
    return positions, positions.amax((0, 2)) + 1  # an image takes fewer positions than it has tokens


def _suffixes(rows: Sequence[SharedPrefix], fill: int, device: torch.device) -> Suffixes:
    """All suffixes of each row behind one another, the rows padded on the right."""
    sizes = [torch.tensor([len(suffix) for suffix in row.suffixes]) for row in rows]
    tokens = [torch.cat(row.suffixes) for row in rows]
    owner = [torch.arange(len(size)).repeat_interleave(size) for size in sizes]
    offset = [torch.cat([torch.arange(length) for length in size.tolist()]) for size in sizes]
    return Suffixes(
        tokens=pad_sequence(tokens, batch_first=True, padding_value=fill).to(device),
        owner=pad_sequence(owner, batch_first=True, padding_value=-1).to(device),
        offset=pad_sequence(offset, batch_first=True).to(device),
        last=[(size.cumsum(0) - 1).to(device) for size in sizes],
    )


def _mask(suffixes: Suffixes, lengths: Tensor, width: int, model: PreTrainedModel) -> Tensor:
    """The attention mask, (n, 1, s, width + s): a token sees its row's prefix, and its own suffix so far."""
    size = suffixes.tokens.shape[1]
    prefix = torch.arange(width, device=lengths.device) < lengths[:, None]
    own = (suffixes.owner[:, :, None] == suffixes.owner[:, None, :]) & torch.ones(
        size, size, dtype=torch.bool, device=lengths.device
    ).tril()
    seen = torch.cat([prefix[:, None].expand(-1, size, -1), own], dim=-1)[:, None]
    if model.config.get_text_config(decoder=True)._attn_implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(
        ~seen, torch.finfo(model.dtype).min
    )
