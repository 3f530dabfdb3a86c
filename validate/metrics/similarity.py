"""What is measured on embeddings: how alike they are to the teacher's, gold scores, retrieval."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from ...errors import InputError
from ..statistics.rank_correlation import Ranks, correlation_of_ranks, ranks_by_count, spearman
from .drafts import (
    MetricDraft,
    by_bootstrap,
    by_jackknife,
    compared_shares,
    largest_figure,
    mean_figure,
    ratio,
)
from .retrieval import first_hits, ranking_agreement, unit

_AGREEMENT_TEXTS = 1500
"""Texts whose pairs are compared: 1,500 make 1.1 million pairs."""
_FEWEST_TEXTS = 4


def similarity_drafts(
    teacher: np.ndarray | None, candidate: np.ndarray, scores: np.ndarray | None, pairs: bool
) -> Iterator[MetricDraft]:
    """Embeddings [texts, width] of both sides; of pairs all first texts, then all second ones."""
    if teacher is not None:
        yield from _drift(teacher, candidate)
    if scores is not None:
        yield from _gold_scores(teacher, candidate, scores)
    elif pairs:
        yield from _retrieval(teacher, candidate)


def _drift(teacher: np.ndarray, candidate: np.ndarray) -> Iterator[MetricDraft]:
    yield _agreement(teacher[:_AGREEMENT_TEXTS], candidate[:_AGREEMENT_TEXTS])
    if teacher.shape[1] == candidate.shape[1]:  # a narrower student has a space of its own
        cosines = _cosines(teacher, candidate)
        yield mean_figure("cosine_mean", "cosine of the candidate's embedding to the teacher's", cosines)
        told = "the lowest cosine of a text's embedding to the teacher's"
        yield MetricDraft("cosine_min", told, cosines, lambda rows: float(rows.min()), None, len(cosines))


def _agreement(teacher: np.ndarray, candidate: np.ndarray) -> MetricDraft:
    n = len(teacher)
    if n < _FEWEST_TEXTS:
        said = f"There are {n} texts to validate on; a rank agreement needs at least {_FEWEST_TEXTS}."
        raise InputError(said, "Validate on more examples.")

    @functools.cache
    def sides() -> tuple[tuple[np.ndarray, np.ndarray], Ranks, Ranks]:
        above = np.triu_indices(n, k=1)
        theirs, ours = (ranks_by_count(_similarities(side)[above]) for side in (teacher, candidate))
        return above, theirs, ours

    def of_counts(counts: np.ndarray) -> np.ndarray:
        (first, second), theirs, ours = sides()
        pairs = (each[None, first] * each[None, second] for each in counts)
        return np.array([correlation_of_ranks(theirs(each), ours(each), each)[0] for each in pairs])

    told = "rank correlation of the teacher's and the candidate's cosines over all pairs of texts"
    return MetricDraft(
        "agreement_spearman",
        told,
        np.arange(n),
        lambda kept: _rank_agreement(teacher[kept], candidate[kept]),
        by_jackknife,
        n,
        of_counts=of_counts,
    )


def _gold_scores(teacher: np.ndarray | None, candidate: np.ndarray, scores: np.ndarray) -> Iterator[MetricDraft]:
    half = len(scores)
    sides = [_cosines(side[:half], side[half:]) for side in (candidate, teacher) if side is not None]
    rows = np.column_stack([scores, *sides])
    gold, ours, *theirs = (ranks_by_count(column) for column in rows.T)

    def correlation(counts: np.ndarray, side: Ranks) -> np.ndarray:
        return correlation_of_ranks(gold(counts), side(counts), counts)

    reached = spearman(rows[:, 2], rows[:, 0]) if teacher is not None else None
    yield MetricDraft(
        "spearman",
        "rank correlation with the gold scores",
        rows,
        lambda drawn: spearman(drawn[:, 1], drawn[:, 0]),
        by_bootstrap,
        half,
        teacher=reached,
        of_counts=lambda counts: correlation(counts, ours),
    )
    if reached is None:
        return
    yield MetricDraft(
        "spearman_kept",
        "share of the teacher's rank correlation that is kept",
        rows,
        lambda drawn: float(ratio(spearman(drawn[:, 1], drawn[:, 0]), spearman(drawn[:, 2], drawn[:, 0]))),
        by_bootstrap,
        half,
        of_counts=lambda counts: ratio(correlation(counts, ours), correlation(counts, theirs[0])),
    )
    told = "the largest difference of a pair's cosine to the teacher's"
    yield largest_figure("similarity_difference_max", told, np.abs(rows[:, 1] - rows[:, 2]))


def _retrieval(teacher: np.ndarray | None, candidate: np.ndarray) -> Iterator[MetricDraft]:
    ours, theirs = first_hits(candidate, teacher)
    told = "share of first texts whose nearest second text is their own"
    yield from compared_shares("recall_at_1", told, ours, theirs)
    if teacher is not None:
        told = "rank correlation of both sides' cosines of a first text to all second texts, mean over first texts"
        yield mean_figure("agreement_ranking", told, ranking_agreement(teacher, candidate, _AGREEMENT_TEXTS))


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.asarray(np.sum(unit(left) * unit(right), axis=1))


def _similarities(side: np.ndarray) -> np.ndarray:
    """Cosines of all texts to all, [texts, texts]."""
    return np.asarray(unit(side) @ unit(side).T)


def _rank_agreement(teacher: np.ndarray, candidate: np.ndarray) -> float:
    above = np.triu_indices(len(teacher), k=1)
    return spearman(*(_similarities(side)[above] for side in (teacher, candidate)))
