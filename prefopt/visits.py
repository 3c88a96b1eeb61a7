"""What the trainer reads examples from: by (index, visit), or any other dataset by index alone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate

from prefopt.errors import InputError


class VisitDataset(Dataset, ABC):
    """A dataset whose examples depend on the visit, too: `dataset[index, visit]`.

    `visit` counts how often an item has been read before. An example is a pure function of both, so random
    numbers in it come from `draws.generator`.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index_and_visit: tuple[int, int]) -> Any: ...


@runtime_checkable
class Indexed(Protocol):
    """A dataset that is read by index: torch's, datasets', or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Identified(Protocol):
    """Examples, what makes batches of them, or a model: each says what its values depend on but weights."""

    @property
    def identity(self) -> Mapping[str, str]: ...


@runtime_checkable
class Located(Protocol):
    """Examples that have names for error messages."""

    def where(self, index: int, /) -> str: ...


def where(examples: object, item: int) -> str:
    """What an error calls an item of these examples."""
    return examples.where(item) if isinstance(examples, Located) else f"item {item}"


class Wrapped(VisitDataset):
    """The examples of another dataset, with their number and their names for errors."""

    def __init__(self, examples: Any):
        self.examples = examples

    def where(self, index: int) -> str:
        """What an error calls the example `index`."""
        return where(self.examples, index)

    def __len__(self) -> int:
        return len(self.examples)


class ByIndex(Wrapped):
    """Any dataset whose examples are mappings, read by index; the examples get `item` and `visit`.

    `item` is the index, unless the dataset has an `item` of its own.
    """

    def __init__(self, examples: Indexed):
        super().__init__(examples)
        if isinstance(examples, Identified):
            self.identity = examples.identity

    def __getitem__(self, index_and_visit: tuple[int, int]) -> dict[str, Any]:
        index, visit = index_and_visit
        example = self.examples[index]
        if not isinstance(example, Mapping):
            raise InputError(
                f"example {index} of {type(self.examples).__name__} is a {type(example).__name__}; return "
                "a dict with the inputs of `score` and `ranks` (k,), 1 for the best candidate"
            )
        return {"item": index, **example, "visit": visit}


def by_visit(dataset: Any, name: str) -> VisitDataset:
    """The dataset, to be read by (index, visit): itself, or by index.

    InputError, which calls it `name`, for a dataset that is missing, is empty or cannot be read by index.
    """
    kind = type(dataset).__name__
    if dataset is None:
        raise InputError(f"{name} is missing: give the trainer a dataset whose examples are dicts")
    if isinstance(dataset, Mapping):
        raise InputError(
            f"{name} is a {kind} of {', '.join(map(str, dataset))}; give the trainer one of these datasets"
        )
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Indexed):
        raise InputError(
            f"{name} is a {kind}, which has no length or cannot be read by index; every epoch has its own "
            "order, so give the trainer a dataset with __len__ and __getitem__: list(...) of it if it fits "
            "into memory, or datasets.Dataset.from_generator"
        )
    if not len(dataset):
        raise InputError(f"{name} is empty: this {kind} has no examples")
    return dataset if isinstance(dataset, VisitDataset) else ByIndex(dataset)


def collate(examples: Sequence[Any]) -> dict[str, Any]:
    """The batch of examples that are dicts: of each entry what torch's default_collate makes of it.

    A list of numbers counts as a tensor. Entries that cannot be stacked are an InputError with their name.
    """
    batch = {}
    names = {name for example in examples for name in example}
    for place, example in enumerate(examples):
        if missing := sorted(names - example.keys()):
            raise InputError(
                f"example {example.get('item', place)} of a batch has no {missing[0]!r}, and others have: "
                "give all examples the same entries"
            )
    for name in examples[0]:
        try:
            batch[name] = default_collate([_as_tensor(example[name]) for example in examples])
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"the examples' {name!r} cannot be stacked to a batch: {error}; give all examples one shape, "
                "or the trainer a data_collator"
            ) from error
    return batch


def _as_tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, list) and _is_numeric(value) else value


def _is_numeric(value: Any) -> bool:
    return all(map(_is_numeric, value)) if isinstance(value, list) else isinstance(value, int | float)
