"""A metric before it is computed: a statistic of examples, and how its interval is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..records.report import Metric
from ..statistics.intervals import (
    Interval,
    OfCounts,
    bootstrap_interval,
    grouped_jackknife_interval,
    newcombe_interval,
    tang_interval,
    wilson_interval,
)
from .headline import higher_is_better

_GROUPS = 20
_RESAMPLES = 1000


@dataclass(frozen=True)
class MetricDraft:
    """One metric before it is computed: a statistic of rows [examples, ...], and how its interval is made; a maximum
    has none, since it is about these examples and no others."""

    name: str
    description: str
    rows: np.ndarray
    statistic: Callable[[np.ndarray], float]
    interval: Callable[[MetricDraft], Interval] | None
    count: int
    unit: str = ""
    teacher: float | None = None
    of_counts: OfCounts | None = None
    """The statistic by how often each row was drawn, of many draws at once, where that is quicker."""
    clusters: np.ndarray | None = None
    """Which row of the data each of `rows` is from, int64 [examples], where several are from one: words of a text."""
    p_value: float | None = None
    """Of no difference to the teacher."""

    @property
    def point(self) -> float:
        return self.statistic(self.rows)

    def metric(self, data: str) -> Metric:
        interval = self.interval(self) if self.interval else None
        return Metric(
            name=self.name,
            value=self.point,
            low=interval.low if interval else None,
            high=interval.high if interval else None,
            unit=self.unit,
            count=self.count,
            teacher=self.teacher,
            higher_is_better=higher_is_better(self.name),
            description=self.description,
            data=data,
            p_value=self.p_value,
        )


def by_bootstrap(figure: MetricDraft) -> Interval:
    return bootstrap_interval(figure.rows, figure.statistic, _RESAMPLES, of_counts=figure.of_counts)


def by_jackknife(figure: MetricDraft) -> Interval:
    n, of_counts = len(figure.rows), figure.of_counts

    def of_kept(kept: np.ndarray) -> float:
        return figure.statistic(figure.rows[kept]) if of_counts is None else of_counts(kept[None].astype(float)).item()

    return grouped_jackknife_interval(n, min(_GROUPS, n), of_kept)


def by_wilson(figure: MetricDraft) -> Interval:
    hits = figure.rows.astype(float)
    effect = design_effect(hits, figure.clusters)
    return wilson_interval(float(hits.sum()) / effect, len(hits) / effect)


def by_newcombe(figure: MetricDraft) -> Interval:
    return newcombe_of(figure.rows[:, 0], figure.rows[:, 1], figure.clusters)


def by_tang(figure: MetricDraft) -> Interval:
    ours, theirs = figure.rows[:, 0], figure.rows[:, 1]
    effect = design_effect(ours - ours.sum() / theirs.sum() * theirs, figure.clusters)
    both, first, second, _ = (count / effect for count in paired_counts(ours, theirs))
    return tang_interval(both, first, second)


def newcombe_of(ours: np.ndarray, theirs: np.ndarray, clusters: np.ndarray | None = None) -> Interval:
    """Newcombe's interval of the difference of two shares of hits [examples], ours minus theirs."""
    effect = design_effect(ours.astype(float) - theirs.astype(float), clusters)
    return newcombe_interval(*(count / effect for count in paired_counts(ours, theirs)))


def paired_counts(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int, int, int]:
    """How many examples both sides, the first, the second or none of the two got right."""
    left, right = ours > 0, theirs > 0
    both, first, second, none = left & right, left & ~right, ~left & right, ~left & ~right
    return int(both.sum()), int(first.sum()), int(second.sum()), int(none.sum())


def design_effect(values: np.ndarray, clusters: np.ndarray | None) -> float:
    """How many of these values say as much as one independent value would: the variance of their mean when whole
    clusters are drawn over that when each is drawn alone, and at least 1. Counts divided by it go into the formulas for
    independent ones: Rao and Scott, "A simple method for the analysis of clustered binary data", Biometrics 48 (1992).

    Args:
        values: [examples], any mean.
        clusters: int64 [examples], as in `MetricDraft`; each value stands alone where it is `None`.
    """
    if clusters is None:
        return 1.0
    centred = values - values.mean()
    sums = np.bincount(clusters, weights=centred)
    many = len(np.unique(clusters))
    alone = float(np.sum(centred**2))
    return max(1.0, many / (many - 1) * float(np.sum(sums**2)) / alone) if alone and many > 1 else 1.0


