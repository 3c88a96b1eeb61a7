"""Intervals, win rates and power: worked by hand, by their properties, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from prefopt.errors import InputError
from prefopt.evaluation import words
from prefopt.evaluation.stats import (
    best_elsewhere,
    by_group,
    holm,
    p_value,
    paired_bootstrap,
    pairwise_accuracy,
    rows_for_power,
    win_rate,
)
from prefopt.evaluation.summary import contrast


def test_win_rate_by_hand():
    """Three wins, one tie, two losses: (3 + 0.5) / 6 and 3 / 5, with Wilson's interval of 3 / 5 restated."""
    result = win_rate([2, 3, 4, 1.005, 0, 0], [1, 1, 1, 1, 1, 1])
    assert (result.wins, result.ties, result.losses) == (3, 1, 2)
    assert result.rate == 3.5 / 6 and result.rate_without_ties == 0.6
    z, n, p = 1.959963985, 5, 0.6
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert result.low == pytest.approx(centre - half, abs=1e-8)
    assert result.high == pytest.approx(centre + half, abs=1e-8)
    assert (round(result.low, 4), round(result.high, 4)) == (0.2307, 0.8824)


def test_a_difference_of_exactly_the_band_is_a_tie():
    """0.30 - 0.29 is more than 0.01 in floating point."""
    assert win_rate([0.30, 0.29, 0.31], [0.29, 0.30, 0.29]).ties == 2


def test_nothing_but_ties_has_no_rate_without_them():
    result = win_rate([1, 1], [1, 1])
    assert (result.rate, result.rate_without_ties, result.low, result.high) == (0.5, None, None, None)


def test_swapping_the_sides_negates():
    rng = np.random.default_rng(0)
    a, b, groups = rng.normal(size=90), rng.normal(size=90), np.repeat(np.arange(30), 3)
    there, back = paired_bootstrap(a, b, groups, 2000), paired_bootstrap(b, a, groups, 2000)
    assert there.mean == pytest.approx(-back.mean, abs=1e-12)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-12)
    there, back = win_rate(a, b), win_rate(b, a)
    assert (there.wins, there.ties, there.losses) == (back.losses, back.ties, back.wins)
    assert there.rate + back.rate == pytest.approx(1)
    assert (there.low, there.high) == pytest.approx((1 - back.high, 1 - back.low))


def test_bootstrap_by_hand():
    """Two prompts with differences 0 and 1: a resample's mean is 0, 1/2 or 1 with chance 1/4, 1/2, 1/4."""
    result = paired_bootstrap([1, 2], [1, 1])
    assert (result.mean, result.low, result.high, result.groups) == (0.5, 0.0, 1.0, 2)
    middle = paired_bootstrap([1, 2], [1, 1], level=0.4)
    assert (middle.low, middle.high) == (0.5, 0.5)


def test_a_constant_difference_has_an_interval_of_no_width():
    result = paired_bootstrap(np.arange(5) + 0.5, np.arange(5))
    assert result.mean == result.low == result.high == 0.5


def test_the_seeds_of_a_prompt_stay_together():
    """Copies of a row add no evidence: with groups the interval is that of the unique rows."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.2, 1, 40), np.zeros(40)
    groups = np.repeat([f"prompt {i}" for i in range(40)], 4)
    single = paired_bootstrap(a, b)
    copied = paired_bootstrap(np.repeat(a, 4), np.repeat(b, 4), groups)
    naive = paired_bootstrap(np.repeat(a, 4), np.repeat(b, 4))
    assert copied.mean == pytest.approx(single.mean)
    assert copied.high - copied.low == pytest.approx(single.high - single.low, rel=0.05)
    assert naive.high - naive.low == pytest.approx((single.high - single.low) / 2, rel=0.1)


def test_groups_of_unequal_size_weigh_rows_not_groups():
    result = paired_bootstrap([3, 0, 0, 0], [0, 0, 0, 0], groups=["a", "b", "b", "b"])
    assert result.mean == 0.75


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """200 experiments of 50 prompts x 2 correlated seeds, skewed; 90 % intervals within 3 standard errors."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        prompt = rng.exponential(1, 50) - 1
        a = np.repeat(prompt, 2) + rng.normal(0, 0.5, 100) + 0.3
        interval = paired_bootstrap(a, np.zeros(100), np.repeat(np.arange(50), 2), resamples=400, level=0.9)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.83 <= covered / 200 <= 0.965


def test_the_same_seed_gives_the_same_interval():
    a, b = np.arange(30) % 7, np.arange(30) % 5
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, b, seed=3) != paired_bootstrap(a, b, seed=4)


