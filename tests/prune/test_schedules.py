"""Schedules of sparsity: their values by hand, and what all of them have in common."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import UsageError
from limbeck.prune.schedules import SCHEDULES, get_schedule, masks_at


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cubic", [0, 0.4625, 0.7, 0.7875, 0.8]),  # 0.8 * (1 - [1, 27/64, 1/8, 1/64, 0])
        ("linear", [0, 0.2, 0.4, 0.6, 0.8]),
        ("exponential", [0, 0.33126, 0.55279, 0.70093, 0.8]),  # what is left: 0.2 ** [0, 1/4, 1/2, 3/4, 1]
        ("one-shot", [0.8, 0.8, 0.8, 0.8, 0.8]),
    ],
)
def test_values_by_hand(name: str, values: list[float]) -> None:
    at = get_schedule(name).at
    assert [at(0.8, done / 4) for done in range(5)] == pytest.approx(values, abs=1e-5)


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.floats(0.01, 0.99),
    st.integers(0, 50),
    st.integers(0, 200),
    st.integers(1, 30),
)
def test_masks_grow_to_the_target(name: str, target: float, first: int, way: int, every: int) -> None:
    masks = masks_at(name, target, first, first + way, every)
    shares = [masks[step] for step in sorted(masks)]
    assert all(before <= after for before, after in pairwise(shares))
    assert (min(masks), max(masks)) == (first, first + way)
    assert shares[-1] == target
    assert min(shares) >= 0
    steps = sorted(masks)
    assert all(after - before <= every for before, after in pairwise(steps))


def test_each_says_where_it_comes_from() -> None:
    assert all(schedule.formula and schedule.paper for schedule in SCHEDULES.values())


def test_an_unknown_one_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match=r"'qubic'; there are cubic, linear, expon.*Did you mean 'cubic'"):
        get_schedule("qubic")
