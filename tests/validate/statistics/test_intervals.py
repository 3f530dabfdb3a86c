"""Intervals against hand-computed and published values, and the laws they keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from limbeck.errors import InputError, UsageError
from limbeck.validate.statistics.intervals import (
    bootstrap_interval,
    grouped_jackknife_interval,
    newcombe_interval,
    paired_ratio_interval,
    tang_interval,
    wilson_interval,
)

numbers = st.floats(-100.0, 100.0, allow_nan=False, width=32)
times = st.floats(0.125, 100.0)
counts = st.integers(0, 300)


def mean(values: np.ndarray) -> float:
    return float(np.mean(values))


def spearman(pairs: np.ndarray) -> float:
    return float(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


# --- bootstrap ---------------------------------------------------------------------------------------------------


@given(arrays(np.float64, st.integers(2, 40), elements=numbers))
@settings(max_examples=50, deadline=None)
def test_a_bootstrap_interval_holds_its_point_and_stays_within_the_data(values: np.ndarray) -> None:
    interval = bootstrap_interval(values, mean, resamples=200)
    assert interval.low <= interval.point <= interval.high
    assert values.min() - 1e-9 <= interval.low and interval.high <= values.max() + 1e-9


def test_the_bootstrap_agrees_with_scipys_bca_on_skewed_data() -> None:
    values = np.random.default_rng(3).exponential(size=80)
    ours = bootstrap_interval(values, mean, resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=1).confidence_interval
    assert ours.method == "bootstrap, BCa"
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours.high - ours.point > ours.point - ours.low  # the correction leans the way the data does


def test_a_bootstrap_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_interval(values, mean)
    assert interval.width == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.1)


def test_four_times_the_examples_halve_a_bootstrap_interval() -> None:
    values = np.random.default_rng(0).normal(size=400)
    few, many = bootstrap_interval(values[:100], mean), bootstrap_interval(values, mean)
    assert many.width < 0.7 * few.width


def test_rows_are_drawn_whole_so_a_comparison_stays_paired() -> None:
    first = np.random.default_rng(1).normal(size=200)
    columns = np.stack([first, first + 0.5], axis=1)
    interval = bootstrap_interval(columns, lambda rows: float(np.mean(rows[:, 1] - rows[:, 0])))
    assert (interval.low, interval.high) == pytest.approx((0.5, 0.5))


def test_identical_sides_give_no_width_instead_of_nan() -> None:
    interval = bootstrap_interval(np.zeros(50), mean)
    assert (interval.low, interval.point, interval.high) == (0.0, 0.0, 0.0)


def test_resamples_without_a_rank_correlation_are_left_out() -> None:
    pairs = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 3.0], [3.0, 2.0]])
    with pytest.warns(stats.ConstantInputWarning):
        interval = bootstrap_interval(pairs, spearman, resamples=1000)
    assert interval.point == pytest.approx(0.8)
    assert -1.0 <= interval.low <= 0.8 <= interval.high <= 1.0


def test_a_bootstrap_repeats_with_its_seed() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(values, mean, seed=5) == bootstrap_interval(values, mean, seed=5)
    assert bootstrap_interval(values, mean, seed=5) != bootstrap_interval(values, mean, seed=6)


def test_an_undefined_statistic_and_a_single_example_are_refused() -> None:
    with pytest.raises(InputError, match="nan on these 10 examples"):
        bootstrap_interval(np.zeros(10), lambda _: math.nan)
    with pytest.raises(InputError, match="at least 2 examples"):
        bootstrap_interval(np.zeros(1), mean)
    with pytest.raises(UsageError, match="outside"):
        bootstrap_interval(np.zeros(10), mean, confidence=95.0)


# --- ratio of medians --------------------------------------------------------------------------------------------


@given(arrays(np.float64, (5, 7), elements=times), arrays(np.float64, (5, 3), elements=times))
@settings(max_examples=50, deadline=None)
def test_a_ratio_holds_its_point_and_scales_with_its_numerator(upper: np.ndarray, lower: np.ndarray) -> None:
    interval = paired_ratio_interval(upper, lower, resamples=200)
    assert interval.low <= interval.point <= interval.high
    doubled = paired_ratio_interval(2.0 * upper, lower, resamples=200)
    assert (doubled.low, doubled.point, doubled.high) == pytest.approx(
        (2 * interval.low, 2 * interval.point, 2 * interval.high)
    )


@given(arrays(np.float64, st.tuples(st.integers(3, 8), st.integers(1, 9)), elements=times))
@settings(max_examples=50, deadline=None)
def test_the_ratio_of_identical_sides_is_one(values: np.ndarray) -> None:
    interval = paired_ratio_interval(values, values, resamples=200)
    assert (interval.low, interval.point, interval.high) == (1.0, 1.0, 1.0)


def test_a_slow_round_that_hits_both_sides_leaves_the_ratio_alone() -> None:
    random = np.random.default_rng(0)
    slow = np.array([1.0, 1.0, 8.0, 1.0, 1.0, 3.0, 1.0, 1.0])[:, None]
    upper = 4.0 * slow * random.uniform(0.98, 1.02, (8, 40))
    lower = slow * random.uniform(0.98, 1.02, (8, 400))
    interval = paired_ratio_interval(upper, lower)
    assert interval.point == pytest.approx(4.0, rel=0.02)
    assert interval.width < 0.2


def test_ratios_that_vary_more_have_wider_intervals() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(size=10)
    calm, wild = (paired_ratio_interval(np.exp(scale * noise), np.ones(10)) for scale in (0.01, 0.1))
    assert 5.0 < wild.width / calm.width < 20.0


def test_the_interval_over_few_rounds_covers_as_often_as_it_says() -> None:
    """A plain percentile bootstrap of 5 rounds covers about 83 %; the expanded one about 95 %."""
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        upper = 2.0 * np.exp(random.normal(scale=0.1, size=5))
        lower = np.exp(random.normal(scale=0.1, size=5))
        interval = paired_ratio_interval(upper, lower, resamples=500, seed=seed)
        covered += interval.low <= 2.0 <= interval.high
    assert 0.90 <= covered / 300 <= 1.0


def test_ratios_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 3"):
        paired_ratio_interval(np.ones(2), np.ones(2))
    with pytest.raises(UsageError, match="3 and 4"):
        paired_ratio_interval(np.ones(3), np.ones(4))
    with pytest.raises(UsageError, match="positive"):
        paired_ratio_interval(np.ones(3), np.zeros(3))


# --- jackknife ---------------------------------------------------------------------------------------------------


def test_one_example_a_group_is_the_textbook_jackknife() -> None:
    """For a mean, the jackknife's standard error is s / sqrt(n): here s = 2.58199 and n = 4."""
    values = np.array([1.0, 3.0, 5.0, 7.0])
    interval = grouped_jackknife_interval(4, 4, lambda kept: float(values[kept].mean()))
    reach = 3.18245 * 2.58199 / 2.0  # t of 3 degrees of freedom
    assert (interval.point, interval.low, interval.high) == pytest.approx((4.0, 4.0 - reach, 4.0 + reach), rel=1e-4)


