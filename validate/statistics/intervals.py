"""Intervals for what a validation measures on a sample: paired differences, ratios of times, rank correlations, flips.

Every function is seeded, and takes whole examples (or rounds) as the unit that is drawn again: values that belong to
one example stay together, so a comparison of two models on the same examples is always paired.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

from ...errors import InputError, UsageError

Values = NDArray[np.float64]
Statistic = Callable[[Values], float]
OfCounts = Callable[[Values], Values]
"""A statistic of how often each example was drawn: float64 [draws, examples] -> [draws]. A count may be 0."""

_QUANTILES_A_UNIT = 256
_JACKKNIFE_GROUPS = 200
_DRAWN_AT_ONCE = 2_000_000
"""Numbers held in memory while resampling."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it. `low <= point <= high` always holds."""

    point: float
    low: float
    high: float
    confidence: float
    method: str

    @property
    def width(self) -> float:
        """How far apart the ends are."""
        return self.high - self.low


def _interval(point: float, low: float, high: float, confidence: float, method: str) -> Interval:
    """A bootstrap's percentiles, or rounding, can leave out the point they surround: they are stretched to it then."""
    return Interval(point, min(low, point), max(high, point), confidence, method)


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise UsageError(f"A confidence of {confidence} is outside (0, 1).")


def bootstrap_interval(
    values_by_example: Values,
    statistic: Statistic,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    of_counts: OfCounts | None = None,
) -> Interval:
    """The BCa bootstrap interval of any statistic of the examples.

    Bias-corrected and accelerated: Efron, "Better bootstrap confidence intervals", JASA 82 (1987); DiCiccio and Efron,
    "Bootstrap confidence intervals", Statistical Science 11 (1996). As `scipy.stats.bootstrap`, except that it does not
    give NaN where both sides are identical, and that the acceleration comes from a jackknife that leaves out one of at
    most 200 groups at a time instead of one example: the same thing up to 200 examples, and bearable above.

    Where no correction is defined (every resample on one side of the point), the plain percentiles are given. When
    every resample gives the same value (both sides identical) the interval has no width: that says that this sample
    shows no variation, not that there is none. For counts of flips use `newcombe_interval`.

    Args:
        values_by_example: [examples] or [examples, columns]; a row is drawn whole.
        statistic: of rows drawn with replacement, same shape as `values_by_example`; in any unit. Their order must not
            matter to it.
        of_counts: the same statistic, of many draws at once, where there is a quicker way to it than row by row.

    Raises:
        InputError: fewer than 2 examples, or the statistic is not a finite number on them.
    """
    _check_confidence(confidence)
    values = np.asarray(values_by_example, dtype=np.float64)
    if len(values) < 2:
        raise InputError(f"An interval needs at least 2 examples; there are {len(values)}.")
    point = float(statistic(values))
    if not math.isfinite(point):
        raise InputError(f"The statistic is {point} on these {len(values)} examples, so it has no interval.")
    of_counts = of_counts or functools.partial(_of_drawn, values, statistic)
    drawn = np.concatenate([of_counts(counts) for counts in _draws(len(values), resamples, seed)])
    drawn = drawn[np.isfinite(drawn)]  # a resample can be degenerate, as a rank correlation of equal values is
    if len(drawn) == 0:
        raise InputError(f"The statistic is undefined on every resample of these {len(values)} examples.")
    low, high, method = _bca_tails(drawn, point, len(values), of_counts, confidence)
    lower, upper = np.quantile(drawn, [low, high])
    return _interval(point, float(lower), float(upper), confidence, method)


def _draws(n: int, resamples: int, seed: int) -> Iterator[Values]:
    """How often each of n examples was drawn, [some draws, n] at a time."""
    random = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        many = range(min(at_once, resamples - start))
        yield np.array([np.bincount(random.integers(0, n, n), minlength=n) for _ in many], dtype=np.float64)


