"""A teacher that knows no more than chance, as of a language that it never read: what is *kept* of nothing has no
meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..records.report import Metric
from ..statistics.intervals import wilson_interval

_BEYOND_DOUBT = 3.29
"""Standard errors (99.9 %, two-sided) that the teacher's correlation must lie above 0 for what is kept of it to be
given: from there on hardly a resample of the ratio has a denominator at or below 0."""


def weighed_against_chance(metrics: Sequence[Metric], references: np.ndarray | None) -> tuple[list[Metric], list[str]]:
    """The metrics that mean something beside a teacher as good as this one, and in words what is left out or in doubt.

    What is kept of a rank correlation is left out where the teacher's is not above 0 beyond doubt, by Fisher's z with
    the standard error of Bonett and Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman
    correlations", Psychometrika 65 (2000). Of an accuracy it is given, and said to mean little, where the teacher's is
    not above the share of the commonest label (95 % interval).
    """
    known = {metric.name: metric for metric in metrics}
    kept, said = list(metrics), []
    spearman, accuracy = known.get("spearman"), known.get("accuracy")
    if spearman and "spearman_kept" in known and not _above_zero(spearman):
        kept.remove(known["spearman_kept"])
        said.append(f"no spearman_kept: the teacher's own {spearman.teacher:.3f} is not above 0 beyond doubt")
    if accuracy and "accuracy_kept" in known and references is not None:
        commonest = float(np.unique(references, return_counts=True)[1].max() / len(references))
        if _lowest(accuracy) <= commonest:
            said.append(
                f"the teacher's accuracy of {accuracy.teacher:.3f} is no better than the commonest label's share of "
                f"{commonest:.3f}: what is kept of it means little"
            )
    return kept, said


def _above_zero(metric: Metric) -> bool:
    reached, n = metric.teacher or 0.0, metric.count or 0
    if n <= 3 or reached >= 1:
        return reached >= 1
    error = math.sqrt((1 + reached**2 / 2) / (n - 3))
    return math.atanh(max(reached, 0.0)) > _BEYOND_DOUBT * error


def _lowest(metric: Metric) -> float:
    n = metric.count or 0
    return wilson_interval(round((metric.teacher or 0.0) * n), n).low
