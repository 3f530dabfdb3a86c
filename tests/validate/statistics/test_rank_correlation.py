"""Rank correlations of many draws at once against SciPy's of each draw."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from limbeck.validate.statistics.intervals import bootstrap_interval
from limbeck.validate.statistics.rank_correlation import correlation_of_ranks, ranks_by_count, spearman

VALUES = arrays(np.float64, 12, elements=st.integers(0, 5))
COUNTS = arrays(np.float64, (3, 12), elements=st.integers(0, 3))


@given(VALUES, VALUES, COUNTS)
def test_a_draw_has_the_ranks_and_the_correlation_of_its_rows(
    left: np.ndarray, right: np.ndarray, counts: np.ndarray
) -> None:
    ranks = [ranks_by_count(side)(counts) for side in (left, right)]
    found = correlation_of_ranks(*ranks, counts)
    for draw, often in enumerate(counts.astype(int)):
        drawn = np.repeat(np.arange(12), often)
        for side, given_ranks in zip((left, right), ranks, strict=True):
            expected = stats.rankdata(side[drawn]) - (len(drawn) + 1) / 2
            np.testing.assert_allclose(given_ranks[draw][drawn], expected)
        expected = spearman(left[drawn], right[drawn]) if len(drawn) > 1 else np.nan
        np.testing.assert_allclose(found[draw], expected, atol=1e-12)


def test_a_bootstrap_by_counts_is_the_bootstrap_of_rows() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(80, 2))
    rows[:, 1] += rows[:, 0]
    left, right = (ranks_by_count(column) for column in rows.T)
    by_row = bootstrap_interval(rows, lambda drawn: spearman(drawn[:, 0], drawn[:, 1]), 300)
    by_count = bootstrap_interval(
        rows,
        lambda drawn: spearman(drawn[:, 0], drawn[:, 1]),
        300,
        of_counts=lambda counts: correlation_of_ranks(left(counts), right(counts), counts),
    )
    assert (by_count.low, by_count.high) == (pytest.approx(by_row.low), pytest.approx(by_row.high))
    assert by_count.method == by_row.method == "bootstrap, BCa"