@given(st.integers(20, 200), st.integers(2, 20))
@settings(max_examples=50, deadline=None)
def test_a_jackknife_leaves_every_example_out_once(n: int, groups: int) -> None:
    masks: list[np.ndarray] = []

    def statistic(kept: np.ndarray) -> float:
        masks.append(~kept)
        return float(kept.sum())

    grouped_jackknife_interval(n, groups, statistic)
    assert not masks[0].any()
    assert (np.sum(masks[1:], axis=0) == 1).all()
    sizes = [int(mask.sum()) for mask in masks[1:]]
    assert max(sizes) - min(sizes) <= 1


@given(arrays(np.float64, st.integers(25, 60), elements=numbers), st.integers(2, 25))
@settings(max_examples=50, deadline=None)
def test_a_jackknife_interval_holds_its_point(values: np.ndarray, groups: int) -> None:
    interval = grouped_jackknife_interval(len(values), groups, lambda kept: float(values[kept].mean()))
    assert interval.low <= interval.point <= interval.high


def test_groups_of_unequal_size_give_about_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=1_003)
    interval = grouped_jackknife_interval(1_003, 40, lambda kept: float(values[kept].mean()))
    assert interval.width == pytest.approx(2 * 2.02 * values.std() / math.sqrt(1_003), rel=0.3)


def test_the_jackknife_of_a_rank_correlation_is_near_its_bootstrap() -> None:
    random = np.random.default_rng(0)
    first = random.normal(size=300)
    pairs = np.stack([first, first + random.normal(size=300)], axis=1)
    jackknife = grouped_jackknife_interval(300, 50, lambda kept: spearman(pairs[kept]))
    bootstrap = bootstrap_interval(pairs, spearman, resamples=500)
    assert jackknife.point == bootstrap.point
    assert jackknife.width == pytest.approx(bootstrap.width, rel=0.4)


