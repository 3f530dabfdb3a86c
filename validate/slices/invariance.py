"""How far answers move when a text is written differently: of the candidate, and beside it of its teacher.

CheckList's invariance tests (Ribeiro et al. 2020), with an interval instead of a count of failures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..metrics.drafts import MetricDraft, by_bootstrap, by_newcombe, by_wilson
from ..metrics.retrieval import unit
from ..predictions import Predictions

Moved = tuple[Predictions, Predictions]
"""What one model answers to the rows as they are, and to the same rows written differently."""
Places = tuple[np.ndarray, np.ndarray]
"""The row of each example, int64 [examples], of both."""


def invariance_drafts(task: str, teacher: Moved, candidate: Moved, places: Places) -> Iterator[MetricDraft]:
    """`invariance`, 1 where nothing moves, with the teacher's, and `invariance_difference` to the teacher's."""
    if task in ("text-classification", "token-classification"):
        told = "share of rows whose answer is the same as without the perturbation"
        yield from same_answers(told, _same(candidate), _same(teacher))
    elif task == "sentence-similarity":
        told = "cosine of a text's embedding to that without the perturbation"
        yield from likenesses(told, _cosine(candidate), _cosine(teacher))
    else:
        told = "perplexity without the perturbation over that with it, both a token of the unperturbed text"
        yield from perplexities(told, _sums(candidate, places), _sums(teacher, places))


def same_answers(told: str, ours: np.ndarray, theirs: np.ndarray) -> Iterator[MetricDraft]:
    """Whether each answer stayed, bool [units] of either side."""
    yield MetricDraft("invariance", told, ours, _mean, by_wilson, len(ours), teacher=float(theirs.mean()))
    paired = np.column_stack([ours, theirs]).astype(float)
    yield MetricDraft("invariance_difference", _DIFFERENCE, paired, _difference, by_newcombe, len(ours))


def likenesses(told: str, ours: np.ndarray, theirs: np.ndarray) -> Iterator[MetricDraft]:
    """Cosines [units] of either side."""
    paired, n = np.column_stack([ours, theirs]), len(ours)
    yield MetricDraft("invariance", told, ours[:, None], _mean, by_bootstrap, n, teacher=float(theirs.mean()))
    yield MetricDraft("invariance_difference", _DIFFERENCE, paired, _difference, by_bootstrap, n)


def perplexities(told: str, ours: np.ndarray, theirs: np.ndarray) -> Iterator[MetricDraft]:
    """Sums [units, 3] of either side: tokens of the text as it was, its negative log-likelihood, and that of the
    changed text.

    Both perplexities are by the tokens of the first: a text in capitals falls into more tokens, each easier to guess.
    """
    paired, n = np.hstack([ours, theirs]), len(ours)
    yield MetricDraft("invariance", told, ours, _kept, by_bootstrap, n, teacher=_kept(theirs))
    yield MetricDraft(
        "invariance_difference", _DIFFERENCE, paired, lambda rows: _kept(rows) - _kept(rows[:, 3:]), by_bootstrap, n
    )


_DIFFERENCE = "invariance minus the teacher's, same rows"


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean(dtype=np.float64))


def _difference(rows: np.ndarray) -> float:
    return float(rows[:, 0].mean() - rows[:, 1].mean())


def _kept(rows: np.ndarray) -> float:
    tokens, nll, moved_nll = rows[:, :3].sum(axis=0)
    with np.errstate(over="ignore"):  # infinite where it overflows
        return float(np.exp((nll - moved_nll) / tokens))


def _same(side: Moved) -> np.ndarray:
    """Whether a row's answer is the same, bool [rows]; where words are tagged, of all that both have: a text that was
    cut may have lost some."""
    before, after = (answers["logits"] for answers in side)
    if before.dtype != object:
        return np.asarray(before.argmax(axis=1) == after.argmax(axis=1))
    tags = ((old.argmax(axis=1), new.argmax(axis=1)) for old, new in zip(before, after, strict=True))
    return np.array([bool(np.all(old[: len(new)] == new[: len(old)])) for old, new in tags], dtype=bool)


def _cosine(side: Moved) -> np.ndarray:
    before, after = (unit(answers["embedding"].astype(np.float64)) for answers in side)
    return np.asarray(np.sum(before * after, axis=1))


def _sums(side: Moved, places: Places) -> np.ndarray:
    """Of every row that both have: its scored tokens without the perturbation, and its negative log-likelihood without
    and with it, float [rows, 3]."""
    count = 1 + max(int(rows.max()) for rows in places)

    def summed(which: int, of: Callable[[np.ndarray], float]) -> np.ndarray:
        return np.bincount(places[which], weights=[float(of(nll)) for nll in side[which]["nll"]], minlength=count)

    both = (summed(0, len) > 0) & (summed(1, len) > 0)
    return np.column_stack([summed(0, len), summed(0, np.sum), summed(1, np.sum)])[both]
