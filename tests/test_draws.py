"""Randomness as data: what is drawn, what it depends on, and the order in which items are read."""

import itertools
from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from scipy import stats
from torch.utils.data import BatchSampler

from prefopt.draws import EXAMPLE, ORDER, VisitSampler, draw, epoch_order, generator, stratified_time

SHAPE = (4, 8, 8)
MANY = 2000  # draws: 512,000 normal numbers


@pytest.fixture(scope="module")
def draws():
    return [draw(1, item, 0, shape=SHAPE, flip_probability=0.5, drop_probability=0.2) for item in range(MANY)]


@pytest.mark.parametrize("name", ["noise", "latent_noise"])
def test_noise_is_standard_normal(draws, name):
    """Guards: noise from a uniform distribution, whose variance is 1/12 and whose kurtosis is 1.8."""
    values = np.stack([getattr(chance, name) for chance in draws]).astype(np.float64).ravel()
    error = len(values) ** -0.5
    assert abs(values.mean()) < 4 * error
    assert abs(values.var() - 1) < 4 * 2**0.5 * error
    assert abs(stats.kurtosis(values, fisher=False) - 3) < 4 * 24**0.5 * error
    assert stats.kstest(values[:20_000], "norm").pvalue > 1e-3


def test_time_is_uniform(draws):
    times = np.array([chance.time for chance in draws])
    assert times.min() >= 0 and times.max() < 1
    assert stats.kstest(times, "uniform").pvalue > 1e-3


def test_flips_and_dropped_captions_come_as_often_as_asked(draws):
    for name, probability in (("flip", 0.5), ("drop_caption", 0.2)):
        count = sum(getattr(chance, name) for chance in draws)
        assert stats.binomtest(count, MANY, probability).pvalue > 1e-3
    never, always = (
        [draw(0, i, 0, shape=(1, 1, 1), flip_probability=p, drop_probability=p) for i in range(200)]
        for p in (0.0, 1.0)
    )
    assert not any(chance.flip or chance.drop_caption for chance in never)
    assert all(chance.flip and chance.drop_caption for chance in always)


def test_a_probability_moves_nothing_else():
    plain, flipped = (draw(3, 5, 7, shape=SHAPE, flip_probability=p) for p in (0.0, 1.0))
    assert plain.time == flipped.time
    assert np.array_equal(plain.noise, flipped.noise)


@pytest.mark.parametrize(
    "other", [(1, 4, 9), (0, 5, 9), (0, 4, 10), (2**32, 4, 9), (0, 4 + 2**32, 9), (0, 9, 4)]
)
def test_seed_item_and_visit_draw_independently(other):
    """Guards: every process draws the same noise."""
    first, second = (draw(*key, shape=(4, 64, 64)) for key in ((0, 4, 9), other))
    assert first.time != second.time
    for a in (first.noise, first.latent_noise):
        for b in (second.noise, second.latent_noise):
            assert abs(stats.pearsonr(a.ravel(), b.ravel()).statistic) < 4 / a.size**0.5
    within = stats.pearsonr(first.noise.ravel(), first.latent_noise.ravel()).statistic
    assert abs(within) < 4 / first.noise.size**0.5


def test_neighbouring_items_do_not_share_a_stretch_of_the_stream():
    """A counter that moves on with each number must not run into the next item's numbers."""
    drawn = [generator(0, EXAMPLE, item, visit).random(5000) for item in (0, 1, 2) for visit in (0, 1)]
    drawn.append(generator(0, ORDER, 0, 0).random(5000))
    assert len(np.unique(np.concatenate(drawn))) == 7 * 5000


def test_a_draw_is_a_pure_function_of_its_key():
    """Whatever was drawn before, and in whichever order."""
    keys = [(0, item, visit) for item in range(5) for visit in range(3)]
    there = {key: draw(*key, shape=SHAPE) for key in keys}
    back = {key: draw(*key, shape=SHAPE) for key in reversed(keys)}
    for key in keys:
        assert there[key].time == back[key].time
        assert np.array_equal(there[key].noise, back[key].noise)
        assert np.array_equal(there[key].latent_noise, back[key].latent_noise)


@pytest.mark.parametrize("seed", [0, 2**31, 2**63, 2**64 - 1])
def test_any_seed_of_64_bits(seed):
    assert draw(seed, 2**64 - 1, 2**64 - 1, shape=(1, 1, 1)).noise.dtype == np.float32
    neighbours = [draw((seed + d) % 2**64, 0, 0, shape=(1, 1, 1)).time for d in (-1, 0, 1)]
    assert len(set(neighbours)) == 3, "not rounded to a float on the way"


