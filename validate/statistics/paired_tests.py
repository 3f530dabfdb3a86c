"""P-values: of flips between two models on the same examples, and of many slices together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided: how likely flips are to be split at least as unevenly as these when each is as
    likely to go one way as the other. 1 where nothing flipped.

    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947); the exact form is the sign test on the flips (Fay, "Two-sided exact tests and matching
    confidence intervals for discrete data", The R Journal 2 (2010)).

    Args:
        only_first, only_second: how many examples one of the two got right and the other did not.
    """
    flips = only_first + only_second
    return float(stats.binomtest(only_first, flips).pvalue) if flips else 1.0


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """P-values to be held against one level however many there are: the chance that any of the true hypotheses is
    rejected stays below it, however they depend on each other.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979): the
    i-th smallest of m (i from 0) times m - i, made to rise, at most 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1.0)
    return adjusted.tolist()