def _of_drawn(values: Values, statistic: Statistic, counts: Values) -> Values:
    return np.array([float(statistic(np.repeat(values, each, axis=0))) for each in counts.astype(np.int64)])


def _bca_tails(drawn: Values, point: float, n: int, of_counts: OfCounts, confidence: float) -> tuple[float, float, str]:
    """Which quantiles of the bootstrap distribution bound the interval, and by which method."""
    tail = (1.0 - confidence) / 2.0
    plain = (tail, 1.0 - tail, "bootstrap, percentile")
    below = float(np.mean(drawn < point) + np.mean(drawn == point) / 2.0)  # ties count half, as in SciPy
    if not 0.0 < below < 1.0 or np.ptp(drawn) == 0.0:
        return plain
    groups = min(n, _JACKKNIFE_GROUPS)
    members, at_once = _groups(n, groups, seed=0), max(1, _DRAWN_AT_ONCE // n)
    left_out = [np.arange(groups)[start : start + at_once, None] for start in range(0, groups, at_once)]
    without = np.concatenate([of_counts((members != some).astype(np.float64)) for some in left_out])
    away = without.mean() - without
    spread = float(np.sum(away**2)) ** 1.5
    if not math.isfinite(spread) or spread == 0.0:
        return plain
    acceleration = float(np.sum(away**3)) / (6.0 * spread)
    bias = float(stats.norm.ppf(below))
    ends = []
    for z in stats.norm.ppf([tail, 1.0 - tail]):
        bent = 1.0 - acceleration * (bias + z)
        if bent <= 0.0:
            return plain
        ends.append(float(stats.norm.cdf(bias + (bias + z) / bent)))
    return ends[0], ends[1], "bootstrap, BCa"


def paired_ratio_interval(
    numerator: Values, denominator: Values, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """The interval of median(numerator) / median(denominator), both pooled over units (rounds) that were measured in
    turn; a unit is drawn with both its sides.

    A bootstrap over few units is too narrow, so its percentiles are moved outwards as Student's t asks: the expanded
    percentile interval of Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69
    (2015), section 5.3. It cannot reach beyond what was seen, so 3 units cover about 80 % where 95 % is asked; 5 and
    more cover what they say (simulated). A unit of many values enters as 256 evenly spaced quantiles of it.

    Args:
        numerator, denominator: [units] or [units, values], positive; the number of values may differ between the two.

    Raises:
        UsageError: fewer than 3 units, units that do not match, or values that are not positive.
    """
    _check_confidence(confidence)
    upper, lower = (np.atleast_2d(np.asarray(side, dtype=np.float64).T).T for side in (numerator, denominator))
    units = len(upper)
    if units != len(lower):
        raise UsageError(f"A paired ratio needs the same units on both sides; there are {units} and {len(lower)}.")
    if units < 3:
        raise UsageError(f"An interval over rounds needs at least 3 of them; there are {units}.")
    if not (np.all(upper > 0.0) and np.all(lower > 0.0)):
        raise UsageError("A ratio of medians needs positive values.")
    point = float(np.median(upper) / np.median(lower))
    drawn = _resampled_ratios(_thinned(upper), _thinned(lower), resamples, seed)
    reach = float(stats.t.ppf((1.0 + confidence) / 2.0, units - 1)) * math.sqrt(units / (units - 1))
    tail = float(stats.norm.cdf(-reach))
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return _interval(point, float(low), float(high), confidence, "paired bootstrap over rounds, expanded percentile")


def _thinned(values: Values) -> Values:
    if values.shape[1] <= _QUANTILES_A_UNIT:
        return values
    levels = (np.arange(_QUANTILES_A_UNIT) + 0.5) / _QUANTILES_A_UNIT
    return np.quantile(values, levels, axis=1).T


def _resampled_ratios(upper: Values, lower: Values, resamples: int, seed: int) -> Values:
    random = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // max(upper.size, lower.size))
    ratios = []
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        rows = random.integers(0, len(upper), (count, len(upper)))
        over, under = (np.median(side[rows].reshape(count, -1), axis=1) for side in (upper, lower))
        ratios.append(over / under)
    return np.concatenate(ratios)


def grouped_jackknife_interval(
    n: int,
    groups: int,
    statistic_of: Callable[[NDArray[np.bool_]], float],
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """The delete-a-group jackknife interval, for statistics too costly to bootstrap (a rank correlation over all pairs
    of 1,500 texts is one): `groups` + 1 evaluations in all.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11; Shao and Tu, The Jackknife and Bootstrap
    (1995), section 2.3. The variance is that of the groups' pseudo-values, weighted for groups of unequal size: Busing,
    Meijer and van der Leeden, "Delete-m jackknife for unequal m", Statistics and Computing 9 (1999). The interval is
    the point, plus and minus Student's t with `groups` - 1 degrees of freedom times the standard error.

    Args:
        n: how many examples there are; they are dealt to the groups at random.
        groups: 20 to 50 are usual; at least 2 and at most `n`.
        statistic_of: the statistic of the examples that a mask [n] keeps (true); the point is that of all kept. Must
            be smooth (a median is not).

    Raises:
        UsageError: fewer than 2 groups, or more than examples.
        InputError: the statistic is not a finite number.
    """
    _check_confidence(confidence)
    if not 2 <= groups <= n:
        raise UsageError(f"A jackknife of {n} examples takes 2 to {n} groups, not {groups}.")
    members = _groups(n, groups, seed)
    point = float(statistic_of(np.ones(n, dtype=np.bool_)))
    without = np.array([float(statistic_of(members != group)) for group in range(groups)])
    if not (math.isfinite(point) and np.all(np.isfinite(without))):
        raise InputError(f"The statistic is not a finite number on these {n} examples, or on a part of them.")
    share = np.bincount(members, minlength=groups) / n
    centre = groups * point - float(np.sum((1.0 - share) * without))
    pseudo = point / share - (1.0 / share - 1.0) * without
    variance = float(np.mean((pseudo - centre) ** 2 / (1.0 / share - 1.0)))
    reach = float(stats.t.ppf((1.0 + confidence) / 2.0, groups - 1)) * math.sqrt(variance)
    return Interval(point, point - reach, point + reach, confidence, f"jackknife over {groups} groups")


def _groups(n: int, groups: int, seed: int) -> NDArray[np.int64]:
    """The group of each example, [n]; sizes differ by one at most."""
    return np.random.default_rng(seed).permutation(np.arange(n, dtype=np.int64) % groups)


def newcombe_interval(
    both: float, only_first: float, only_second: float, neither: float, confidence: float = 0.95
) -> Interval:
    """The interval of a paired difference of two proportions, first minus second: accuracy on the same examples, flips.

    Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data",
    Statistics in Medicine 17 (1998) 2635-2650, method 10: Wilson intervals of the two proportions, added in square with
    their (continuity-corrected) correlation. It has a width even when nothing flipped, which a bootstrap has not.

    Args:
        both, only_first, only_second, neither: how many examples both, one or none of the two got right; not whole
            numbers where examples that are not independent count as fewer (`metrics.drafts.design_effect`).

    Raises:
        UsageError: a negative count, or no examples.
    """
    _check_confidence(confidence)
    counts = (both, only_first, only_second, neither)
    n = sum(counts)
    if min(counts) < 0 or n == 0:
        raise UsageError(f"Counts of paired outcomes must be 0 or more, and not all 0; these are {counts}.")
    first, second = (wilson_interval(both + only, n, confidence) for only in (only_first, only_second))
    phi = _corrected_phi(*counts)
    down, up = first.point - first.low, second.high - second.point
    below = math.sqrt(max(down**2 - 2.0 * phi * down * up + up**2, 0.0))
    up, down = first.high - first.point, second.point - second.low
    above = math.sqrt(max(up**2 - 2.0 * phi * up * down + down**2, 0.0))
    difference = (only_first - only_second) / n
    return Interval(difference, max(difference - below, -1.0), min(difference + above, 1.0), confidence, "Newcombe 10")


def tang_interval(both: float, only_first: float, only_second: float, confidence: float = 0.95) -> Interval:
    """The interval of a paired ratio of two proportions, first over second: what is kept of an accuracy on the same
    examples. Those that neither got right say nothing of a ratio.

    The ratios that a score test does not reject: Tang, Tang and Chan, "On tests of equivalence via non-unity relative
    risk for matched-pair design", Statistics in Medicine 22 (2003) 1217-1233; Fagerland, Lydersen and Laake,
    Statistical Analysis of Contingency Tables (2017), chapter 8. It has a width even when nothing flipped, which a
    bootstrap has not.

    Args:
        both, only_first, only_second: how many examples both or one of the two got right; not whole numbers where
            examples that are not independent count as fewer (`metrics.drafts.design_effect`).

    Raises:
        UsageError: a negative count, or none that the second got right.
    """
    _check_confidence(confidence)
    counts = (both, only_first, only_second)
    first, second = both + only_first, both + only_second
    if min(counts) < 0 or second == 0:
        raise UsageError(f"A paired ratio needs counts of 0 or more, and a second side above 0; these are {counts}.")
    z = float(stats.norm.ppf((1.0 + confidence) / 2.0))
    point, one = first / second, 1.0 / sum(counts)

    def end(sign: int) -> float:
        """The ratio at which the test just rejects, from the point on outwards; near enough to 0 it always does."""
        edge = math.log(max(point, one))
        while sign * _tang_score(math.exp(edge), *counts) > -z:
            edge += sign
        return math.exp(brentq(lambda at: _tang_score(math.exp(at), *counts) + sign * z, edge - sign, edge))

    return _interval(point, end(-1) if first else 0.0, end(1), confidence, "Tang score")


def _tang_score(ratio: float, both: float, only_first: float, only_second: float) -> float:
    """The score statistic of a paired ratio; it falls as the ratio that is tested grows."""
    first, second, some = both + only_first, both + only_second, both + only_first + only_second
    half = (second * ratio**2 - some - only_second) / (2.0 * (1.0 + ratio))
    product = only_second * (1.0 - ratio) * some / (1.0 + ratio)
    expected = -half + math.sqrt(max(half * half - product, 0.0))  # of those that the second alone got right
    variance = (1.0 + ratio) * expected + some * (ratio - 1.0)
    return (first - second * ratio) / math.sqrt(variance) if variance > 0.0 else 0.0


def _wilson_limits(successes: float, n: float, z: float) -> tuple[float, float]:
    middle, reach = 2 * successes + z * z, z * math.sqrt(z * z + 4 * successes * (1 - successes / n))
    return (middle - reach) / (2 * (n + z * z)), (middle + reach) / (2 * (n + z * z))


def _corrected_phi(both: float, only_first: float, only_second: float, neither: float) -> float:
    """Correlation of the two outcomes, its numerator drawn towards 0 by half the sample where it is positive."""
    n = both + only_first + only_second + neither
    scale = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if scale == 0:
        return 0.0
    product = float(both * neither - only_first * only_second)
    return (max(product - n / 2.0, 0.0) if product > 0.0 else product) / math.sqrt(scale)


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of one proportion: Wilson, "Probable inference", JASA 22 (1927).

    Raises:
        UsageError: not 0 to `n` successes of at least 1.
    """
    _check_confidence(confidence)
    if not 0 <= successes <= n or n == 0:
        raise UsageError(f"{successes} of {n} is not a proportion.")
    z = float(stats.norm.ppf((1.0 + confidence) / 2.0))
    low, high = _wilson_limits(successes, n, z)
    # at 0 and n a bound is the proportion itself; rounding must not put it on the other side
    return _interval(successes / n, max(low, 0.0), min(high, 1.0), confidence, "Wilson")
