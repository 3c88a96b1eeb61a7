"""Reference scores kept on disk: one float32 per candidate per visit, computed once.

A reference score is a property of (item, visit), because the draws are. It is therefore shared by every epoch
that repeats a visit, every beta and every loss of a sweep over the same examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from prefopt.adapters import POLICY, adapter_layers
from prefopt.adapters import reference as adapters_off
from prefopt.records import InputError
from prefopt.store import TensorStore, tensors_key

if TYPE_CHECKING:
    from prefopt.trainer import PreferenceTrainer

BLOCK = 64  # items of one entry: few enough to lose little when killed, many enough for small indices


class CachedReference(Dataset):
    """A dataset whose examples carry `reference`, their stored reference scores of shape (k,)."""

    def __init__(self, examples: Any, store: TensorStore):
        self.examples, self.store = examples, store
        self.where = getattr(examples, "where", str)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index_and_visit: tuple[int, int]) -> dict[str, Any]:
        index, visit = index_and_visit
        scores = self.store[_key(index // BLOCK, visit)]["scores"][index % BLOCK]
        return {**self.examples[index, visit], "reference": scores}


def with_cached_reference(trainer: PreferenceTrainer, visits: int) -> CachedReference:
    """The trainer's examples with the reference scores of the first `visits` visits, computed if not stored.

    Call it before training: without adapters, the model's present weights are the reference.
    """
    examples, args = trainer.train_dataset, trainer.args
    if not hasattr(examples, "identity"):
        raise InputError(
            f"--reference cache: {type(examples).__name__} does not say what its examples depend on"
        )
    state = {
        name.replace(".base_layer", ""): value  # so that a sweep over the adapted layers shares the scores
        for name, value in trainer.model.state_dict().items()
        if f".{POLICY}." not in name
    }
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    described = getattr(trainer.model, "identity", {})  # what scores depend on besides the weights
    identity = {
        **examples.identity,
        **described,
        "reference weights": tensors_key(state),
        "precision": precision,
    }
    folder = Path(args.cache_dir or Path(args.output_dir, "cache"), "reference")
    store = TensorStore(folder, identity)
    blocks = [(block, visit) for visit in range(visits) for block in range(-(-len(examples) // BLOCK))]
    # Shares first: what is missing changes while other processes write.
    mine = blocks[args.process_index :: args.world_size]
    _fill(trainer, store, [(block, visit) for block, visit in mine if _key(block, visit) not in store])
    trainer.accelerator.wait_for_everyone()
    store.refresh()
    return CachedReference(examples, store)


def _fill(trainer: PreferenceTrainer, store: TensorStore, blocks: list[tuple[int, int]]) -> None:
    if not blocks:
        return
    batches = [
        batch for block in blocks for batch in _batches(block, len(trainer.train_dataset), trainer.args)
    ]
    loader = DataLoader(
        trainer.train_dataset,
        batch_sampler=batches,
        collate_fn=trainer.data_collator,
        num_workers=trainer.args.dataloader_num_workers,
    )
    model, finished = trainer.model, iter(blocks)
    source = adapters_off(model) if adapter_layers(model) else nullcontext(model.eval())
    rows: list[torch.Tensor] = []
    bar = tqdm(zip(batches, loader, strict=True), total=len(batches), desc="reference scores", unit="batch")
    with torch.no_grad(), source as reference_model, trainer.accelerator.autocast():
        for batch, inputs in bar:
            scores = trainer.score(reference_model, trainer._prepare_inputs(inputs))
            rows.append(scores.float().cpu())
            last = batch[-1][0] + 1
            if last % BLOCK == 0 or last == len(trainer.train_dataset):
                store.write({_key(*next(finished)): {"scores": torch.cat(rows)}})
                rows = []


def _batches(block_and_visit: tuple[int, int], length: int, args: Any) -> Iterator[list[tuple[int, int]]]:
    block, visit = block_and_visit
    items = range(block * BLOCK, min((block + 1) * BLOCK, length))
    for start in range(0, len(items), args.train_batch_size):
        yield [(item, visit) for item in items[start : start + args.train_batch_size]]


def _key(block: int, visit: int) -> str:
    return f"{visit}-{block}"