def test_rows_for_power_restates_the_published_example():
    """A mean of +2.28 with a 95 % interval of [-3.1, 7.8] on 178 rows: about 2,140 rows for 80 % power."""
    standard_error = (7.8 + 3.1) / 2 / reference.norm.ppf(0.975)
    deviation = standard_error * math.sqrt(178)
    standard = reference.norm.ppf((np.arange(178) + 0.5) / 178)
    standard = (standard - standard.mean()) / standard.std(ddof=1)
    rows = rows_for_power(2.28 + deviation * standard)
    assert rows == math.ceil(((1.959964 + 0.841621) * deviation / 2.28) ** 2)
    assert rows == pytest.approx(2140, rel=0.04)


def test_a_weighted_mean_has_the_interval_of_a_ratio_of_sums():
    """Losses per token: of 40 images with 1 to 3 answers each, against a bootstrap of sums written out."""
    rng = np.random.default_rng(6)
    groups = np.repeat(np.arange(40), rng.integers(1, 4, 40))
    tokens = rng.integers(1, 30, len(groups)).astype(float)
    a, b = rng.normal(2, 1, len(groups)), rng.normal(1.8, 1, len(groups))
    found = paired_bootstrap(a, b, groups, weights=tokens)
    assert found.mean == pytest.approx((tokens * (a - b)).sum() / tokens.sum())
    sums, sizes = np.bincount(groups, tokens * (a - b)), np.bincount(groups, tokens)
    drawn = rng.integers(0, 40, (10_000, 40))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.03 * (high - low))
    assert found.high == pytest.approx(high, abs=0.03 * (high - low))
    equal, plain = (
        paired_bootstrap(a, b, groups, weights=np.full(len(a), 7.0)),
        paired_bootstrap(a, b, groups),
    )
    assert (equal.mean, equal.low, equal.high) == pytest.approx((plain.mean, plain.low, plain.high))
    with pytest.raises(ValueError, match="as many positive weights"):
        paired_bootstrap(a, b, groups, weights=tokens - 1)


def test_one_number_a_group_has_the_mean_of_all_and_its_spread():
    """The standard error of a ratio, by its groups' numbers and by simulation."""
    differences, groups = [3.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"]
    by_hand = 1.5 + np.array([3 - 1.5 * 1, 3 - 1.5 * 3]) / 2  # the mean of all is 6 / 4, of sizes 2
    np.testing.assert_allclose(by_group(differences, groups), by_hand)
    np.testing.assert_allclose(by_group([1, 3, 5, 5], ["a", "a", "b", "b"]), [2, 5], err_msg="equal sizes")
    assert np.ptp(by_group([0.1] * 5, [0, 0, 1, 2, 2], [3, 1, 4, 1, 5])) == 0
    rng = np.random.default_rng(7)
    ratios, errors = [], []
    for _ in range(400):
        sizes = rng.integers(1, 5, 60)
        owner = np.repeat(np.arange(60), sizes)
        values = rng.normal(0.3, 1, 60)[owner] + rng.normal(0, 0.5, len(owner))
        numbers = by_group(values, owner)
        ratios.append(numbers.mean())
        errors.append(numbers.std(ddof=1) / math.sqrt(60))
        assert numbers.mean() == pytest.approx(values.mean())
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)


def test_a_comparison_restates_the_published_one():
    """Guards: a gain of 2.28 of 100 told without its interval, on a tenth of the rows that it would need."""
    standard = reference.norm.ppf((np.arange(178) + 0.5) / 178)
    standard = np.random.default_rng(8).permutation((standard - standard.mean()) / standard.std(ddof=1))
    deviation = (7.8 + 3.1) / 2 / reference.norm.ppf(0.975) * math.sqrt(178)
    base = np.random.default_rng(9).uniform(0, 100, 178)
    found = contrast(base + 2.28 + deviation * standard, base, list(range(178)), 0.01)
    assert found is not None
    gap = found["difference"]
    assert (gap["low"], gap["high"]) == pytest.approx((-3.1, 7.8), abs=0.25)
    assert found["groups_for_power"] == pytest.approx(2140, rel=0.04)
    assert words.verdict(found, 178, "rows").startswith("No claim: the interval holds 0. About 2,")


def test_rows_without_a_score_are_left_out_of_both_sides():
    nan = float("nan")
    found = contrast(
        np.array([1.0, nan, 3.0, 9.0]), np.array([0.0, 5.0, 1.0, nan]), ["a", "b", "c", "d"], 0.0
    )
    assert found is not None
    assert (found["mean"], found["mean_against"], found["difference"]["groups"]) == (2.0, 0.5, 2)
    assert found["wins"]["wins"] == 2
    assert contrast(np.array([1.0, nan]), np.array([0.0, 1.0]), ["a", "b"], 0.0) is None
    assert contrast(np.array([1.0, 2.0]), np.array([0.0, 1.0]), ["a", "a"], 0.0) is None, "one witness"


