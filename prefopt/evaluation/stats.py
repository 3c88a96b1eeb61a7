"""Paired intervals, win rates, and how many rows a comparison needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from prefopt.errors import InputError

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, with an interval."""

    mean: float
    low: float
    high: float
    level: float
    groups: int  # how many were resampled: prompts, or rows where no groups were given


@dataclass(frozen=True)
class WinRate:
    """Counts of paired outcomes from the first side's view, and rates in 0..1."""

    wins: int
    ties: int
    losses: int
    rate: float  # a tie counts one half
    rate_without_ties: float | None  # of the decided pairs; None if all are ties
    low: float | None  # Wilson interval of `rate_without_ties`
    high: float | None
    level: float


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    groups: Sequence | np.ndarray | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = LEVEL,
    weights: Sequence[float] | np.ndarray | None = None,
) -> Difference:
    """mean(a) - mean(b) with a percentile bootstrap interval; row i of both is the same prompt and seed.

    Whole groups (the seeds of a prompt, the questions about an image) are drawn together: they are no
    independent witnesses. Needs two groups at least; below about twenty the interval is narrower than its
    level says. With positive `weights` (n,) means are weighted, as a loss per token is by the tokens of each
    row: a resample's means then divide by its own weights.
    """
    differences, weights = _differences(a, b), _weights(weights, len(a))
    ids = (
        np.arange(len(differences))
        if groups is None
        else np.unique(np.asarray(groups), return_inverse=True)[1]
    )
    if len(ids) != len(differences):
        raise ValueError(
            f"{len(differences)} differences but {len(ids)} groups: each row belongs to one group"
        )
    count = int(ids.max()) + 1
    if count < 2:
        raise InputError("an interval needs at least two prompts; give more prompts")
    sums, sizes = np.bincount(ids, weights=weights * differences), np.bincount(ids, weights=weights)
    # The batch bounds memory: SciPy holds batch x groups indices at a time.
    result = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // count),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    mean = np.average(differences, weights=weights)
    return Difference(float(mean), float(low), float(high), level, count)


