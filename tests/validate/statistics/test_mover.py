"""Intervals of differences and ratios of independent estimates, and the laws that they keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.validate.statistics.intervals import wilson_interval
from limbeck.validate.statistics.mover import Estimate, difference, estimate_of, ratio

POSITIVE = st.floats(0.01, 1e4)
REACH = st.floats(0, 1e4)


@st.composite
def estimates(draw: st.DrawFn) -> Estimate:
    """Positive, and further from 0 than they reach."""
    value = draw(POSITIVE)
    return Estimate(value, value - draw(st.floats(0, 0.99)) * value, value + draw(REACH))


def test_a_difference_is_the_published_one() -> None:
    """Newcombe (1998), table II, method 10: 56/70 and 48/80 differ by 0.2, from 0.0524 to 0.3339."""
    first, second = (wilson_interval(hits, n) for hits, n in ((56, 70), (48, 80)))
    found = difference(*(Estimate(side.point, side.low, side.high) for side in (first, second)))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_a_point_moves_or_scales_the_interval() -> None:
    new, point = Estimate(0.9, 0.88, 0.93), estimate_of(0.6, None, None)
    assert difference(new, point) == pytest.approx((0.3, 0.28, 0.33))
    assert ratio(new, point) == pytest.approx((1.5, 0.88 / 0.6, 0.93 / 0.6))


def test_the_closed_form_of_a_ratio() -> None:
    """Donner and Zou (2012), equation for theta1 / theta2."""
    (x, xl, xu), (y, yl, yu) = (3.0, 2.5, 3.9), (2.0, 1.4, 2.2)
    low = (x * y - math.sqrt((x * y) ** 2 - xl * yu * (2 * x - xl) * (2 * y - yu))) / (yu * (2 * y - yu))
    high = (x * y + math.sqrt((x * y) ** 2 - xu * yl * (2 * x - xu) * (2 * y - yl))) / (yl * (2 * y - yl))
    assert ratio(Estimate(x, xl, xu), Estimate(y, yl, yu)) == pytest.approx((1.5, low, high))


@settings(max_examples=200, deadline=None)
@given(estimates(), estimates())
def test_a_ratio_excludes_1_where_the_difference_excludes_0(new: Estimate, old: Estimate) -> None:
    quotient, change = ratio(new, old), difference(new, old)
    assert quotient.low <= quotient.value <= quotient.high
    near = 1e-9 * max(new.value, old.value)  # the two are decided by rounding there
    if abs(change.low) > near:
        assert (quotient.low > 1) == (change.low > 0)
    if abs(change.high) > near:
        assert (quotient.high < 1) == (change.high < 0)


@settings(max_examples=100, deadline=None)
@given(estimates(), estimates(), REACH, st.floats(0, 0.5))
def test_less_certain_estimates_give_a_wider_interval(new: Estimate, old: Estimate, more: float, share: float) -> None:
    wide = Estimate(old.value, old.low - share * old.low, old.high + more)
    for of in (difference, ratio):
        narrow, found = of(new, old), of(new, wide)
        slack = 1e-9 * (1 + abs(narrow.value) + abs(narrow.high))
        assert found.low <= narrow.low + slack and found.high >= narrow.high - slack


@pytest.mark.parametrize("value", [-0.5, 0.0])
def test_a_value_below_zero_has_a_ratio_too(value: float) -> None:
    found = ratio(Estimate(value, value - 0.1, value + 0.1), Estimate(0.5, 0.4, 0.6))
    assert found.low < found.value < found.high
    assert found.value == value / 0.5


def test_a_reference_that_may_be_zero_bounds_nothing() -> None:
    found = ratio(Estimate(1.0, 0.9, 1.1), Estimate(0.5, -0.1, 1.0))
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_an_end_that_is_not_known_bounds_nothing() -> None:
    half, whole = estimate_of(0.9, 0.8, None), Estimate(0.6, 0.5, 0.7)
    assert difference(half, whole).high == math.inf and math.isfinite(difference(half, whole).low)
    assert ratio(half, whole).high == math.inf and ratio(half, whole).low > 1
    assert difference(whole, half).low == -math.inf
    assert ratio(whole, half).low == 0  # it may be any number of times as large


def test_arithmetic_adds_no_digits() -> None:
    points = [estimate_of(value, None, None) for value in (0.9, 0.91)]
    assert difference(*points).value == -0.01 and 0.9 - 0.91 != -0.01


def test_intervals_cover_what_they_say() -> None:
    """Means of 40 normal values on each side, 4,000 times: 95 % of the intervals hold the true difference and ratio."""
    random, n, truths = np.random.default_rng(0), 40, (3.0, 2.0)
    held = np.zeros(2)
    for _ in range(4000):
        sides = []
        for truth in truths:
            drawn = random.normal(truth, 1.0, n)
            reach = 2.0227 * drawn.std(ddof=1) / math.sqrt(n)  # Student's t, 39 degrees of freedom
            sides.append(Estimate(float(drawn.mean()), float(drawn.mean() - reach), float(drawn.mean() + reach)))
        for index, (of, truth) in enumerate(((difference, 1.0), (ratio, 1.5))):
            found = of(*sides)
            held[index] += found.low <= truth <= found.high
    assert np.all(np.abs(held / 4000 - 0.95) < 0.015)
