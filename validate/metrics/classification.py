"""What is measured on labels of texts or of words: drift from the teacher, right answers, entities, calibration."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from ..statistics.intervals import OfCounts
from ..statistics.paired_tests import mcnemar_p_value
from .calibration import (
    brier_scores,
    divergence,
    expected_calibration_error,
    gaps_by_bin,
    negative_log_likelihoods,
    softmax,
)
from .drafts import (
    MetricDraft,
    by_bootstrap,
    compared_shares,
    figure_of_sums,
    largest_figure,
    mean_figure,
    paired_counts,
    ratio,
    share_figure,
    sums_by_row,
)
from .entities import entity_counts, is_bio, micro_f1


@dataclass(frozen=True)
class Answers:
    """One model's answers: logits [n, classes], of all words one after another where words are labelled."""

    logits: np.ndarray

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        return softmax(self.logits)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return np.asarray(self.logits.argmax(axis=1))


def flat(logits: np.ndarray) -> np.ndarray:
    """Logits [examples, labels]; of word by word rows, those of all words."""
    return np.concatenate(list(logits)) if logits.dtype == object else logits


def rows_of_words(logits: np.ndarray) -> np.ndarray | None:
    """The row that each word is from, int64 [words]; `None` where a row has one answer."""
    return np.repeat(np.arange(len(logits)), [len(row) for row in logits]) if logits.dtype == object else None


def classification_drafts(
    teacher: np.ndarray | None, candidate: np.ndarray, labels: np.ndarray | None, label_names: Sequence[str]
) -> Iterator[MetricDraft]:
    """Logits of both sides, [n, classes] or [rows] of [words, classes], and the right labels [n]."""
    ours, theirs = Answers(flat(candidate)), Answers(flat(teacher)) if teacher is not None else None
    words = rows_of_words(candidate)
    if theirs is not None:
        yield from _drift(ours, theirs, words)
    if labels is None:
        return
    if words is None:
        yield from _macro_f1(ours, theirs, labels)
    else:
        if is_bio(label_names):
            yield from _entities(teacher, candidate, labels, label_names)
        yield from _whole_rows(ours, theirs, labels, words)
    right, taught = ours.labels == labels, theirs.labels == labels if theirs is not None else None
    # of words McNemar's test would take those of one text for independent examples
    p_value = mcnemar_p_value(*paired_counts(right, taught)[1:3]) if taught is not None and words is None else None
    yield from compared_shares("accuracy", "share of right answers", right, taught, words, p_value)
    yield from _calibration(ours, theirs, labels, words)


def _drift(ours: Answers, theirs: Answers, words: np.ndarray | None) -> Iterator[MetricDraft]:
    p, q = theirs.probabilities, ours.probabilities
    yield share_figure("flip_rate", "share of answers that left the teacher's", ours.labels != theirs.labels, words)
    told = "KL of the teacher's to the candidate's answer"
    yield mean_figure("kl_mean", told, divergence(p, q), words, unit="nats")
    told = "Jensen-Shannon divergence of both answers, at most ln 2"
    middle = (p + q) / 2
    halves = (divergence(p, middle) + divergence(q, middle)) / 2
    yield mean_figure("js_mean", told, halves, words, unit="nats")
    for name, told, sides in (
        ("probability_difference_max", "the largest difference of a probability to the teacher's", (p, q)),
        ("logit_difference_max", "the largest difference of a logit to the teacher's", (theirs.logits, ours.logits)),
    ):
        yield largest_figure(name, told, np.abs(sides[0].astype(float) - sides[1]).max(axis=1))


def _macro_f1(ours: Answers, theirs: Answers | None, labels: np.ndarray) -> Iterator[MetricDraft]:
    rows = np.column_stack([labels, ours.labels, *([theirs.labels] if theirs is not None else [])])
    reached = macro_f1(rows[:, 2], labels) if theirs is not None else None
    told, n = "mean of the F1 of every class that occurs in the labels or the answers", len(rows)
    yield MetricDraft(
        "macro_f1",
        told,
        rows,
        lambda drawn: macro_f1(drawn[:, 1], drawn[:, 0]),
        by_bootstrap,
        n,
        teacher=reached,
        of_counts=_macro_f1_by_count(ours, labels),
    )
    if theirs is None:
        return
    sides = [_macro_f1_by_count(side, labels) for side in (ours, theirs)]
    yield MetricDraft(
        "macro_f1_difference",
        "macro_f1 minus the teacher's, same examples",
        rows,
        lambda drawn: macro_f1(drawn[:, 1], drawn[:, 0]) - macro_f1(drawn[:, 2], drawn[:, 0]),
        by_bootstrap,
        n,
        of_counts=lambda counts: sides[0](counts) - sides[1](counts),
    )


def macro_f1(found: np.ndarray, right: np.ndarray) -> float:
    """The mean over classes of 2 TP / (found + there are), of label ids [n]; classes that occur on neither side do not
    count (as `sklearn.metrics.f1_score(average="macro")`)."""
    counts = np.ones((1, len(found)))
    return float(_mean_f1(counts @ _class_columns(found.astype(np.int64), right.astype(np.int64)))[0])