def test_the_generator_is_pinned():
    """A run of last year can be repeated only as long as these numbers stay."""
    chance = draw(42, 7, 3, shape=(1, 1, 2), flip_probability=0.5, drop_probability=0.5)
    assert float(chance.time) == 0.005238711833953857
    assert chance.noise.ravel().tolist() == [-0.054473813623189926, 0.6396980881690979]
    assert chance.latent_noise.ravel().tolist() == [0.27424898743629456, 1.627241849899292]
    assert (chance.flip, chance.drop_caption) == (False, False)
    assert epoch_order(42, 1, 6).tolist() == [3, 0, 5, 1, 4, 2]


def sampler(length: int, global_batch: int, epoch: int = 0, **options) -> VisitSampler:
    return VisitSampler(length, global_batch=global_batch, seed=0, epoch=lambda: epoch, **options)


@pytest.mark.parametrize(("length", "global_batch", "read"), [(10, 4, 12), (8, 4, 8), (3, 8, 8), (1, 1, 1)])
def test_an_epoch_reads_every_item_and_fills_its_last_step(length, global_batch, read):
    indices = [index for index, _ in sampler(length, global_batch)]
    assert len(indices) == len(sampler(length, global_batch)) == read
    assert set(indices) == set(range(length))
    assert indices[length:] == (indices[:length] * 8)[: read - length]
    counts = Counter(indices).values()
    assert max(counts) - min(counts) <= 1, "none is read a second time more than another"


def test_epochs_differ_in_order_and_repeat_by_themselves():
    first, second = ([i for i, _ in sampler(50, 5, epoch)] for epoch in (0, 1))
    assert first != second
    assert first == [i for i, _ in sampler(50, 5, 0)]
    assert [i for i, _ in sampler(5, 5, shuffle=False)] == [0, 1, 2, 3, 4]


def test_visits_count_epochs_and_repeat():
    visits = [{visit for _, visit in sampler(4, 2, epoch)} for epoch in range(5)]
    assert visits == [{0}, {1}, {2}, {3}, {4}]
    visits = [{visit for _, visit in sampler(4, 2, epoch, visits=2)} for epoch in range(5)]
    assert visits == [{0}, {1}, {0}, {1}, {0}]
    orders = [[i for i, _ in sampler(40, 2, epoch, visits=1)] for epoch in (0, 1)]
    assert orders[0] != orders[1], "the order is the epoch's even where the draws repeat"


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_every_number_of_processes_sees_the_same_global_batches(processes):
    """Each process reads its batches of one order, as accelerate deals them out; a step has 16 examples."""
    step, per_device = 16, 2
    shares = [
        list(
            BatchSamplerShard(
                BatchSampler(sampler(37, step, 3), per_device, drop_last=False), processes, process
            )
        )
        for process in range(processes)
    ]
    accumulation = step // per_device // processes
    assert {len(share) for share in shares} == {3 * accumulation}
    for number in range(3):
        seen = [
            example
            for share in shares
            for batch in share[number * accumulation : (number + 1) * accumulation]
            for example in batch
        ]
        order = list(sampler(37, step, 3))[number * step : (number + 1) * step]
        assert sorted(seen) == sorted(order)


def test_items_of_a_group_are_read_one_after_another() -> None:
    """Each once, in another order of groups in another epoch; alone, the order is the ungrouped one."""
    groups = ["a", "b", "a", "c", "b", "a", "d"]
    orders = [[index for index, _ in sampler(7, 7, epoch, groups=groups)] for epoch in range(8)]
    for order in orders:
        assert sorted(order) == list(range(7))
        names = [groups[index] for index in order]
        assert len([name for name, _ in itertools.groupby(names)]) == 4
    assert len({tuple(order) for order in orders}) > 4
    alone = sampler(7, 7, 3, groups=range(7))
    assert list(alone) == list(sampler(7, 7, 3))


@pytest.mark.parametrize(("length", "global_batch"), [(64, 8), (10, 4), (3, 8)])
def test_stratified_times_fill_each_step_evenly(length, global_batch):
    """In every step each part of [0, 1) has one example; over the visits an item's times stay uniform."""
    for epoch in range(3):
        order = [index for index, _ in sampler(length, global_batch, epoch)][
            : length // global_batch * global_batch
        ]
        times = [
            stratified_time(np.float32(0.75), 0, index, epoch, length=length, global_batch=global_batch)
            for index in order
        ]
        for start in range(0, len(order), global_batch):
            parts = sorted(int(time * global_batch) for time in times[start : start + global_batch])
            assert parts == list(range(global_batch))
    last = stratified_time(np.nextafter(np.float32(1), 0), 0, 0, 0, length=1, global_batch=1)
    assert last < 1 and last.dtype == np.float32
    mine = [
        stratified_time(np.float32(0.5), 0, 1, visit, length=length, global_batch=global_batch)
        for visit in range(400)
    ]
    parts = min(length, global_batch)  # of a short epoch the first parts alone
    assert np.mean(mine) == pytest.approx(parts / global_batch / 2, abs=0.05)
