"""Which of the teacher's layers teaches which of the student's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.distill.objectives.base import Shape, Sides
from limbeck.distill.objectives.layer_maps import layer_pairs
from limbeck.errors import UsageError


def sides(student: int, teacher: int, similarity: Any = None) -> Sides:
    shapes = [Shape(depth=depth, width=8, heads=2, output_width=3) for depth in (student, teacher)]

    def measured() -> np.ndarray:
        assert similarity is not None, "measured, although nobody asked"
        return np.asarray(similarity)

    return Sides(shapes[0], shapes[1], measured)


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "pairs"),
    [
        ("uniform", 3, 6, [(0, 1), (1, 3), (2, 5)]),  # every second one: PKD-skip
        ("uniform", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("uniform", 4, 6, [(0, 0), (1, 2), (2, 3), (3, 5)]),
        ("uniform", 2, 2, [(0, 0), (1, 1)]),
        ("last", 2, 5, [(0, 3), (1, 4)]),
        ("first", 2, 5, [(0, 0), (1, 1)]),
        ({1: 4, 0: 2}, 2, 5, [(0, 2), (1, 4)]),
        ({-1: -1}, 3, 6, [(2, 5)]),
        ({-2: -6, 2: 3}, 3, 6, [(1, 0), (2, 3)]),
    ],
)
def test_pairs_of_a_map(layers: Any, student: int, teacher: int, pairs: list[tuple[int, int]]) -> None:
    assert layer_pairs(layers, sides(student, teacher)) == pairs


@given(student=st.integers(1, 12), more=st.integers(0, 12))
def test_every_student_layer_has_a_teacher_of_its_own_and_uniform_ends_on_the_last(student: int, more: int) -> None:
    teacher = student + more
    for layers in ("uniform", "last", "first"):
        ours, theirs = zip(*layer_pairs(layers, sides(student, teacher)), strict=True)  # type: ignore[arg-type]
        assert ours == tuple(range(student))
        assert sorted(set(theirs)) == list(theirs)
        assert theirs[0] >= 0 and theirs[-1] < teacher
        if layers == "uniform":
            assert theirs[-1] == teacher - 1


def test_similar_finds_the_planted_layers() -> None:
    planted = [0, 2, 3]
    similarity = np.full((3, 5), 0.3)
    similarity[range(3), planted] = 0.9
    assert layer_pairs("similar", sides(3, 5, similarity)) == [(0, 0), (1, 2), (2, 3)]


def test_similar_keeps_the_order_of_the_layers() -> None:
    # Each on its own, the first would take layer 2 and the second layer 0; in order the sum of 0.9 and 0.2 is the best.
    assert layer_pairs("similar", sides(2, 3, [[0.1, 0.1, 0.9], [0.8, 0.1, 0.2]])) == [(0, 2), (1, 2)]
    assert layer_pairs("similar", sides(2, 3, [[0.5, 0.1, 0.6], [0.1, 0.9, 0.2]])) == [(0, 0), (1, 1)]


@given(st.integers(1, 4).flatmap(lambda rows: st.lists(
    st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=rows, max_size=rows)))  # fmt: skip
def test_similar_is_the_best_assignment_in_order(similarity: list[list[float]]) -> None:
    from itertools import combinations_with_replacement

    chosen = [teacher for _, teacher in layer_pairs("similar", sides(len(similarity), 4, similarity))]
    best = max(
        sum(row[teacher] for row, teacher in zip(similarity, order, strict=True))
        for order in combinations_with_replacement(range(4), len(similarity))
    )
    assert chosen == sorted(chosen)
    assert sum(row[teacher] for row, teacher in zip(similarity, chosen, strict=True)) == pytest.approx(best)


def test_similar_serves_a_student_deeper_than_its_teacher() -> None:
    assert layer_pairs("similar", sides(3, 2, [[0.9, 0.1], [0.8, 0.7], [0.1, 0.6]])) == [(0, 0), (1, 0), (2, 1)]


@pytest.mark.parametrize(
    ("layers", "student", "said"),
    [
        ({}, 2, "The layer map names no layer"),
        ({2: 0}, 2, "names layer 2 of the student, which has layers 0 to 1"),
        ({0: 6}, 2, "names layer 6 of the teacher, which has layers 0 to 5"),
        ({-3: 0}, 2, "names layer -3 of the student"),
        ("uniform", 7, r"needs a teacher at least as deep as the student \(6 and 7 layers\)"),
        ("last", 7, "'last' needs a teacher at least as deep"),
        ("first", 7, "'first' needs a teacher at least as deep"),
    ],
)
def test_maps_that_cannot_be_are_refused(layers: Any, student: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        layer_pairs(layers, sides(student, 6))
