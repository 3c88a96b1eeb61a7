"""Passes over blocks: each holds one model and does a block's share of its work.

A pass repeats nothing that is finished, whatever killed the run: what it computed is kept by content. Calls
of a model are batched within a block, so the batches, and with them the last bits of the results, are the
same for any number of processes.
"""

import gc
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from prefopt.loading import Lazy
from prefopt.progress import progress_bar

Model = TypeVar("Model")


class Pass(Protocol):
    """One model's part of a build."""

    name: str  # of no other pass
    unit: str
    identity: str  # of the model, with its settings
    calls: int  # of the model, in this run

    def todo(self, block: int) -> int:
        """How many units of a block are still to be computed; loads no model."""
        ...

    def work(self, block: int, bar: tqdm) -> None:
        """Compute and keep what a block still needs."""
        ...

    def release(self) -> None:
        """Free the model."""
        ...


class ModelPass(Generic[Model]):
    """The base of a pass: its model is loaded when it is first needed."""

    def __init__(self, lazy: Lazy[Model]):
        self.lazy, self.identity, self.calls = lazy, lazy.identity, 0
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """The loaded model."""
        if self._model is None:
            self._model = self.lazy.load()
        return self._model

    def release(self) -> None:
        """Free the model."""
        if self._model is not None:
            self._model = None
            free_memory()


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def processes() -> PartialState:
    """This process among all that build together; the first one may wait for the last for twelve hours."""
    # Without `cpu`, each of several processes on CPUs would take itself for the only one.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=12))


def from_first(state: PartialState, compute: Any) -> Any:
    """What `compute()` returns on the first process, on all of them."""
    return broadcast_object_list([compute() if state.is_main_process else None])[0]


def run_passes(
    passes: Sequence[Pass], blocks: int, state: PartialState, *, keep_resident: bool
) -> list[Mapping[str, int]]:
    """Run all passes, each process over its share of the blocks; the calls of every process, by pass.

    One model after the other, or, with `keep_resident`, all of them loaded and block after block.
    """
    mine = range(blocks)[state.process_index :: state.num_processes]
    for together in [passes] if keep_resident else [[each] for each in passes]:
        # Of models in turn, the work of a later one is known once the block's earlier ones are done.
        todo = None if keep_resident else {block: left for block in mine if (left := together[0].todo(block))}
        total = None if todo is None else sum(todo.values())
        quiet = not state.is_main_process or total == 0
        bars = [progress_bar(desc=each.name, unit=each.unit, total=total, disable=quiet) for each in together]
        for block in mine if todo is None else todo:
            for each, bar in zip(together, bars, strict=True):
                if todo is not None or each.todo(block):
                    each.work(block, bar)
        for each, bar in zip(together, bars, strict=True):
            bar.close()
            each.release()
    return gather_object([{each.name: each.calls for each in passes}])
