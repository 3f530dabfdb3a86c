"""Which of the teacher's layers teaches which of the student's."""

from __future__ import annotations

from typing import Literal

from ...errors import UsageError
from .base import Sides

LayerMap = Literal["uniform", "last", "first", "similar"] | dict[int, int]
"""`uniform` spreads the student's layers evenly over the teacher's, the last on the last (PKD-skip, Sun et al. 2019;
TinyBERT); `last` and `first` pair as many of the teacher's last or first layers; `similar` takes for each the layer
whose hidden states are most like the student's own before training (CKA, Kornblith et al. 2019), in order; a mapping
names student layer: teacher layer, both from 0, or from the end where negative: `{-1: -1}` pairs the last of each."""


def layer_pairs(layers: LayerMap, sides: Sides) -> list[tuple[int, int]]:
    """(student layer, teacher layer) for every pair, in the student's order.

    Raises:
        UsageError: a map that names no layer, or one that a side does not have.
    """
    ours, theirs = sides.student.depth, sides.teacher.depth
    if isinstance(layers, dict):
        return _named(layers, ours, theirs)
    if layers == "similar":
        return _most_similar(sides)
    if ours > theirs:
        raise UsageError(
            f"The layer map {layers!r} needs a teacher at least as deep as the student ({theirs} and {ours} layers).",
            "Name the pairs: layers: {0: 0, 1: 0, ...}.",
        )
    if layers == "uniform":
        return [(layer, (layer + 1) * theirs // ours - 1) for layer in range(ours)]
    start = theirs - ours if layers == "last" else 0
    return [(layer, start + layer) for layer in range(ours)]


def _named(layers: dict[int, int], ours: int, theirs: int) -> list[tuple[int, int]]:
    if not layers:
        raise UsageError("The layer map names no layer.", "Name pairs as STUDENT: TEACHER, for example {0: 1, 1: 3}.")
    for student, teacher in layers.items():
        for side, layer, depth in (("student", student, ours), ("teacher", teacher, theirs)):
            if not -depth <= layer < depth:
                raise UsageError(f"The layer map names layer {layer} of the {side}, which has layers 0 to {depth - 1}.")
    return sorted((student % ours, teacher % theirs) for student, teacher in layers.items())


def _most_similar(sides: Sides) -> list[tuple[int, int]]:
    """The assignment of the greatest summed similarity in which no layer's teacher comes before that of the layer
    below, by dynamic programming."""
    similarity = sides.similarity()
    ours, theirs = similarity.shape
    best = [[0.0] * theirs for _ in range(ours)]
    came = [[0] * theirs for _ in range(ours)]
    for student in range(ours):
        for teacher in range(theirs):
            before = max(range(teacher + 1), key=lambda t: best[student - 1][t]) if student else 0
            came[student][teacher] = before
            best[student][teacher] = float(similarity[student, teacher]) + (best[student - 1][before] if student else 0)
    teacher = max(range(theirs), key=lambda t: best[-1][t])
    chosen = []
    for student in reversed(range(ours)):
        chosen.append((student, teacher))
        teacher = came[student][teacher]
    return chosen[::-1]