def test_a_jackknife_of_impossible_groups_or_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match="2 to 10 groups, not 11"):
        grouped_jackknife_interval(10, 11, lambda _: 0.0)
    with pytest.raises(InputError, match="not a finite number"):
        grouped_jackknife_interval(10, 5, lambda kept: 1.0 if kept.all() else math.nan)


# --- proportions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((1, 1, 7, 12), -0.507, -0.026),  # Bentur 2009, in Fagerland, Lydersen and Laake, Stat. Med. 33 (2014)
        ((59, 6, 16, 80), -0.1186, -0.0046),  # Cavo 2012, in Fagerland, Lydersen and Laake (2017), chapter 8
    ],
)
def test_newcombes_interval_is_the_published_one(table: tuple[int, int, int, int], low: float, high: float) -> None:
    interval = newcombe_interval(*table)
    digits = 3 if low == -0.507 else 4
    assert (round(interval.low, digits), round(interval.high, digits)) == (low, high)


def test_wilsons_interval_is_the_textbook_one() -> None:
    """81 of 263, from Newcombe's comparison of seven methods (1998): 0.2553 to 0.3662."""
    interval = wilson_interval(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(10, 10).high == 1.0
    with pytest.raises(UsageError, match="11 of 10"):
        wilson_interval(11, 10)


@given(counts, counts, counts, counts)
@settings(deadline=None)
def test_newcombes_interval_holds_its_point_and_turns_with_its_sides(a: int, b: int, c: int, d: int) -> None:
    assume(a + b + c + d > 0)
    interval, turned = newcombe_interval(a, b, c, d), newcombe_interval(a, c, b, d)
    assert -1.0 <= interval.low <= interval.point <= interval.high <= 1.0
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low), abs=1e-12)


@given(st.integers(1, 200), st.integers(1, 200))
@settings(deadline=None)
def test_no_flips_still_leave_room_for_some_and_more_examples_leave_less(right: int, wrong: int) -> None:
    interval, more = newcombe_interval(right, 0, 0, wrong), newcombe_interval(10 * right, 0, 0, 10 * wrong)
    assert interval.low < 0.0 < interval.high
    assert more.width < interval.width


@given(counts, counts, counts)
@settings(deadline=None)
def test_a_paired_ratio_holds_its_point_and_turns_over_with_its_sides(a: int, b: int, c: int) -> None:
    assume(a + b > 0 and a + c > 0)
    interval, turned = tang_interval(a, b, c), tang_interval(a, c, b)
    assert 0.0 <= interval.low < interval.point < interval.high
    assert (turned.low, turned.high) == pytest.approx((1 / interval.high, 1 / interval.low))


def test_a_paired_ratio_covers_the_true_one() -> None:
    """30 examples of two models that are right on 80 and 70 % of them, 65 % on both."""
    draws = np.random.default_rng(0).multinomial(30, [0.65, 0.15, 0.05, 0.15], size=4000)
    intervals = [tang_interval(*map(int, row[:3])) for row in draws]
    covered = np.mean([interval.low <= 0.8 / 0.7 <= interval.high for interval in intervals])
    assert 0.94 <= covered <= 0.98


def test_a_ratio_at_the_margin_is_let_through_as_often_as_is_said() -> None:
    """Of 97 % kept, a test at 97 % passes in 2.5 % of samples (Bonett and Price's interval: 3.5 %)."""
    draws = np.random.default_rng(1).multinomial(1500, [0.857, 0.003, 0.0296, 0.1104], size=3000)
    passed = np.mean([tang_interval(*map(int, row[:3])).low >= 0.97 for row in draws])
    assert 0.012 <= passed <= 0.029


def test_nothing_flipped_leaves_room_for_some() -> None:
    interval = tang_interval(144, 0, 0)
    z = stats.norm.ppf(0.975)  # the score is then (1 - r) / sqrt(r (1 - r) / 144) below 1
    assert interval.low == pytest.approx(1 / (1 + z**2 / 144)) and interval.high == pytest.approx(1 / interval.low)
    alone = tang_interval(0, 0, 20)  # the first is never right
    assert alone.point == alone.low == 0 < alone.high < 0.3
    with pytest.raises(UsageError, match="second side above 0"):
        tang_interval(0, 3, 0)


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="0 or more"):
        newcombe_interval(1, -1, 0, 0)
    with pytest.raises(UsageError, match="not all 0"):
        newcombe_interval(0, 0, 0, 0)
