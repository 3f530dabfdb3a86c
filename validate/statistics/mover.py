"""Intervals of a difference and of a ratio of two estimates that were made apart, from their own intervals alone.

This is the method of variance estimates recovery (MOVER): each end of the new interval is found by adding the squares
of the distances that lead there. Newcombe, "Interval estimation for the difference between independent proportions:
comparison of eleven methods", Statistics in Medicine 17 (1998) 873-890, method 10 (square-and-add); Zou and Donner,
"Construction of confidence limits about effect measures: a general approach", Statistics in Medicine 27 (2008)
1693-1702; for ratios Donner and Zou, "Closed-form confidence intervals for functions of the normal mean and standard
deviation", Statistical Methods in Medical Research 21 (2012) 347-359, and Newcombe, "MOVER-R confidence intervals for
ratios and products of two independently estimated quantities", the same journal 25 (2016) 1774-1778.

Two reports may be made on the same examples, but they keep no values by example: their estimates are treated as
independent, which makes the interval wider than a paired one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..records.report import Metric

_DIGITS = 14


class Estimate(NamedTuple):
    """A value and the ends of its 95% interval; an end that is not known is infinite, a value without an interval is
    its own interval."""

    value: float
    low: float
    high: float

    @property
    def below(self) -> float:
        """How far the interval reaches below the value: 0 where it is not centred and lies above."""
        return max(0.0, self.value - self.low)

    @property
    def above(self) -> float:
        """How far the interval reaches above the value."""
        return max(0.0, self.high - self.value)


def has_interval(metric: Metric) -> bool:
    """Whether at least one end of its interval is known."""
    return metric.low is not None or metric.high is not None


def estimate_of(value: float, low: float | None, high: float | None) -> Estimate:
    """As the report has it: without both ends a point, without one of them unbounded there."""
    if low is None and high is None:
        return Estimate(value, value, value)
    return Estimate(value, -math.inf if low is None else low, math.inf if high is None else high)


def difference(new: Estimate, old: Estimate) -> Estimate:
    """`new - old`, for finite values."""
    change = _without_noise(new.value - old.value, max(abs(new.value), abs(old.value)))
    return Estimate(change, change - math.hypot(new.below, old.above), change + math.hypot(new.above, old.below))


def ratio(new: Estimate, old: Estimate) -> Estimate:
    """`new / old`, for finite values and an old one above 0; without bounds where the old interval reaches 0."""
    point = _without_noise(new.value / old.value, abs(new.value / old.value))
    # in units of the old value, so that no square overflows that need not
    below, above, up, down = (reach / old.value for reach in (new.below, new.above, old.above, old.below))
    if not any((below, above, up, down)):
        return Estimate(point, point, point)
    if down >= 1.0:
        return Estimate(point, -math.inf, math.inf)
    low, high = _lowest_ratio(point, below, up, down), -_lowest_ratio(-point, above, up, down)
    if math.isnan(low) or math.isnan(high):  # squares that overflowed
        return Estimate(point, -math.inf, math.inf)
    return Estimate(point, min(low, point), max(high, point))


def _without_noise(value: float, size: float) -> float:
    """Without the last digits, which are those of the arithmetic: 0.90 - 0.91 is -0.01, and keeps that limit."""
    if not 1e-300 < size < 1e300:
        return value
    return round(value, _DIGITS - 1 - math.floor(math.log10(size)))


def _lowest_ratio(point: float, below: float, up: float, down: float) -> float:
    """The least R for which the interval of `new - R old` holds 0: a root of (1 - b^2) R^2 - 2 point R + point^2 -
    below^2, where b is the reach of the old value that matters for R's sign."""
    if math.isinf(below):
        return -math.inf
    above_zero = point >= below
    reach = up if above_zero else down
    if math.isinf(reach):
        return 0.0
    product = (point - below) * (point + below)
    root = math.sqrt(max(below * below + reach * reach * product, 0.0))
    if point > 0:  # the form that loses no digits, and holds where the old value may be twice as large
        return product / (point + root)
    return 0.0 if above_zero else (point - root) / (1.0 - reach * reach)