def test_a_difference_that_comes_by_chance_among_many_is_no_claim():
    gap = {"mean": 0.1, "low": 0.01, "high": 0.2, "level": 0.95}
    entry = {"difference": gap, "better": 1, "groups_for_power": 40}
    assert words.verdict({**entry, "p_holm": 0.049}, 100).startswith("A gain")
    said = words.verdict({**entry, "p_holm": 0.2}, 100)
    assert said == "No claim: among so many comparisons one like this comes by chance (p 0.2)."
    assert words.is_sure(entry) and not words.is_sure({**entry, "p_holm": 0.2})


def test_rows_for_power_gives_that_power():
    rng = np.random.default_rng(5)
    rows = rows_for_power(0.5 + rng.permutation(reference.norm.ppf((np.arange(999) + 0.5) / 999)))
    found = reference.ttest_1samp(rng.normal(0.5, 1, (4000, rows)), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.04)


def test_no_number_of_rows_settles_a_difference_of_zero():
    assert rows_for_power([1, -1]) is None
    assert rows_for_power([1.0, 1.0]) == 2


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(InputError, match="at least two prompts"):
        paired_bootstrap([1, 2], [0, 0], groups=["a", "a"])
    with pytest.raises(InputError, match="no scores"):
        win_rate([], [])
    with pytest.raises(InputError, match="not finite"):
        win_rate([float("nan")], [0])
    with pytest.raises(ValueError, match="one shape"):
        win_rate([1, 2], [1])
    with pytest.raises(ValueError, match="2 differences but 3 groups"):
        paired_bootstrap([1, 2], [0, 0], groups=[1, 2, 3])


def test_the_best_elsewhere_is_chosen_without_the_row_s_own_group():
    """Each of two groups is good in the other variant: chosen on the other group, each gets its worse one."""
    values = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    assert best_elsewhere(values, ["a", "a", "b", "b"]).tolist() == [1, 1, 0, 0]
    assert best_elsewhere(values + np.array([[0], [9]]), ["a", "a", "b", "b"]).tolist() == [1, 1, 1, 1]
    assert best_elsewhere(np.zeros((3, 4)), ["a", "b", "c", "d"]).tolist() == [0, 0, 0, 0], "ties: the first"
    with pytest.raises(InputError, match="at least two of them"):
        best_elsewhere(values, ["a"] * 4)


def test_choosing_among_equals_wins_nothing():
    """Guards: the best of many variants, counted on the rows that it was chosen by."""
    rng = np.random.default_rng(3)
    gains, naive = [], []
    for _ in range(60):
        values, base = rng.normal(size=(10, 200)), rng.normal(size=200)
        chosen = best_elsewhere(values, np.arange(200))
        gains.append(values[chosen, np.arange(200)].mean() - base.mean())
        naive.append(values.mean(axis=1).max() - base.mean())
    assert abs(np.mean(gains)) < 4 * np.std(gains) / math.sqrt(60)
    assert np.mean(naive) > 4 * np.std(naive) / math.sqrt(60)


def test_p_values_and_their_correction():
    differences = np.random.default_rng(4).normal(0.3, 1, 40)
    assert p_value(differences) == pytest.approx(reference.ttest_1samp(differences, 0).pvalue)
    assert p_value([0.0, 0.0]) == 1.0 and p_value([0.5, 0.5]) == 0.0
    # Sorted .01, .02, .03, .04 times 4, 3, 2, 1, never falling.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_pairwise_accuracy_by_hand():
    scores = [3, 2, 1, 5, 5, 9, 0, 7]
    right = [True, False, True, True, False, True, True, True]
    groups = ["a", "a", "a", "b", "b", "b", "c", "c"]
    # a: 3 over 2, 1 under 2; b: a tie, 9 over 5; c has nothing wrong; no pair goes across groups
    found, number = pairwise_accuracy(scores, right, groups)
    assert number == 4 and found.mean == pytest.approx((1 + 0 + 0.5 + 1) / 4) and found.groups == 2
    assert found.low == pytest.approx(0.5) and found.high == pytest.approx(0.75), "prompts are resampled"
    assert pairwise_accuracy(scores, [True] * 8, groups) is None


def test_pairwise_accuracy_of_a_coin_and_of_the_truth():
    chance = np.random.default_rng(0)
    right, groups = chance.random(800) < 0.5, np.repeat(np.arange(80), 10)
    coin, _ = pairwise_accuracy(chance.random(800), right, groups)
    truth, _ = pairwise_accuracy(right + 0.1 * chance.random(800), right, groups)
    assert coin.low < 0.5 < coin.high and truth.mean == truth.low == 1
