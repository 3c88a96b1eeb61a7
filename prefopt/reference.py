"""The reference that a policy is compared with: its adapters off, a frozen copy, or cached scores.

With adapters the reference is the same module without them. It costs no second copy of the weights and starts
exactly equal to the policy, so the first loss of DPO is ln 2 to the last digit, in every precision.

A reference score is a property of (item, visit), because the draws are. One float32 per candidate per visit,
computed once, is therefore shared by every epoch that repeats a visit, every beta and every loss of a sweep
over the same examples.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from prefopt.adapters import POLICY, REFERENCE, adapter_layers
from prefopt.errors import InputError
from prefopt.store import TensorStore, tensors_key
from prefopt.visits import Identified, VisitDataset, where

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


class CachedReference(VisitDataset):
    """A dataset whose examples carry `reference`, their stored reference scores of shape (k,)."""

    def __init__(self, examples: Any, store: TensorStore):
        self.examples, self.store = examples, store

    def where(self, index: int) -> str:
        """What an error calls the example `index`."""
        return where(self.examples, index)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index_and_visit: tuple[int, int]) -> dict[str, Any]:
        index, visit = index_and_visit
        scores = self.store[_key(index // BLOCK, visit)]["scores"][index % BLOCK]
        return {**self.examples[index, visit], "reference": scores}


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
) -> CachedReference:
    """The examples with the reference scores of their first `visits` visits, computed if not stored.

    `score(batch)` gives the reference's (batch, k); `loader` holds DataLoader's options. Examples that do not
    say what they depend on are an InputError.
    """
    count = len(examples)
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
    identity = {"reference weights": tensors_key(weights), "precision": precision}
    for part in (model, loader.get("collate_fn")):
        if isinstance(part, Identified):
            identity = {**part.identity, **identity}
    store = TensorStore(folder, {**examples.identity, **identity})
    blocks = [(block, visit) for visit in range(visits) for block in range(-(-count // BLOCK))]
    state = PartialState()
    # Shares first: what is missing changes while other processes write.
    mine = blocks[state.process_index :: state.num_processes]
    missing = [(block, visit) for block, visit in mine if _key(block, visit) not in store]
    if missing:
        _fill(examples, store, missing, score, loader, batch_size)
    state.wait_for_everyone()
    store.refresh()
    return CachedReference(examples, store)


def _fill(
    examples: Any,
    store: TensorStore,
    blocks: list[tuple[int, int]],
    score: Callable[[Mapping[str, Any]], Tensor],
    loader: Mapping[str, Any],
    batch_size: int,
) -> None:
    batches = [batch for block in blocks for batch in _batches(block, len(examples), batch_size)]
    loaded = DataLoader(examples, batch_sampler=batches, **loader)
    finished, rows = iter(blocks), list[Tensor]()
    bar = tqdm(zip(batches, loaded, strict=True), total=len(batches), desc="reference scores", unit="batch")
    for batch, inputs in bar:
        rows.append(score(inputs).float().cpu())
        last = batch[-1][0] + 1
        if last % BLOCK == 0 or last == len(examples):
            store.write({_key(*next(finished)): {"scores": torch.cat(rows)}})
            rows = []


def _batches(
    block_and_visit: tuple[int, int], length: int, batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    block, visit = block_and_visit
    items = range(block * BLOCK, min((block + 1) * BLOCK, length))
    for start in range(0, len(items), batch_size):
        yield [(item, visit) for item in items[start : start + batch_size]]


def _key(block: int, visit: int) -> str:
    return f"{visit}-{block}"