def figure_of_sums(
    name: str,
    description: str,
    rows: np.ndarray,
    of_sums: Callable[[np.ndarray], np.ndarray],
    count: int,
    *,
    unit: str = "",
    teacher: float | None = None,
) -> MetricDraft:
    """A metric that is a function of the sums of columns over the rows that were drawn, with a bootstrap's interval.

    Args:
        rows: float [examples, columns].
        of_sums: [..., columns] -> [...].
    """
    exact = rows.astype(np.float64)
    return MetricDraft(
        name,
        description,
        exact,
        lambda drawn: float(of_sums(drawn.sum(axis=0))),
        by_bootstrap,
        count,
        unit,
        teacher,
        of_counts=lambda counts: of_sums(counts @ exact),
    )


def mean_figure(
    name: str,
    description: str,
    values: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    unit: str = "",
    teacher: float | None = None,
) -> MetricDraft:
    """The mean of values [examples]; where several are from one row of the data, whole rows are drawn."""
    rows = sums_by_row(values[:, None], clusters)
    return figure_of_sums(name, description, rows, ratio_of_sums, len(values), unit=unit, teacher=teacher)


def sums_by_row(values: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """The sums of the columns of values [examples, columns] in each row of the data, then how many values there are in
    it: float64 [rows, columns + 1]."""
    counted = np.column_stack([values, np.ones(len(values))])
    if clusters is None:
        return counted
    rows = int(clusters.max(initial=-1)) + 1
    return np.column_stack([np.bincount(clusters, weights=column, minlength=rows) for column in counted.T])


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """The first column's sum over the last one's."""
    return ratio(sums[..., 0], sums[..., -1])


def ratio(above: np.ndarray | float, below: np.ndarray | float) -> np.ndarray:
    """Not a number where there is nothing below, as in a resample of a few examples; such resamples are left out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(below) != 0, np.divide(above, below), np.nan)


def largest_figure(name: str, description: str, values: np.ndarray, unit: str = "") -> MetricDraft:
    """The largest of values [examples]."""
    return MetricDraft(name, description, values, lambda rows: float(rows.max()), None, len(values), unit)


def share_figure(
    name: str,
    description: str,
    hits: np.ndarray,
    clusters: np.ndarray | None = None,
    teacher: float | None = None,
) -> MetricDraft:
    """The share of hits bool [examples]."""
    return MetricDraft(name, description, hits, _mean, by_wilson, len(hits), teacher=teacher, clusters=clusters)


def compared_shares(
    name: str,
    description: str,
    ours: np.ndarray,
    theirs: np.ndarray | None,
    clusters: np.ndarray | None = None,
    p_value: float | None = None,
) -> Iterator[MetricDraft]:
    """A share of hits bool [examples], its difference to the teacher's, and what is kept of it."""
    n, reached = len(ours), float(theirs.mean()) if theirs is not None else None
    yield share_figure(name, description, ours, clusters, reached)
    if theirs is None:
        return
    paired = np.column_stack([ours, theirs]).astype(float)
    told = f"{name} minus the teacher's, same examples"
    yield MetricDraft(
        f"{name}_difference", told, paired, _difference, by_newcombe, n, clusters=clusters, p_value=p_value
    )
    if reached:
        told = f"share of the teacher's {name.replace('_', ' ')} that is kept"
        yield MetricDraft(f"{name}_kept", told, paired, _kept, by_tang, n, clusters=clusters)


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean(dtype=np.float64))


def _difference(rows: np.ndarray) -> float:
    return float(rows[:, 0].mean() - rows[:, 1].mean())


def _kept(rows: np.ndarray) -> float:
    return float(ratio(rows[:, 0].sum(), rows[:, 1].sum()))
