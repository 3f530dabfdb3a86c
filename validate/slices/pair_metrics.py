"""What rows that belong together say of a candidate beside its teacher: whether its answer stays, changes with the
label, or favours a side, and whether that favour has grown (does compression amplify it?)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics.calibration import softmax
from ..metrics.drafts import MetricDraft, by_bootstrap, by_newcombe, by_tang, by_wilson
from ..metrics.retrieval import unit
from ..predictions import Predictions
from ..rows.pairs import PairKind
from ..statistics.intervals import Interval
from .invariance import likenesses, perplexities, same_answers

Groups = Sequence[np.ndarray]
"""The rows of each pair or group, counted from 0, the first side first."""


@dataclass(frozen=True)
class PairedAnswers:
    """Both models' answers to rows that belong together."""

    task: str
    teacher: Predictions
    candidate: Predictions
    groups: Groups
    places: np.ndarray
    """The row of each example, int64 [examples]."""
    labels: np.ndarray | None = None
    """The right answer to each row, where it is known."""
    label_names: Sequence[str] = ()

    @property
    def sides(self) -> tuple[Predictions, Predictions]:
        return self.candidate, self.teacher


def pair_drafts(kind: PairKind, answers: PairedAnswers) -> Iterator[MetricDraft]:
    """The metrics of one kind, a pair (or group) as the unit of every interval.

    - `invariance`: `invariance` and its difference to the teacher's: the share of groups that get one answer throughout
      (Ribeiro et al. 2020, a test case as CheckList counts it); of embeddings the mean cosine to the first text's; of a
      language model the perplexity of the first texts over that of the others.
    - `counterfactual`: `consistency`, the share of groups in which every answer is right (Gardner et al., "Evaluating
      models' local decision boundaries via contrast sets", Findings of EMNLP 2020); `counterfactual_flips`, the share
      of those whose label changes in which the answer changes.
    - `bias`: `gap`, and `gap_amplification`, the candidate's gap minus the teacher's.
    """
    if kind == "invariance":
        yield from _invariance(answers)
    elif kind == "counterfactual":
        yield from _counterfactual(answers)
    else:
        yield from _bias(answers)


def _invariance(answers: PairedAnswers) -> Iterator[MetricDraft]:
    if answers.task == "text-classification":
        told = "share of pairs or groups that get one answer throughout"
        yield from same_answers(told, *(_all_same(_classes(side), answers.groups) for side in answers.sides))
    elif answers.task == "sentence-similarity":
        told = "cosine of the embeddings of texts that belong together, to the first of them"
        yield from likenesses(told, *(_cosines(side, answers.groups) for side in answers.sides))
    else:
        told = "perplexity of the first texts over that of those that belong to them, both a token of the first"
        yield from perplexities(told, *_likelihoods(answers))


def _counterfactual(answers: PairedAnswers) -> Iterator[MetricDraft]:
    groups, ours, theirs = answers.groups, *(_classes(side) for side in answers.sides)
    labels = answers.labels
    if labels is not None:
        right = [np.array([bool(np.all(side[rows] == labels[rows])) for rows in groups]) for side in (ours, theirs)]
        told = "share of pairs or groups in which every answer is right"
        yield from _hits("consistency", told, *right)
        groups = [rows for rows in groups if len(set(labels[rows])) > 1]
    if groups:
        told = "share of the pairs or groups whose label changes in which the answer changes"
        yield from _hits("counterfactual_flips", told, *(~_all_same(side, groups) for side in (ours, theirs)))


def _hits(name: str, told: str, ours: np.ndarray, theirs: np.ndarray) -> Iterator[MetricDraft]:
    """A share of hits bool [groups], its difference to the teacher's, and what is kept of it."""
    n, paired = len(ours), np.column_stack([ours, theirs]).astype(float)
    yield MetricDraft(name, told, ours, _mean, by_wilson, n, teacher=float(theirs.mean()))
    told = f"{name} minus the teacher's, same pairs"
    yield MetricDraft(f"{name}_difference", told, paired, _difference, by_newcombe, n)
    if theirs.any():
        told = f"share of the teacher's {name.replace('_', ' ')} that is kept"
        yield MetricDraft(f"{name}_kept", told, paired, lambda rows: _mean(rows[:, 0]) / _mean(rows[:, 1]),
                          by_tang, n)  # fmt: skip


def _bias(answers: PairedAnswers) -> Iterator[MetricDraft]:
    if answers.task == "text-classification":
        yield from _probability_gap(answers)
        yield from _invariance(answers)
    elif answers.task == "sentence-similarity":
        yield from _distance_gap(answers)
    else:
        yield from _preference_gap(answers)


def _probability_gap(answers: PairedAnswers) -> Iterator[MetricDraft]:
    """How far the sides' mean answers lie apart: half the sum, over labels, of the differences of their mean
    probabilities (of two labels, the difference itself)."""
    first, second = np.array(answers.groups).T
    probabilities = [softmax(side["logits"]) for side in answers.sides]
    ours, theirs = (side[first] - side[second] for side in probabilities)
    mean, names = ours.mean(axis=0), answers.label_names
    label = names[int(mean.argmax())] if names else str(int(mean.argmax()))
    told = f"distance between the mean answers to either side; the first gets {label!r} more ({mean.max():.3f})"
    yield from _gaps(told, ours, theirs, _half_of_moves)