def _macro_f1_by_count(side: Answers, labels: np.ndarray) -> OfCounts:
    columns = _class_columns(side.labels, labels)
    return lambda counts: _mean_f1(counts @ columns)


def _class_columns(found: np.ndarray, right: np.ndarray) -> sparse.csr_array:
    """A one for each example in the columns of its label, of its answer and of both if they are one: [n, 3 classes]."""
    n, classes = len(found), int(max(found.max(), right.max())) + 1
    hits, examples = np.flatnonzero(found == right), np.arange(n)
    rows = np.concatenate([examples, examples, hits])
    columns = np.concatenate([right, found + classes, right[hits] + 2 * classes])
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(n, 3 * classes))


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    there, said, both = np.split(sums, 3, axis=-1)
    occurs = there + said > 0
    each = np.divide(2 * both, there + said, out=np.zeros(both.shape), where=occurs)
    return np.asarray(each.sum(axis=-1) / occurs.sum(axis=-1))


def _whole_rows(ours: Answers, theirs: Answers | None, labels: np.ndarray, words: np.ndarray) -> Iterator[MetricDraft]:
    """A row without a word that is scored has nothing to be right or wrong about."""

    def whole(side: Answers) -> np.ndarray:
        right = sums_by_row((side.labels == labels)[:, None], words)
        return np.asarray(right[right[:, 1] > 0, 0] == right[right[:, 1] > 0, 1])

    told = "share of rows with every word right"
    hits, taught = whole(ours), whole(theirs) if theirs is not None else None
    p_value = mcnemar_p_value(*paired_counts(hits, taught)[1:3]) if taught is not None else None
    yield from compared_shares("exact_match", told, hits, taught, p_value=p_value)


def _entities(
    teacher: np.ndarray | None, candidate: np.ndarray, labels: np.ndarray, label_names: Sequence[str]
) -> Iterator[MetricDraft]:
    """F1 over entities, rows drawn whole. A row of counts is the candidate's three, then the teacher's."""
    gold = np.split(labels, np.cumsum([len(row) for row in candidate])[:-1])
    sides = [side for side in (candidate, teacher) if side is not None]
    counts = [entity_counts([row.argmax(axis=1) for row in side], gold, label_names) for side in sides]
    if not counts[0][:, 2].any():
        return
    rows, n = np.hstack(counts), int(counts[0][:, 2].sum())
    reached = float(micro_f1(counts[1].sum(axis=0))) if teacher is not None else None
    told = "entity-level F1, all types together; an entity counts when both ends and its type are right"
    yield figure_of_sums("f1", told, rows, lambda sums: micro_f1(sums[..., :3]), n, teacher=reached)
    if reached is None:
        return
    told = "f1 minus the teacher's, same rows"
    yield figure_of_sums("f1_difference", told, rows, lambda sums: micro_f1(sums[..., :3]) - micro_f1(sums[..., 3:]), n)
    if reached:
        told = "share of the teacher's F1 that is kept"
        yield figure_of_sums(
            "f1_kept", told, rows, lambda sums: ratio(micro_f1(sums[..., :3]), micro_f1(sums[..., 3:])), n
        )


def _calibration(
    ours: Answers, theirs: Answers | None, labels: np.ndarray, words: np.ndarray | None
) -> Iterator[MetricDraft]:
    n = len(labels)
    kinds: tuple[tuple[str, Literal["mass", "width"]], ...] = (("ece", "mass"), ("ece_equal_width", "width"))
    for name, bins in kinds:
        told = f"expected calibration error, 15 bins of equal {bins}"
        rows = sums_by_row(gaps_by_bin(ours.probabilities, labels, bins), words)
        reached = expected_calibration_error(theirs.probabilities, labels, bins) if theirs is not None else None
        yield figure_of_sums(name, told, rows, _calibration_error, n, teacher=reached)
    brier = [brier_scores(side.probabilities, labels) for side in (ours, theirs) if side is not None]
    nll = [negative_log_likelihoods(side.logits, labels) for side in (ours, theirs) if side is not None]
    for name, told, unit, sides in (
        ("brier", "Brier score over all classes", "", brier),
        ("nll", "negative log-likelihood of the right answers", "nats", nll),
    ):
        reached = float(sides[1].mean()) if theirs is not None else None
        yield mean_figure(name, told, sides[0], words, unit=unit, teacher=reached)
    if theirs is not None:
        told = "nll minus the teacher's, same examples"
        yield mean_figure("nll_difference", told, nll[0] - nll[1], words, unit="nats")


def _calibration_error(sums: np.ndarray) -> np.ndarray:
    """From the sums of `gaps_by_bin` and of the examples. The bins are those of the sample, also when it is redrawn."""
    return ratio(np.abs(sums[..., :-1]).sum(axis=-1), sums[..., -1])
