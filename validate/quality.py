"""Quality of a candidate beside its teacher's on the same examples: drift for every task, accuracy where there are
references, calibration where there are probabilities. `measure_quality` gives every figure a 95 % interval; `score`
gives the points alone, quickly enough to be asked while training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..errors import InputError
from .calibration import brier_score, expected_calibration_error, reliability_bins, softmax
from .entities import entity_counts, is_bio, micro_f1
from .headline import headline_metric, higher_is_better
from .predictions import Predictions
from .report import Metric, ReliabilityBin
from .retrieval import first_hits, ranking_agreement, unit
from .statistics import (
    Interval,
    bonett_price_interval,
    bootstrap_interval,
    grouped_jackknife_interval,
    newcombe_interval,
    wilson_interval,
)

__all__ = ["Quality", "headline_metric", "higher_is_better", "measure_quality", "score"]

_AGREEMENT_TEXTS = 1500
"""Texts whose pairs are compared: 1,500 make 1.1 million pairs."""
_FEWEST_TEXTS = 4
_GROUPS = 20
_RESAMPLES = 1000
_CALIBRATION_RESAMPLES = 300


@dataclass(frozen=True)
class Quality:
    """Metrics of one candidate, and its reliability diagram where the task has probabilities."""

    metrics: list[Metric]
    reliability: list[ReliabilityBin]


@dataclass(frozen=True)
class MetricDraft:
    """One metric before it is computed: a statistic of rows [examples, ...], and how its interval is made."""

    name: str
    description: str
    rows: np.ndarray
    statistic: Callable[[np.ndarray], float]
    interval: Callable[[MetricDraft], Interval]
    count: int
    unit: str = ""
    teacher: float | None = None

    @property
    def point(self) -> float:
        return self.statistic(self.rows)

    def metric(self, data: str) -> Metric:
        interval = self.interval(self)
        return Metric(
            name=self.name,
            value=interval.point,
            low=interval.low,
            high=interval.high,
            unit=self.unit,
            count=self.count,
            teacher=self.teacher,
            higher_is_better=higher_is_better(self.name),
            description=self.description,
            data=data,
        )


def measure_quality(
    task: str,
    teacher: Predictions,
    candidate: Predictions,
    references: np.ndarray | None,
    data: str,
    *,
    label_names: Sequence[str] = (),
    pairs: bool = False,
) -> Quality:
    """Compare a candidate's predictions with its teacher's and, where there are any, with the references.

    Args:
        label_names: the model's labels in the order of their ids; BIO tags are scored by entity.
        pairs: the texts are pairs, all first ones, then all second ones.

    Raises:
        InputError: too few examples.
    """
    figures = metric_drafts(task, teacher, candidate, references, label_names, pairs)
    reliability = []
    if task in ("text-classification", "token-classification") and references is not None:
        reliability = reliability_bins(softmax(_flat(candidate["logits"])), references)
    return Quality([figure.metric(data) for figure in figures], reliability)


def score(
    task: str,
    teacher: Predictions | None,
    candidate: Predictions,
    references: np.ndarray | None,
    *,
    label_names: Sequence[str] = (),
    pairs: bool = False,
) -> dict[str, float]:
    """The metrics of `measure_quality` by name, without intervals; without a teacher, those that need none.

    Raises:
        InputError: too few examples, or neither a teacher nor references to score against.
    """
    figures = list(metric_drafts(task, teacher, candidate, references, label_names, pairs))
    if not figures:
        raise InputError(
            "There is nothing to score against: the data have no references, and there is no teacher.",
            "Give data with labels or scores.",
        )
    return {figure.name: figure.point for figure in figures}


def metric_drafts(
    task: str,
    teacher: Predictions | None,
    candidate: Predictions,
    references: np.ndarray | None,
    label_names: Sequence[str],
    pairs: bool,
) -> Iterator[MetricDraft]:
    if task == "sentence-similarity":
        theirs = teacher["embedding"] if teacher else None
        return _similarity(theirs, candidate["embedding"], references, pairs)
    if task in ("text-classification", "token-classification"):
        theirs = teacher["logits"] if teacher else None
        return _classification(theirs, candidate["logits"], references, label_names)
    return _language_model(teacher, candidate)


def by_bootstrap(figure: MetricDraft) -> Interval:
    return bootstrap_interval(figure.rows, figure.statistic, _RESAMPLES)


def _short_bootstrap(figure: MetricDraft) -> Interval:
    return bootstrap_interval(figure.rows, figure.statistic, _CALIBRATION_RESAMPLES)


def by_wilson(figure: MetricDraft) -> Interval:
    return wilson_interval(int(figure.rows.sum()), len(figure.rows))


def by_newcombe(figure: MetricDraft) -> Interval:
    return newcombe_interval(*_paired_counts(figure.rows))


def by_bonett_price(figure: MetricDraft) -> Interval:
    return bonett_price_interval(*_paired_counts(figure.rows)[:3])


def _paired_counts(rows: np.ndarray) -> tuple[int, int, int, int]:
    """How many examples both sides, the first, the second or none of the two got right."""
    ours, theirs = rows[:, 0] > 0, rows[:, 1] > 0
    both, first, second, none = ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs
    return int(both.sum()), int(first.sum()), int(second.sum()), int(none.sum())


def by_jackknife(figure: MetricDraft) -> Interval:
    n = len(figure.rows)
    return grouped_jackknife_interval(n, min(_GROUPS, n), lambda kept: figure.statistic(figure.rows[kept]))


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean(dtype=np.float64))


def _difference(rows: np.ndarray) -> float:
    return float(rows[:, 0].mean() - rows[:, 1].mean())


def _ratio(above: float, below: float) -> float:
    """Not a number where there is nothing below, as in a resample of a few examples; such resamples are left out."""
    return float(above / below) if below else float("nan")


def _kept(rows: np.ndarray) -> float:
    return _ratio(rows[:, 0].sum(), rows[:, 1].sum())


def _compared(
    name: str, ours: np.ndarray, theirs: np.ndarray | None, description: str, difference: bool = False
) -> Iterator[MetricDraft]:
    """A share of hits bool [examples], its difference to the teacher's, and what is kept of it."""
    n, reached = len(ours), float(theirs.mean()) if theirs is not None else None
    yield MetricDraft(name, description, ours, _mean, by_wilson, n, teacher=reached)
    if theirs is None:
        return
    paired = np.column_stack([ours, theirs]).astype(float)
    if difference:
        told = f"{name} minus the teacher's, same examples"
        yield MetricDraft(f"{name}_difference", told, paired, _difference, by_newcombe, n)
    if reached:
        told = f"share of the teacher's {name.replace('_', ' ')} that is kept"
        yield MetricDraft(f"{name}_kept", told, paired, _kept, by_bonett_price, n)


