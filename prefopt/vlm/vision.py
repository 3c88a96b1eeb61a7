"""Images of a batch for a vision-language model: its inputs put together, and its features computed once.

A *set* is the images of one prompt, as the processor made them: a batch of one. What the vision tower and
the projector make of a set is one tensor for the language model, and one for each layer that takes more.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from prefopt.progress import Encoding
from prefopt.store import TensorStore, tensors_key
from prefopt.vlm.chat import Encoder
from prefopt.vlm.models import language_model_name

ImageSet = Mapping[str, Tensor]
SHARD = 64  # sets in a file


def collate(sets: Sequence[ImageSet]) -> dict[str, Tensor]:
    """One batch of several batches of one; images with fewer tiles than others are padded with zeros.

    Every family ignores such tiles: it knows the image's size, or that a tile of zeros is padding.
    """
    batch = {}
    for name in sets[0] if sets else ():
        values = [one[name] for one in sets]
        shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
        batch[name] = torch.cat([_grown(value, shape) for value in values])
    return batch


@torch.no_grad()
def encode_images(
    model: nn.Module, sets: Sequence[ImageSet], counts: Sequence[int]
) -> list[dict[str, Tensor]]:
    """What the language model reads of each set of images; `counts` says how many a set has.

    Of each `pooler_output` (tokens, width) and, if the model has such, `deepstack_features` (layers, tokens,
    width).
    """
    encoder: Any = extract_model_from_parallel(model)
    outputs = encoder.get_image_features(**collate(sets), return_dict=True)
    layers = getattr(outputs, "deepstack_features", None) or []
    pooled = _by_set(outputs.pooler_output, counts)
    deeper = [_by_set(layer, counts) for layer in layers]
    return [
        {"pooler_output": one} | ({"deepstack_features": torch.stack(list(more))} if more else {})
        for one, *more in zip(pooled, *deeper, strict=True)
    ]


def cache_features(
    model: PreTrainedModel,
    examples: Any,
    encode: Encoder,
    *,
    folder: Path,
    batch_size: int,
    workers: int,
) -> TensorStore:
    """What `encode_images` makes of the examples' images, by `image_key`, computed if it is not stored.

    Each process computes its share.
    """
    outside = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(f"{language_model_name(model)}.")
    }
    identity = {"vision weights": tensors_key(outside), "dtype": str(model.dtype), **encode.identity}
    store = TensorStore(folder, identity)
    keys = examples.image_keys()
    first = {key: index for index, key in reversed(list(enumerate(keys))) if key}
    state = PartialState()
    mine = sorted(first)[state.process_index :: state.num_processes]
    missing = [first[key] for key in store.missing(mine)]
    batches = [
        [(index, 0) for index in missing[n : n + batch_size]] for n in range(0, len(missing), batch_size)
    ]
    entries: dict[str, Mapping[str, Tensor]] = {}
    loader = DataLoader(examples, batch_sampler=batches, num_workers=workers, collate_fn=_Prompts(encode))
    with Encoding("images", len(missing), store) as encoding:
        for number, batch in enumerate(loader, start=1):
            sets = [{n: v.to(model.device) for n, v in images.items()} for _, images, _ in batch]
            features = encode_images(model, sets, [count for *_, count in batch])
            entries |= {
                key: {name: value.cpu() for name, value in found.items()}
                for (key, *_), found in zip(batch, features, strict=True)
            }
            if len(entries) >= SHARD or number == len(batches):
                encoding.write(entries, len(entries))
                entries = {}
    state.wait_for_everyone()
    store.refresh()
    return store


@dataclass
class _Prompts:
    """Of examples, their image keys, sets of images and numbers of images."""

    encode: Encoder

    def __call__(self, examples: Sequence[Any]) -> list[tuple[str, dict[str, Tensor], int]]:
        return [(e["image_key"], self.encode(e).prompt.images, len(e["images"])) for e in examples]


def image_outputs(features: Sequence[Mapping[str, Tensor]]) -> Any:
    """The features of sets of images, in the form in which a model's forward takes them."""
    outputs = SimpleNamespace(pooler_output=[one["pooler_output"] for one in features])
    if "deepstack_features" in features[0]:
        layers = zip(*(one["deepstack_features"] for one in features), strict=True)
        outputs.deepstack_features = [list(layer) for layer in layers]
    return outputs


def _by_set(outputs: Sequence[Tensor], counts: Sequence[int]) -> Iterator[Tensor]:
    """One tensor a set; a model has an output for each image, or for each set."""
    if len(outputs) == len(counts):
        yield from outputs
        return
    place = iter(outputs)
    for count in counts:
        yield torch.cat([next(place) for _ in range(count)])


def _grown(value: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with zeros behind, so that it has this shape after the first dimension."""
    missing = [wanted - found for wanted, found in zip(shape, value.shape[1:], strict=True)]
    return pad(value, [end for size in reversed(missing) for end in (0, size)]) if any(missing) else value