def by_group(
    differences: Sequence[float] | np.ndarray,
    groups: Sequence | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Independent numbers, one of each group, with the (weighted) mean R of all rows as their mean.

    R + (s_g - R n_g) / mean(n), with s_g and n_g the sums of weighted differences and of weights in group g:
    the linearised ratio, whose spread over groups is that of R. Of groups of one size it is their means.
    """
    differences, weights = np.asarray(differences, dtype=np.float64), _weights(weights, len(differences))
    ids = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums, sizes = np.bincount(ids, weights=weights * differences), np.bincount(ids, weights=weights)
    ratio = sums.sum() / sizes.sum()
    beyond = sums - ratio * sizes
    beyond[np.abs(beyond) <= 1e-12 * np.abs(sums).max()] = (
        0.0  # rounding, of which no test is to make a spread
    )
    return ratio + beyond / sizes.mean()


def pairwise_accuracy(
    scores: Sequence[float] | np.ndarray,
    right: Sequence[bool] | np.ndarray,
    groups: Sequence | np.ndarray,
    level: float = LEVEL,
) -> tuple[Difference, int] | None:
    """How often, of a right and a wrong row of one group, the right one has the higher score; a tie is half.

    The share in 0..1, with an interval that resamples groups (prompts), and the number of such pairs; None if
    fewer than two groups have one.
    """
    scores, right = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool)
    ids = np.unique(np.asarray(groups), return_inverse=True)[1]
    if not len(scores) == len(right) == len(ids):
        raise ValueError(f"{len(scores)} scores, {len(right)} that are right or not, {len(ids)} groups")
    agree, of_pair = [], []
    for group in range(ids.max(initial=-1) + 1):
        better, worse = scores[(ids == group) & right], scores[(ids == group) & ~right]
        gaps = np.subtract.outer(better, worse).ravel()
        agree.append((np.sign(gaps) + 1) / 2)
        of_pair += [group] * len(gaps)
    if len(set(of_pair)) < 2:
        return None
    rates = np.concatenate(agree)
    return paired_bootstrap(rates, np.zeros_like(rates), of_pair, level=level), len(rates)


def win_rate(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, tie: float = 0.01, level: float = LEVEL
) -> WinRate:
    """How often a beats b, in pairs; a difference of at most `tie` (in the scores' unit) is a tie.

    The interval takes pairs for independent: with several seeds a prompt it is a little too narrow, and the
    bootstrap of the difference is the one to quote.
    """
    signs = signs_of(_differences(a, b), tie)
    wins, losses = int((signs > 0).sum()), int((signs < 0).sum())
    ties = len(signs) - wins - losses
    rate = (wins + ties / 2) / len(signs)
    if wins + losses == 0:
        return WinRate(wins, ties, losses, rate, None, None, None, level)
    test = stats.binomtest(wins, wins + losses)
    low, high = test.proportion_ci(confidence_level=level, method="wilson")
    return WinRate(wins, ties, losses, rate, wins / (wins + losses), float(low), float(high), level)


def signs_of(differences: np.ndarray, tie: float) -> np.ndarray:
    """1 where a difference is a win, -1 where it is a loss, 0 where it is at most `tie`."""
    tie = tie * (1 + 1e-9) + 1e-12  # 0.30 - 0.29 exceeds 0.01 in floating point
    return np.sign(differences) * (np.abs(differences) > tie)


def best_elsewhere(values: np.ndarray, groups: Sequence | np.ndarray, folds: int = 5) -> np.ndarray:
    """For each row the variant (0..variants - 1) that is best on average in other groups; ties: the first.

    `values` (variants, rows), nan where there is none. The groups (prompts) are divided into `folds`, and a
    row's variant is chosen without its fold, so what is then reported of the row was not chosen for it.
    """
    ids = np.unique(np.asarray(groups), return_inverse=True)[1]
    fold, chosen = ids % folds, np.zeros(len(ids), dtype=np.int64)
    if len(set(fold.tolist())) < 2:
        raise InputError("choosing on other prompts needs at least two of them; give more prompts")
    for part in np.unique(fold):
        chosen[fold == part] = np.nanmean(values[:, fold != part], axis=1).argmax()
    return chosen


def p_value(differences: Sequence[float] | np.ndarray) -> float:
    """The two-sided p of a t-test of independent differences, as the mean difference of each prompt."""
    differences = np.asarray(differences, dtype=np.float64)
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    result: Any = stats.ttest_1samp(differences, 0)
    return float(result.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): of 20 sets, one has an error under 0.05."""
    order = np.argsort(p)
    steps = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(steps).clip(max=1.0)
    return corrected.tolist()


def rows_for_power(
    differences: Sequence[float] | np.ndarray, power: float = 0.8, level: float = LEVEL
) -> int | None:
    """Rows at which a two-sided paired test would find this mean difference with probability `power`.

    n = ((z_level + z_power) * sd / mean)^2, the normal approximation; None where the mean is 0 and no number
    would do. Rows must be independent: give the mean difference of each prompt, not of each image.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if len(differences) < 2:
        raise InputError("the power of a comparison needs at least two prompts; give more prompts")
    mean = differences.mean()
    if mean == 0:
        return None
    z = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)
    return max(2, math.ceil((z * differences.std(ddof=1) / mean) ** 2))


def _weights(weights: Sequence[float] | np.ndarray | None, count: int) -> np.ndarray:
    if weights is None:
        return np.ones(count)
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (count,) or not (weights > 0).all():
        raise ValueError(f"{count} rows need as many positive weights, not {weights.shape}")
    return weights


def _differences(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired scores need one shape (n,), not {a.shape} and {b.shape}")
    if len(a) == 0:
        raise InputError("there are no scores to compare")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("some scores are not finite: the scorer failed on an image")
    return a - b
