"""One metric of several models on the same examples: its interval, and that of a paired difference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import UsageError, did_you_mean
from ..predictions import Predictions
from ..standard import Standard
from ..statistics.intervals import Interval, bootstrap_interval, grouped_jackknife_interval
from .drafts import MetricDraft, by_jackknife, newcombe_of
from .headline import headline_metric
from .quality import metric_drafts

_RESAMPLES = 2000
_GROUPS = 20


def chosen_metric(standard: Standard, metric: str | None = None) -> tuple[str, float | None]:
    """The metric of this name, or the task's own, and the teacher's value of it where it has one.

    Raises:
        UsageError: a metric that these rows do not give.
    """
    figures = _all_figures(standard.predictions, standard)
    found = {figure.name: figure for figure in figures if figure.interval is not None}
    if metric is not None and metric not in found:
        raise UsageError(
            f"There is no metric {metric!r}; on {standard.data_name} there are {', '.join(found)}."
            f"{did_you_mean(metric, found)}"
        )
    name = metric or headline_metric(standard.teacher.task.name, dict.fromkeys(found, 0.0))
    return name, found[name].teacher


def metric_interval(metric: str, runs: Sequence[Predictions], standard: Standard) -> Interval:
    """The metric and its 95 % interval; of several runs (seeds) the mean, over which only examples are drawn again: it
    says how far other examples would move the figure, not how far other seeds would."""
    figures = [_figure(metric, run, standard) for run in runs]
    only = figures[0].interval if len(figures) == 1 else None
    return only(figures[0]) if only else _drawn_again(figures, [])


def paired_difference(
    metric: str, runs: Sequence[Predictions], others: Sequence[Predictions], standard: Standard
) -> Interval:
    """The metric of `runs` minus that of `others` on the same examples, with its 95 % interval: an example is drawn
    with all its answers.

    The interval is Newcombe's for a share of one run on each side (a bootstrap has no width where no answer differs),
    a jackknife's where the statistic is over pairs of texts, and the BCa bootstrap's for the rest.
    """
    ours, theirs = ([_figure(metric, run, standard) for run in side] for side in (runs, others))
    shares = ours[0].rows.dtype == bool
    if shares and (len(ours) == len(theirs) == 1 or _alike(ours, theirs)):
        return newcombe_of(ours[0].rows, theirs[0].rows, ours[0].clusters)
    return _drawn_again(ours, theirs)


def _alike(ours: Sequence[MetricDraft], theirs: Sequence[MetricDraft]) -> bool:
    """Whether no answer differs: there is nothing for a bootstrap to draw."""
    left, right = (np.mean([figure.rows for figure in side], axis=0) for side in (ours, theirs))
    return bool(np.array_equal(left, right))


def _drawn_again(ours: Sequence[MetricDraft], theirs: Sequence[MetricDraft]) -> Interval:
    n = len(ours[0].rows)

    def difference(drawn: np.ndarray) -> float:
        at = drawn.astype(np.int64)
        of_ours, of_theirs = ([each.statistic(each.rows[at]) for each in side] for side in (ours, theirs))
        return float(np.mean(of_ours) - (np.mean(of_theirs) if of_theirs else 0.0))

    if ours[0].interval is by_jackknife:
        return grouped_jackknife_interval(n, min(_GROUPS, n), lambda kept: difference(np.flatnonzero(kept)))
    return bootstrap_interval(np.arange(n, dtype=np.float64), difference, _RESAMPLES)


def _figure(metric: str, run: Predictions, standard: Standard) -> MetricDraft:
    return next(figure for figure in _all_figures(run, standard) if figure.name == metric)


def _all_figures(run: Predictions, standard: Standard) -> list[MetricDraft]:
    task, names = standard.teacher.task.name, standard.label_names
    return list(metric_drafts(task, standard.predictions, run, standard.references, names, standard.pairs))
