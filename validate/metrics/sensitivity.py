"""What a cut model's answers are worth beside the uncut model's on the same examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...errors import InputError
from ..predictions import Predictions
from ..records.sensitivity import loss_of
from ..standard import Standard
from ..statistics.intervals import grouped_jackknife_interval
from .drafts import MetricDraft, newcombe_of
from .headline import headline_metric, higher_is_better
from .quality import metric_drafts

DRIFT_METRICS = {
    "sentence-similarity": "cosine_mean",
    "text-classification": "kl_mean",
    "token-classification": "kl_mean",
    "fill-mask": "token_agreement",
    "text-generation": "token_agreement",
}
"""For each task the metric that says how far answers moved from the uncut model's own."""
_AGAINST_UNCUT = frozenset({*DRIFT_METRICS.values(), "agreement_spearman", "agreement_ranking", "flip_rate",
                            "perplexity_ratio"})  # fmt: skip
_GROUPS = 20
_MOST_TEXTS_OF_PAIRS = 400
"""A rank correlation over all pairs of more texts takes longer than the pass that it is of: no interval then."""


@dataclass(frozen=True)
class CutScore:
    """The headline metric of a cut model, its loss with the ends of a 95 % interval, and every drift by name."""

    value: float
    loss: float
    low: float | None
    high: float | None
    drift: dict[str, float]


class CutScorer:
    """Scores answers against a standard that is the uncut model itself."""

    def __init__(self, standard: Standard) -> None:
        """Raises:
        InputError: too few examples, or rows on which the model's own metric is not a number.
        """
        self._standard = standard
        drafts = {draft.name: draft for draft in self._drafts(standard.predictions)}
        self.metric = headline_metric(standard.teacher.task.name, dict.fromkeys(drafts, 0.0))
        self.higher_is_better = higher_is_better(self.metric)
        self.drift_metric = DRIFT_METRICS[standard.teacher.task.name]
        self._uncut = drafts[self.metric]
        self.uncut = self._uncut.point
        if not math.isfinite(self.uncut):
            raise InputError(
                f"The {self.metric} of {standard.teacher.source} on {standard.data_name} is not a finite number, so "
                "no loss can be taken from it.",
                "Give more rows, and scores or labels that differ.",
            )

    @property
    def against_references(self) -> bool:
        """Whether the metric is against the data, not against the uncut model's answers."""
        return self.metric not in _AGAINST_UNCUT

    def __call__(self, answers: Predictions) -> CutScore:
        if not _finite(answers):  # the cut made the model overflow: nothing is left
            return CutScore(math.nan, math.inf, None, None, {})
        drafts = {draft.name: draft for draft in self._drafts(answers)}
        points = {name: draft.point for name, draft in drafts.items() if name == self.metric or name in _AGAINST_UNCUT}
        value, drift = points[self.metric], {name: point for name, point in points.items() if name in _AGAINST_UNCUT}
        low, high = self._interval(drafts[self.metric]) if math.isfinite(value) else (None, None)
        return CutScore(value, loss_of(value, self.uncut, self.higher_is_better), low, high, drift)

    def _drafts(self, answers: Predictions) -> Iterator[MetricDraft]:
        standard = self._standard
        return metric_drafts(
            standard.teacher.task.name,
            standard.predictions,
            answers,
            standard.references,
            standard.label_names,
            standard.pairs,
        )

    def _interval(self, ours: MetricDraft) -> tuple[float, float] | tuple[None, None]:
        """The ends of the loss's 95 % interval, paired by example: Newcombe's for shares, else a jackknife over 20
        groups, which costs 20 evaluations where a bootstrap's 2,000 would cost more than the cut itself. The uncut
        model's value, by which losses are divided, is taken as given."""
        uncut, n = self._uncut, len(ours.rows)
        if n < 2 or (ours.name == "agreement_spearman" and n > _MOST_TEXTS_OF_PAIRS):
            return None, None
        if ours.rows.dtype == bool:
            found = newcombe_of(ours.rows, uncut.rows, ours.clusters)
        else:
            try:
                found = grouped_jackknife_interval(
                    n, min(_GROUPS, n), lambda kept: ours.statistic(ours.rows[kept]) - uncut.statistic(uncut.rows[kept])
                )
            except InputError:  # undefined without one of the groups
                return None, None
        scale = (-1 if self.higher_is_better else 1) / (abs(self.uncut) or 1.0)
        low, high = sorted((found.low * scale, found.high * scale))
        return low, high


def _finite(answers: Predictions) -> bool:
    each = (values if values.dtype == object else [values] for values in answers.values())
    return all(np.isfinite(row).all() for rows in each for row in rows)
