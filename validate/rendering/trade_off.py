"""Quality against latency: the drawing, and who beats whom."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from ..records.report import Report
from .charts import Point, pareto_front, quality_against_latency
from .figures import figure_among, latency_figure, numbered, quality_metric, title_of


@dataclass(frozen=True)
class Row:
    """One candidate, in words; `series` is the number of its colour."""

    series: int
    name: str
    latency: str
    quality: str
    standing: str


@dataclass(frozen=True)
class TradeOff:
    """Every candidate that has both figures."""

    quality: str
    drawing: Markup
    rows: list[Row]


def trade_off(report: Report) -> TradeOff | None:
    """Candidates by the median of a call and by the metric that stands for quality; nothing where fewer than two have
    both."""
    quality = quality_metric(report)
    if quality is None:
        return None
    points = []
    for series, candidate in numbered(report):
        latency = latency_figure(candidate, "p50")
        figure = figure_among(report.measured, candidate, quality.name)
        if latency and figure:
            points.append(Point(candidate.name, series, latency, figure))
    if len(points) < 2:
        return None
    title = title_of(quality.name) + (f", {quality.unit}" if quality.unit else "")
    drawn = quality_against_latency(points, title, quality.higher_is_better)
    front = pareto_front(points, quality.higher_is_better)
    return TradeOff(title, drawn, [_row(point, front, quality.higher_is_better) for point in points])


def _row(point: Point, front: list[Point], higher_is_better: bool) -> Row:
    sign = 1 if higher_is_better else -1
    beats = [
        other.name
        for other in front
        if other is not point
        and other.latency.value <= point.latency.value
        and sign * other.quality.value >= sign * point.quality.value
    ]
    standing = "no other beats it" if point in front else f"beaten by {', '.join(beats)}"
    return Row(point.series, point.name, point.latency.text, point.quality.text, standing)