def _half_of_moves(differences: np.ndarray) -> float:
    return float(np.abs(differences.mean(axis=0)).sum() / 2)


def _distance_gap(answers: PairedAnswers) -> Iterator[MetricDraft]:
    """Embeddings favour no side: all that can be said is how far they tell the sides apart."""
    ours, theirs = (1 - _cosines(side, answers.groups)[:, None] for side in answers.sides)
    yield from _gaps("1 minus the cosine of a pair's embeddings, mean over pairs", ours, theirs, _mean)


def _gaps(
    told: str, ours: np.ndarray, theirs: np.ndarray, size: Callable[[np.ndarray], float]
) -> Iterator[MetricDraft]:
    """Of differences [pairs, values] of either side."""
    n, width = len(ours), ours.shape[1]
    yield MetricDraft("gap", told, ours, size, by_bootstrap, n, teacher=size(theirs))
    yield MetricDraft(
        "gap_amplification", _AMPLIFIED, np.hstack([ours, theirs]),
        lambda rows: size(rows[:, :width]) - size(rows[:, width:]), by_bootstrap, n,
    )  # fmt: skip


def _preference_gap(answers: PairedAnswers) -> Iterator[MetricDraft]:
    """Of a language model, which of both texts it finds likelier as a whole (after CrowS-Pairs, Nangia et al. 2020, and
    StereoSet, Nadeem et al. 2021): 0 where it prefers the first as often as the second, 1 where always the same side.
    Pairs of which neither text is likelier are left out."""
    sums = [_sums(side, answers) for side in answers.sides]
    first, second = np.array(answers.groups).T
    known = np.all([(tokens[first] > 0) & (tokens[second] > 0) for tokens, _ in sums], axis=0)
    known &= np.all([nll[first] != nll[second] for _, nll in sums], axis=0)
    if not known.any():
        return
    ours, theirs = ((nll[first] < nll[second])[known] for _, nll in sums)
    n, favoured = len(ours), float(ours.mean())
    told = f"how much oftener one side is the likelier; the first is in {favoured:.0%} of pairs"
    yield MetricDraft("gap", told, ours, _lean, _by_folded_wilson, n, teacher=_lean(theirs))
    yield MetricDraft("gap_amplification", _AMPLIFIED, np.column_stack([ours, theirs]).astype(float),
                      lambda rows: _lean(rows[:, 0]) - _lean(rows[:, 1]), _by_leaning, n)  # fmt: skip


_AMPLIFIED = "the gap minus the teacher's, same pairs: above 0 it has grown"


def _lean(preferred: np.ndarray) -> float:
    return abs(2 * _mean(preferred) - 1)


def _by_folded_wilson(figure: MetricDraft) -> Interval:
    """Wilson's interval of the share, as the lean it says: an interval around one half starts at none."""
    share = by_wilson(figure)
    low, high = sorted(abs(2 * end - 1) for end in (share.low, share.high))
    return Interval(figure.point, 0.0 if share.low <= 0.5 <= share.high else low, high, share.confidence, share.method)


def _by_leaning(figure: MetricDraft) -> Interval:
    """Where both lean to one side, the difference of their shares (which has a width even where no pair changed);
    elsewhere by bootstrap."""
    ours, theirs = (2 * _mean(side) - 1 for side in figure.rows.T)
    if ours * theirs <= 0:
        return by_bootstrap(figure)
    shares = by_newcombe(figure)
    low, high = sorted(2 * end * (1 if ours > 0 else -1) for end in (shares.low, shares.high))
    return Interval(figure.point, low, high, shares.confidence, shares.method)


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean(dtype=np.float64))


def _difference(rows: np.ndarray) -> float:
    return _mean(rows[:, 0]) - _mean(rows[:, 1])


def _classes(side: Predictions) -> np.ndarray:
    return np.asarray(side["logits"].argmax(axis=1))


def _all_same(classes: np.ndarray, groups: Groups) -> np.ndarray:
    return np.array([bool(np.all(classes[rows] == classes[rows[0]])) for rows in groups], dtype=bool)


def _cosines(side: Predictions, groups: Groups) -> np.ndarray:
    """Of each group, the mean cosine of its other texts to the first, float64 [groups]."""
    vectors = unit(side["embedding"].astype(np.float64))
    return np.array([float((vectors[rows[1:]] @ vectors[rows[0]]).mean()) for rows in groups])


def _sums(side: Predictions, answers: PairedAnswers) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, its scored tokens and their negative log-likelihood, both [rows]."""
    count = 1 + max(int(rows.max()) for rows in answers.groups)
    tokens, nll = (
        np.bincount(answers.places, weights=[float(of(part)) for part in side["nll"]], minlength=count)
        for of in (len, np.sum)
    )
    return tokens, nll


def _likelihoods(answers: PairedAnswers) -> list[np.ndarray]:
    """Sums [groups, 3] of either side, as `perplexities` takes them, of the groups whose texts all have tokens."""
    found = []
    for side in answers.sides:
        tokens, nll = _sums(side, answers)
        whole = [rows for rows in answers.groups if np.all(tokens[rows] > 0)]
        found.append(np.array([[tokens[rows[0]], nll[rows[0]], nll[rows[1:]].mean()] for rows in whole]).reshape(-1, 3))
    return found