def _similarity(
    teacher: np.ndarray | None, candidate: np.ndarray, scores: np.ndarray | None, pairs: bool
) -> Iterator[MetricDraft]:
    if teacher is not None:
        yield from _embedding_drift(teacher, candidate)
    if scores is not None:
        yield from _gold_scores(teacher, candidate, scores)
    elif pairs:
        yield from _retrieval(teacher, candidate)


def _embedding_drift(teacher: np.ndarray, candidate: np.ndarray) -> Iterator[MetricDraft]:
    few_t, few_c = teacher[:_AGREEMENT_TEXTS], candidate[:_AGREEMENT_TEXTS]
    n = len(few_t)
    if n < _FEWEST_TEXTS:
        said = f"There are {n} texts to validate on; a rank agreement needs at least {_FEWEST_TEXTS}."
        raise InputError(said, "Validate on more examples.")
    yield MetricDraft(
        "agreement_spearman",
        "rank correlation of the teacher's and the candidate's cosines over all pairs of texts",
        np.arange(n),
        lambda kept: _rank_agreement(few_t[kept], few_c[kept]),
        by_jackknife,
        n,
    )
    if teacher.shape[1] == candidate.shape[1]:  # a narrower student has a space of its own
        told = "cosine of the candidate's embedding to the teacher's"
        yield MetricDraft(
            "cosine_mean", told, _cosines(teacher, candidate)[:, None], _mean, by_bootstrap, len(candidate)
        )


def _gold_scores(teacher: np.ndarray | None, candidate: np.ndarray, scores: np.ndarray) -> Iterator[MetricDraft]:
    half = len(scores)
    sides = [_cosines(side[:half], side[half:]) for side in (candidate, teacher) if side is not None]
    rows = np.column_stack([scores, *sides])

    def reached(drawn: np.ndarray, side: int = 1) -> float:
        return _spearman(drawn[:, side], drawn[:, 0])

    value = reached(rows, 2) if teacher is not None else None
    told = "rank correlation with the gold scores"
    yield MetricDraft("spearman", told, rows, reached, by_bootstrap, half, teacher=value)
    if value is not None:
        told = "share of the teacher's rank correlation that is kept"
        yield MetricDraft(
            "spearman_kept", told, rows, lambda drawn: _ratio(reached(drawn), reached(drawn, 2)), by_bootstrap, half
        )


def _retrieval(teacher: np.ndarray | None, candidate: np.ndarray) -> Iterator[MetricDraft]:
    ours, theirs = first_hits(candidate, teacher)
    yield from _compared("recall_at_1", ours, theirs, "share of first texts whose nearest second text is their own")
    if teacher is not None:
        agreed = ranking_agreement(teacher, candidate, _AGREEMENT_TEXTS)
        told = "rank correlation of both sides' cosines of a first text to all second texts, mean over first texts"
        yield MetricDraft("agreement_ranking", told, agreed[:, None], _mean, by_bootstrap, len(agreed))


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.asarray(np.sum(unit(left) * unit(right), axis=1))


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    if np.ptp(left) == 0 or np.ptp(right) == 0:  # equal values have no ranks; SciPy warns of each
        return float("nan")
    return float(stats.spearmanr(left, right).statistic)


