"""Randomness as data: every random number of training is a pure function of (seed, item, visit).

A draw is made where the example is read, by a counter-based generator (Philox, doi:10.1145/2063384.2063405),
so it does not matter which process or worker reads the example, in which order, or whether the run was
interrupted before. The candidates of one item share their draw. `visit` counts how often the item has been
read: the epoch, or the epoch modulo R when the draws are to repeat after R epochs.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

EXAMPLE, ORDER, ANSWER = 0, 1, 2  # streams of one seed: an epoch's order says nothing about an item's noise


class Draw(NamedTuple):
    """What chance decides about one visit of one item."""

    time: np.float32  # uniform in [0, 1): the share of the noise schedule gone through
    noise: np.ndarray  # (C, H, W) float32, standard normal, added to the clean latents
    latent_noise: np.ndarray  # (C, H, W) float32, standard normal, which sample of the VAE's posterior
    flip: bool  # mirror the images
    drop_caption: bool  # train this visit without its caption


def generator(seed: int, stream: int, item: int, visit: int) -> np.random.Generator:
    """The generator of one (seed, stream, item, visit); all are integers in [0, 2^64)."""
    # Philox advances its counter's lowest word while it draws, so item and visit live in the upper ones.
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, item, visit, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draw(
    seed: int,
    item: int,
    visit: int,
    *,
    shape: tuple[int, int, int],
    flip_probability: float = 0.0,
    drop_probability: float = 0.0,
) -> Draw:
    """The draw of one visit of one item; `shape` is the latents', (C, H, W), probabilities in [0, 1]."""
    chance = generator(seed, EXAMPLE, item, visit)
    time, flip, drop = chance.random(3, dtype=np.float32)
    return Draw(
        time=time,
        noise=chance.standard_normal(shape, dtype=np.float32),
        latent_noise=chance.standard_normal(shape, dtype=np.float32),
        flip=bool(flip < flip_probability),
        drop_caption=bool(drop < drop_probability),
    )


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which an epoch reads its `length` items: a permutation, int64."""
    return generator(seed, ORDER, 0, epoch).permutation(length)


def grouped_order(seed: int, epoch: int, groups: Sequence[Hashable]) -> np.ndarray:
    """The same with the items of a group, which are equal in `groups`, next to each other."""
    members: dict[Hashable, list[int]] = {}
    for item, group in enumerate(groups):
        members.setdefault(group, []).append(item)
    together = list(members.values())
    order = epoch_order(seed, epoch, len(together))
    return np.array([item for place in order for item in together[place]])


def stratified_time(
    time: np.float32, seed: int, item: int, visit: int, *, length: int, global_batch: int
) -> np.float32:
    """A time that lies in its own of `global_batch` equal parts of [0, 1) for each example of a step.

    That holds for the examples of an epoch as `epoch_order` orders them, the epoch being the visit; over the
    visits an item's times stay uniform. A pure function as any draw.
    """
    stratum = _places(seed, visit, length)[item] % global_batch
    return np.float32(min((stratum + np.float64(time)) / global_batch, np.nextafter(np.float32(1), 0)))


@lru_cache(maxsize=4)
def _places(seed: int, epoch: int, length: int) -> np.ndarray:
    """Where each item stands in an epoch's order."""
    return np.argsort(epoch_order(seed, epoch, length))


def visit_order(seed: int, epoch: int, length: int, groups: Sequence[Hashable] | None = None) -> np.ndarray:
    """The order in which an epoch reads its items; those of a group stand next to each other."""
    return epoch_order(seed, epoch, length) if groups is None else grouped_order(seed, epoch, groups)


class VisitSampler(Sampler[tuple[int, int]]):
    """Yields (index, visit), one epoch at each iteration, in a number that fills the last global batch.

    Every optimizer step sees exactly `global_batch` examples, however they are split over processes and
    accumulation; where the items do not divide evenly, the first ones of the epoch's order come a second
    time. Items of one of the `groups` are read one after another. `epoch` says which epoch begins now:
    asking is safer than being told, since accelerate does not pass `set_epoch` on to the sampler of a loader
    that was resumed on several processes. `read` are the items of a run that ends within its first epoch: a
    loader that reads ahead of the run's end reads them again, since no others are at hand.
    """

    def __init__(
        self,
        length: int,
        *,
        global_batch: int,
        seed: int,
        epoch: Callable[[], int],
        visits: int | None = None,
        shuffle: bool = True,
        groups: Sequence[Hashable] | None = None,
        read: Sequence[int] | None = None,
    ):
        self.groups, self.read = groups, read
        self.length, self.global_batch, self.seed = length, global_batch, seed
        self.epoch, self.visits, self.shuffle = epoch, visits, shuffle

    def __len__(self) -> int:
        return -(-self.length // self.global_batch) * self.global_batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch()
        order: Iterable[int] = range(self.length)
        if self.read is not None:
            order = self.read
        elif self.shuffle:
            order = visit_order(self.seed, epoch, self.length, self.groups)
        visit = epoch % self.visits if self.visits else epoch
        for index in itertools.islice(itertools.cycle(order), len(self)):
            yield int(index), visit
