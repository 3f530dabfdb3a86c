"""Quality of a candidate beside its teacher's on the same examples: drift for every task, accuracy where there are
references, calibration where there are probabilities. Every figure has a 95 % interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..errors import InputError
from .calibration import brier_score, expected_calibration_error, reliability_bins, softmax
from .predictions import Predictions
from .report import Metric, ReliabilityBin
from .statistics import Interval, bootstrap_interval, grouped_jackknife_interval, newcombe_interval, wilson_interval

_AGREEMENT_TEXTS = 1500
"""Texts whose pairs are compared: 1,500 make 1.1 million pairs."""
_FEWEST_TEXTS = 4
_GROUPS = 20
_RESAMPLES = 1000


@dataclass(frozen=True)
class Quality:
    """Metrics of one candidate, and its reliability diagram where the task has probabilities."""

    metrics: list[Metric]
    reliability: list[ReliabilityBin]


def measure_quality(
    task: str, teacher: Predictions, candidate: Predictions, references: np.ndarray | None, data: str
) -> Quality:
    """Compare a candidate's predictions with its teacher's and, where there are any, with the references."""
    if task == "sentence-similarity":
        return _similarity(teacher["embedding"], candidate["embedding"], references, data)
    if task in ("text-classification", "token-classification"):
        return _classification(teacher["logits"], candidate["logits"], references, data)
    return _language_model(teacher, candidate, data)


def _metric(name: str, interval: Interval, count: int, data: str, description: str, **more: object) -> Metric:
    settings = {"higher_is_better": True, **more}
    return Metric(
        name=name,
        value=interval.point,
        low=interval.low,
        high=interval.high,
        count=count,
        data=data,
        description=description,
        **settings,  # names checked by the model itself
    )


def _similarity(teacher: np.ndarray, candidate: np.ndarray, scores: np.ndarray | None, data: str) -> Quality:
    cosine = np.sum(_unit(teacher) * _unit(candidate), axis=1)
    mean = bootstrap_interval(cosine[:, None], lambda rows: float(rows.mean()), _RESAMPLES)
    few_t, few_c = teacher[:_AGREEMENT_TEXTS], candidate[:_AGREEMENT_TEXTS]
    if len(few_t) < _FEWEST_TEXTS:
        said = f"There are {len(few_t)} texts to validate on; a rank agreement needs at least {_FEWEST_TEXTS}."
        raise InputError(said, "Validate on more examples.")
    groups = min(_GROUPS, len(few_t))
    metrics = [
        _metric(
            "agreement_spearman",
            grouped_jackknife_interval(len(few_t), groups, lambda kept: _rank_agreement(few_t[kept], few_c[kept])),
            len(few_t),
            data,
            "rank correlation of the teacher's and the candidate's cosines over all pairs of texts",
        ),
        _metric("cosine_mean", mean, len(cosine), data, "cosine of the candidate's embedding to the teacher's"),
    ]
    if scores is not None:
        half = len(scores)
        ours, theirs = (np.sum(_unit(side[:half]) * _unit(side[half:]), axis=1) for side in (candidate, teacher))
        paired = np.column_stack([ours, theirs, scores])
        reached = bootstrap_interval(paired, lambda rows: _spearman(rows[:, 0], rows[:, 2]), _RESAMPLES)
        kept = bootstrap_interval(
            paired, lambda rows: _spearman(rows[:, 0], rows[:, 2]) / _spearman(rows[:, 1], rows[:, 2]), _RESAMPLES
        )
        value = _spearman(theirs, scores)
        metrics += [
            _metric("spearman", reached, half, data, "rank correlation with the gold scores", teacher=value),
            _metric("spearman_kept", kept, half, data, "share of the teacher's rank correlation that is kept"),
        ]
    return Quality(metrics, [])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    return float(stats.spearmanr(left, right).statistic)


def _rank_agreement(teacher: np.ndarray, candidate: np.ndarray) -> float:
    above = np.triu_indices(len(teacher), k=1)
    left, right = ((_unit(side) @ _unit(side).T)[above] for side in (teacher, candidate))
    return _spearman(left, right)


def _classification(teacher: np.ndarray, candidate: np.ndarray, labels: np.ndarray | None, data: str) -> Quality:
    if teacher.dtype == object:  # token by token
        teacher, candidate = np.concatenate(list(teacher)), np.concatenate(list(candidate))
    ours, theirs = candidate.argmax(axis=1), teacher.argmax(axis=1)
    p, q = softmax(teacher), softmax(candidate)
    divergence = np.sum(p * (np.log(p + 1e-12) - np.log(q + 1e-12)), axis=1)
    flips = _share(ours != theirs)
    mean = bootstrap_interval(divergence[:, None], lambda rows: float(rows.mean()), _RESAMPLES)
    metrics = [
        _metric("flip_rate", flips, len(ours), data, "share of answers that left the teacher's",
                higher_is_better=False),
        _metric("kl_mean", mean, len(ours), data, "KL of the teacher's to the candidate's answer", unit="nats",
                higher_is_better=False),
    ]  # fmt: skip
    if labels is None:
        return Quality(metrics, [])
    right, right_teacher = ours == labels, theirs == labels
    metrics += _accuracy(right, right_teacher, data)
    metrics += _calibration(q, p, labels, data)
    return Quality(metrics, reliability_bins(q, labels))


def _share(hits: np.ndarray) -> Interval:
    return wilson_interval(int(hits.sum()), len(hits))


def _accuracy(right: np.ndarray, right_teacher: np.ndarray, data: str) -> list[Metric]:
    difference = newcombe_interval(
        int(np.sum(right & right_teacher)),
        int(np.sum(right & ~right_teacher)),
        int(np.sum(~right & right_teacher)),
        int(np.sum(~right & ~right_teacher)),
    )
    reached = float(right_teacher.mean())
    metrics = [
        _metric("accuracy", _share(right), len(right), data, "share of right answers", teacher=reached),
        _metric("accuracy_difference", difference, len(right), data, "accuracy minus the teacher's, same examples"),
    ]
    if reached > 0:
        paired = np.column_stack([right, right_teacher]).astype(float)
        kept = bootstrap_interval(paired, lambda rows: float(rows[:, 0].mean() / rows[:, 1].mean()), _RESAMPLES)
        metrics.append(_metric("accuracy_kept", kept, len(right), data, "share of the teacher's accuracy that is kept"))
    return metrics


def _calibration(q: np.ndarray, p: np.ndarray, labels: np.ndarray, data: str) -> list[Metric]:
    scored: list[tuple[str, str, Callable[[np.ndarray, np.ndarray], float]]] = [
        ("ece", "expected calibration error, 15 bins of equal mass", expected_calibration_error),
        ("brier", "Brier score over all classes", brier_score),
    ]
    metrics = []
    for name, description, score in scored:
        rows = np.column_stack([labels, q])
        interval = bootstrap_interval(rows, lambda r, f=score: f(r[:, 1:], r[:, 0].astype(int)), 300)  # type: ignore[misc]
        metrics.append(
            _metric(name, interval, len(labels), data, description, teacher=score(p, labels), higher_is_better=False)
        )
    return metrics


def _language_model(teacher: Predictions, candidate: Predictions, data: str) -> Quality:
    rows = np.array([[np.sum(ours), np.sum(theirs), len(ours)] for ours, theirs in zip(
        candidate["nll"], teacher["nll"], strict=True)])  # fmt: skip
    same = np.array([[np.sum(ours == theirs), len(ours)] for ours, theirs in zip(
        candidate["top_token"], teacher["top_token"], strict=True)], dtype=float)  # fmt: skip
    tokens = int(rows[:, 2].sum())
    perplexity = bootstrap_interval(rows, lambda r: _perplexity(r, 0), _RESAMPLES)
    ratio = bootstrap_interval(rows, lambda r: _perplexity(r, 0) / _perplexity(r, 1), _RESAMPLES)
    agreed = bootstrap_interval(same, lambda r: float(r[:, 0].sum() / r[:, 1].sum()), _RESAMPLES)
    return Quality(
        [
            _metric("perplexity", perplexity, tokens, data, "exp of the mean negative log-likelihood a token",
                    teacher=_perplexity(rows, 1), higher_is_better=False),
            _metric("perplexity_ratio", ratio, tokens, data, "perplexity over the teacher's", higher_is_better=False),
            _metric("token_agreement", agreed, tokens, data, "share of top tokens that are the teacher's"),
        ],
        [],
    )  # fmt: skip


def _perplexity(rows: np.ndarray, column: int) -> float:
    return float(np.exp(rows[:, column].sum() / rows[:, 2].sum()))
