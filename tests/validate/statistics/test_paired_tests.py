"""P-values against hand-worked ones and the laws that they keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from limbeck.validate.records.report import Candidate, Metric, Report
from limbeck.validate.rendering import render_html
from limbeck.validate.statistics.paired_tests import holm_adjusted, mcnemar_p_value


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 2**5), (10, 2, 2 * (1 + 12 + 66) / 2**12), (7, 7, 1.0)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar_p_value(only_first, only_second) == pytest.approx(p)
    assert mcnemar_p_value(only_second, only_first) == pytest.approx(p)


def test_mcnemar_rejects_no_more_often_than_it_says() -> None:
    flips = np.random.default_rng(0).multinomial(400, [0.9, 0.05, 0.05], 2000)[:, 1:]
    assert np.mean([mcnemar_p_value(*map(int, both)) < 0.05 for both in flips]) <= 0.05


def test_holm_by_hand() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, the last made to rise
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([0.7, 0.9]) == [1.0, 1.0]
    assert holm_adjusted([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.data())
def test_holm_keeps_the_order_and_never_makes_a_p_value_smaller(p_values: list[float], data: st.DataObject) -> None:
    adjusted = holm_adjusted(p_values)
    assert all(0 <= before <= after <= 1 for before, after in zip(p_values, adjusted, strict=True))
    assert sorted(adjusted) == [adjusted[at] for at in np.argsort(p_values, kind="stable")]
    assert adjusted[int(np.argmin(p_values))] == pytest.approx(min(1, min(p_values) * len(p_values)))
    # a smaller p-value of one makes nothing less significant
    at = data.draw(st.integers(0, len(p_values) - 1))
    smaller = [*p_values[:at], p_values[at] / 2, *p_values[at + 1 :]]
    assert all(new <= old + 1e-12 for new, old in zip(holm_adjusted(smaller), adjusted, strict=True))


def test_holm_cries_wolf_once_in_forty_over_twenty_slices() -> None:
    p_values = stats.norm.sf(np.random.default_rng(1).normal(size=(2000, 20)))
    alone, together = (
        (p_values < 0.025).any(axis=1).mean(),
        np.mean([min(holm_adjusted(list(p))) < 0.025 for p in p_values]),
    )
    assert alone > 0.35 and together < 0.035


def test_the_p_value_of_flips_stands_in_the_report() -> None:
    told = Metric(name="f", value=0.0, higher_is_better=True, description="A difference.", p_value=0.0312)
    candidate = Candidate(name="a", kind="artifact", backend="onnx", precision="fp32", path="out", metrics=[told])
    report = Report(kind="validation", title="t", created="", command="", candidates=[candidate])
    assert "McNemar's exact test: p = 0.0312" in render_html(report)
    bare = candidate.model_copy(update={"metrics": [told.model_copy(update={"p_value": None})]})
    assert "McNemar" not in render_html(report.model_copy(update={"candidates": [bare]}))
