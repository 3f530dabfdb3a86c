"""Embeddings as people use them: of every query, whether its own passage is the nearest, and whether a candidate ranks
the passages as its teacher does. Embeddings are [2 n, width]: n queries, then their n passages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import stats

_QUERIES_AT_ONCE = 256
_SAME = 1e-5
"""Passages whose cosine is this near to 1 for the teacher are one passage: data often asks several questions of one."""


def first_hits(candidate: np.ndarray, teacher: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Whether each query's nearest passage, among all, is its own (recall at 1), bool [n], for candidate and teacher.

    Passages that are alike to the teacher count as one; without a teacher every passage stands for itself.
    """
    n = len(candidate) // 2
    place = np.arange(n)
    nearest = _nearest(candidate)
    if teacher is None:
        return nearest == place, None
    passages = unit(teacher[n:])
    theirs = _nearest(teacher)
    ours, taught = (np.sum(passages * passages[side], axis=1) >= 1 - _SAME for side in (nearest, theirs))
    return ours, taught


def ranking_agreement(teacher: np.ndarray, candidate: np.ndarray, most: int) -> np.ndarray:
    """For each of the first `most` queries, Spearman's correlation of the teacher's and the candidate's cosines to the
    first `most` passages, float64 [queries]; 0 where a side tells no passage from another."""
    n = len(candidate) // 2
    few = min(n, most)
    kept = np.r_[:few, n : n + few]
    agreed = []
    for left, right in zip(_cosines(teacher[kept]), _cosines(candidate[kept]), strict=True):
        x, y = (stats.rankdata(side, axis=1) - (few + 1) / 2 for side in (left, right))
        norms = np.sqrt(np.sum(x * x, axis=1) * np.sum(y * y, axis=1))
        agreed.append(np.sum(x * y, axis=1) / np.maximum(norms, 1e-12))
    return np.concatenate(agreed)


def _nearest(embeddings: np.ndarray) -> np.ndarray:
    """The position of each query's nearest passage, [n]."""
    return np.concatenate([block.argmax(axis=1) for block in _cosines(embeddings)])


def _cosines(embeddings: np.ndarray) -> Iterator[np.ndarray]:
    """Cosines of some queries at a time to all passages, [queries, n]."""
    rows = unit(embeddings)
    n = len(rows) // 2
    for start in range(0, n, _QUERIES_AT_ONCE):
        yield rows[start : min(start + _QUERIES_AT_ONCE, n)] @ rows[n:].T


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [n, width] scaled to length 1."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
