"""What is kept of a teacher that knows no more than chance is left out, or said to mean little."""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.validate.records.report import Metric
from limbeck.validate.slices.chance import weighed_against_chance


def metric(name: str, teacher: float | None, count: int) -> Metric:
    return Metric(name=name, value=0.5, teacher=teacher, count=count, higher_is_better=True, description="")


@pytest.mark.parametrize(
    ("teacher", "count", "given"),
    [
        (0.08, 1500, False),
        (0.09, 1500, True),
        (0.3, 100, False),
        (0.8, 100, True),
        (-0.5, 1500, False),
        (1.0, 40, True),
    ],
)
def test_what_is_kept_of_no_correlation_is_left_out(teacher: float, count: int, given: bool) -> None:
    """3.29 standard errors of a correlation near 0 are 0.085 at 1,500 examples."""
    metrics = [metric("spearman", teacher, count), metric("spearman_kept", None, count)]
    kept, said = weighed_against_chance(metrics, np.zeros(count))
    assert [found.name for found in kept] == ["spearman", *["spearman_kept"][: int(given)]]
    assert (said == []) is given
    assert given or f"no spearman_kept: the teacher's own {teacher:.3f} is not above 0" in said[0]


@pytest.mark.parametrize(("teacher", "doubted"), [(0.55, True), (0.7, False), (0.4, True)])
def test_what_is_kept_of_a_guess_is_said_to_mean_little(teacher: float, doubted: bool) -> None:
    metrics = [metric("accuracy", teacher, 200), metric("accuracy_kept", None, 200)]
    kept, said = weighed_against_chance(metrics, np.arange(200) % 2)
    assert kept == metrics
    assert bool(said) is doubted
    assert not doubted or "commonest label's share of 0.500" in said[0]


def test_there_is_nothing_to_say_without_a_teacher_or_labels() -> None:
    assert weighed_against_chance([metric("accuracy", None, 50)], np.zeros(50))[1] == []
    assert weighed_against_chance([metric("perplexity", 9.0, 50), metric("accuracy_kept", None, 50)], None)[1] == []
