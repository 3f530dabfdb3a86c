"""Quality of a candidate beside its teacher's on the same examples: drift for every task, accuracy where there are
references, calibration where there are probabilities. `measure_quality` gives every figure a 95 % interval; `score`
gives the points alone, quickly enough to be asked while training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import InputError
from ..predictions import Predictions
from ..records.report import Metric, ReliabilityBin, Temperature
from .calibration import reliability_bins, softmax, suggested_temperature
from .classification import classification_drafts, flat, rows_of_words
from .drafts import MetricDraft
from .headline import headline_metric, higher_is_better
from .language import language_drafts
from .similarity import similarity_drafts

__all__ = ["Quality", "headline_metric", "higher_is_better", "measure_quality", "metric_drafts", "score"]


@dataclass(frozen=True)
class Quality:
    """Metrics of one candidate, and where the task has probabilities and the data labels its reliability diagram, and
    the temperature that would better it."""

    metrics: list[Metric]
    reliability: list[ReliabilityBin]
    temperature: Temperature | None = None


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
    metrics = [figure.metric(data) for figure in figures]
    if references is None or "logits" not in candidate:
        return Quality(metrics, [])
    logits, words = flat(candidate["logits"]), rows_of_words(candidate["logits"])
    reliability = reliability_bins(softmax(logits), references)
    return Quality(metrics, reliability, suggested_temperature(logits, references, words))


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
    """Every metric that these answers allow, not yet computed.

    Raises:
        InputError: too few examples (raised when the first metric is asked for).
    """
    if task == "sentence-similarity":
        theirs = teacher["embedding"] if teacher else None
        return similarity_drafts(theirs, candidate["embedding"], references, pairs)
    if task in ("text-classification", "token-classification"):
        theirs = teacher["logits"] if teacher else None
        return classification_drafts(theirs, candidate["logits"], references, label_names)
    return language_drafts(teacher, candidate)
