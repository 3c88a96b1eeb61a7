"""The reference that a policy is compared with: its adapters off, a frozen copy, or cached scores.

With adapters the reference is the same module without them. It costs no second copy of the weights and starts
exactly equal to the policy, so the first loss of DPO is ln 2 to the last digit, in every precision.

A reference score is a property of (item, visit), because the draws are. One float32 per candidate per visit,
computed once, is therefore shared by every epoch that repeats a visit, every beta and every loss of a sweep
over the same examples.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prefopt.adapters import POLICY, REFERENCE, adapter_layers, reference_scales
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.progress import progress_bar
from prefopt.store import TensorStore, tensors_key
from prefopt.visits import Identified, Wrapped

BLOCK = 64  # items of one entry: few enough to lose little when killed, many enough for small indices


# The model


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model as it is now, which no training changes: the reference of full fine-tuning."""
    return deepcopy(model).requires_grad_(False).eval()


@contextmanager
def reference_model(policy: nn.Module, frozen: nn.Module | None = None) -> Iterator[nn.Module]:
    """The model that the policy is compared with: `frozen`, or the policy without its adapters.

    A policy without adapters and without a frozen copy has no reference: an InputError.
    """
    if frozen is not None:
        yield frozen
        return
    if not adapter_layers(policy):
        raise InputError(
            "this objective compares with a reference, and the model has no adapters to switch off: give the "
            "trainer reference_model=frozen_copy(model), or take an objective without one, such as cpo"
        )
    with adapters_off(policy) as model:
        yield model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """The model with adapters off (or the one it started from on), without dropout.

    Everything is put back on leaving, after an error too: which adapter is active, what requires a gradient,
    which modules are in training mode.
    """
    layers = adapter_layers(model)
    training = [module for module in model.modules() if module.training]
    requires_grad = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    active = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    try:
        model.eval()
        for layer in layers:
            if any(REFERENCE in getattr(layer, name) for name in layer.adapter_layer_names):
                layer.set_adapter([REFERENCE])
            else:
                layer.enable_adapters(False)
        yield model
    finally:
        for layer, names, disabled in active:
            layer.set_adapter(names)
            layer.enable_adapters(not disabled)
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)
        for module in training:
            module.training = True


# Cached scores


class CachedReference(Wrapped):
    """A dataset whose examples carry `reference`, their stored reference scores of shape (k,).

    `items` are those whose scores are stored (default: all), in the order of the stored blocks.
    """

    def __init__(self, examples: Any, store: TensorStore, items: Sequence[int] | None = None):
        super().__init__(examples)
        self.store = store
        self.items = range(len(examples)) if items is None else items
        self._place = None if items is None else {item: place for place, item in enumerate(items)}

    def __getitem__(self, index_and_visit: tuple[int, int]) -> dict[str, Any]:
        index, visit = index_and_visit
        block, place = divmod(index if self._place is None else self._place[index], BLOCK)
        scores = self.store[_key(self.block(block), visit)]["scores"][place]
        return {**self.examples[index, visit], "reference": scores}

    def block(self, number: int) -> Sequence[int]:
        """The items of a block."""
        return self.items[number * BLOCK : (number + 1) * BLOCK]

    def blocks(self, visits: int) -> list[tuple[Sequence[int], int]]:
        """All blocks of each visit."""
        count = -(-len(self.items) // BLOCK)
        return [(self.block(number), visit) for visit in range(visits) for number in range(count)]


def cache_reference(
    examples: Any,
    model: nn.Module,
    score: Callable[[Mapping[str, Any]], Tensor],
    *,
    folder: Path,
    visits: int,
    precision: str,
    loader: Mapping[str, Any],
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> CachedReference:
    """The examples with the reference scores of their first `visits` visits, computed if not stored.

    `score(batch)` gives the reference's (batch, k); `loader` holds DataLoader's options. `rows` are the
    examples that the run reads (default: all). Each reference and setting has a folder of its own in
    `folder`. Examples that do not say what they depend on are an InputError.
    """
    if not isinstance(examples, Identified):
        raise InputError(
            "--reference cache: the examples do not say what they depend on; give their dataset a property "
            "`identity`, texts by name that change when the examples do, or take --reference live"
        )
    weights = {
        name.replace(".base_layer", ""): value  # so that a sweep over the adapted layers shares the scores
        for name, value in model.state_dict().items()
        if f".{POLICY}." not in name
    }
    identity = {
        "reference weights": tensors_key(weights),
        "reference adapter's scales": content_key(json.dumps(reference_scales(model), sort_keys=True)),
        "precision": precision,
    }
    for part in (model, loader.get("collate_fn")):
        if isinstance(part, Identified):
            identity = {**part.identity, **identity}
    identity = {**examples.identity, **identity}
    own = content_key(json.dumps(identity, sort_keys=True))[:16]
    cached = CachedReference(examples, TensorStore(folder / own, identity), rows)
    state = PartialState()
    # Shares first: what is missing changes while other processes write.
    mine = cached.blocks(visits)[state.process_index :: state.num_processes]
    missing = [(items, visit) for items, visit in mine if _key(items, visit) not in cached.store]
    if missing:
        _fill(cached, missing, score, loader, batch_size)
    state.wait_for_everyone()
    cached.store.refresh()
    return cached


def _fill(
    cached: CachedReference,
    blocks: list[tuple[Sequence[int], int]],
    score: Callable[[Mapping[str, Any]], Tensor],
    loader: Mapping[str, Any],
    batch_size: int,
) -> None:
    starts = [(block, start) for block in blocks for start in range(0, len(block[0]), batch_size)]
    batches = [
        [(item, visit) for item in items[start : start + batch_size]] for (items, visit), start in starts
    ]
    loaded = DataLoader(cached.examples, batch_sampler=batches, **loader)
    rows: list[Tensor] = []
    bar = progress_bar(total=len(batches), desc="reference scores", unit="batch")
    for ((items, visit), start), inputs in zip(starts, loaded, strict=True):
        rows.append(score(inputs).float().cpu())
        if start + batch_size >= len(items):
            cached.store.write({_key(items, visit): {"scores": torch.cat(rows)}})
            rows = []
        bar.update(1)
    bar.close()


def _key(items: Sequence[int], visit: int) -> str:
    return content_key(f"visit {visit} of {list(items)}")[:32]
