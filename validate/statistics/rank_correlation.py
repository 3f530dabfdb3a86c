"""Spearman's rank correlation, of many draws of the same examples at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

Ranks = Callable[[np.ndarray], np.ndarray]
"""The ranks of examples among those that were drawn: counts [draws, n] -> [draws, n]."""


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's correlation of values [n] and [n]; not a number where either side has one value only."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:  # equal values have no ranks; SciPy warns of each
        return float("nan")
    return float(stats.spearmanr(left, right).statistic)


def ranks_by_count(values: np.ndarray) -> Ranks:
    """The ranks of values [n] among those that were drawn, by how often each was: counts [draws, n] -> [draws, n].

    Equal values share their mean rank, and ranks are measured from the middle one. Values are sorted once: a draw only
    changes how many stand below each, which is why 1,000 draws cost about as much as 10 sorted anew.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    new = np.r_[True, ordered[1:] != ordered[:-1]]
    starts, place = np.flatnonzero(new), np.empty(len(values), dtype=np.int64)
    place[order] = np.cumsum(new) - 1

    def ranks(counts: np.ndarray) -> np.ndarray:
        alike = np.add.reduceat(counts[:, order], starts, axis=1)
        below_or_in = np.cumsum(alike, axis=1)
        return np.asarray((below_or_in - (alike + below_or_in[:, -1:]) / 2)[:, place])

    return ranks


def correlation_of_ranks(left: np.ndarray, right: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each draw, [draws], from both sides' `ranks_by_count` and the counts, all [draws, n];
    not a number where a side has one value only."""
    weighted = counts * left
    both = np.einsum("ij,ij->i", weighted, right)
    squares = np.einsum("ij,ij->i", weighted, left) * np.einsum("ij,ij,ij->i", counts, right, right)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares > 0, both / np.sqrt(squares), np.nan)