def _rank_agreement(teacher: np.ndarray, candidate: np.ndarray) -> float:
    above = np.triu_indices(len(teacher), k=1)
    left, right = ((unit(side) @ unit(side).T)[above] for side in (teacher, candidate))
    return _spearman(left, right)


def _flat(logits: np.ndarray) -> np.ndarray:
    """Logits [examples, labels]; of token by token rows, those of all tokens."""
    return np.concatenate(list(logits)) if logits.dtype == object else logits


def _classification(
    teacher: np.ndarray | None, candidate: np.ndarray, labels: np.ndarray | None, label_names: Sequence[str]
) -> Iterator[MetricDraft]:
    q, p = softmax(_flat(candidate)), softmax(_flat(teacher)) if teacher is not None else None
    ours, theirs = q.argmax(axis=1), p.argmax(axis=1) if p is not None else None
    n = len(ours)
    if p is not None:
        divergence = np.sum(p * (np.log(p + 1e-12) - np.log(q + 1e-12)), axis=1)
        yield MetricDraft("flip_rate", "share of answers that left the teacher's", ours != theirs, _mean, by_wilson, n)
        told = "KL of the teacher's to the candidate's answer"
        yield MetricDraft("kl_mean", told, divergence[:, None], _mean, by_bootstrap, n, unit="nats")
    if labels is None:
        return
    if candidate.dtype == object and is_bio(label_names):
        yield from _entities(teacher, candidate, labels, label_names)
    right = theirs == labels if theirs is not None else None
    yield from _compared("accuracy", ours == labels, right, "share of right answers", difference=True)
    scored: list[tuple[str, str, Callable[[np.ndarray, np.ndarray], float]]] = [
        ("ece", "expected calibration error, 15 bins of equal mass", expected_calibration_error),
        ("brier", "Brier score over all classes", brier_score),
    ]
    for name, told, of in scored:
        rows, reached = np.column_stack([labels, q]), of(p, labels) if p is not None else None
        statistic = functools.partial(_of_labelled, of)
        yield MetricDraft(name, told, rows, statistic, _short_bootstrap, n, teacher=reached)


def _of_labelled(statistic: Callable[[np.ndarray, np.ndarray], float], rows: np.ndarray) -> float:
    """A statistic of probabilities and labels, of rows that hold the label, then the probabilities."""
    return statistic(rows[:, 1:], rows[:, 0].astype(int))


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
    reached = micro_f1(counts[1]) if teacher is not None else None
    told = "entity-level F1, all types together; an entity counts when both ends and its type are right"
    yield MetricDraft("f1", told, rows, lambda r: micro_f1(r[:, :3]), by_bootstrap, n, teacher=reached)
    if reached is None:
        return
    told = "f1 minus the teacher's, same rows"
    yield MetricDraft("f1_difference", told, rows, lambda r: micro_f1(r[:, :3]) - micro_f1(r[:, 3:]), by_bootstrap, n)
    if reached:
        told = "share of the teacher's F1 that is kept"
        yield MetricDraft(
            "f1_kept", told, rows, lambda r: _ratio(micro_f1(r[:, :3]), micro_f1(r[:, 3:])), by_bootstrap, n
        )


def _language_model(teacher: Predictions | None, candidate: Predictions) -> Iterator[MetricDraft]:
    sides = [side["nll"] for side in (candidate, teacher) if side is not None]
    rows = np.array([[len(ours[0]), *(np.sum(nll) for nll in ours)] for ours in zip(*sides, strict=True)], dtype=float)
    tokens = int(rows[:, 0].sum())
    told = "exp of the mean negative log-likelihood a token"
    reached = _perplexity(rows, 2) if teacher is not None else None
    yield MetricDraft("perplexity", told, rows, _perplexity, by_bootstrap, tokens, teacher=reached)
    if teacher is None:
        return
    told = "perplexity over the teacher's"
    yield MetricDraft(
        "perplexity_ratio", told, rows, lambda r: _ratio(_perplexity(r), _perplexity(r, 2)), by_bootstrap, tokens
    )
    tops = zip(candidate["top_token"], teacher["top_token"], strict=True)
    same = np.array([[np.sum(ours == theirs), len(ours)] for ours, theirs in tops], dtype=float)
    yield MetricDraft(
        "token_agreement", "share of top tokens that are the teacher's", same, _kept, by_bootstrap, tokens
    )


def _perplexity(rows: np.ndarray, side: int = 1) -> float:
    with np.errstate(over="ignore"):  # infinite where it overflows
        return float(np.exp(_ratio(rows[:, side].sum(), rows[:, 0].sum())))
