"""The charts of the HTML report, each a pure function from parts of a report to one inline SVG.

Drawn about 380 units wide, so that their text is readable on a phone without scrolling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..records.report import Curve, GateResult, Latency, LayerWidths, ReliabilityBin, exact_number, short_number
from .figures import Figure
from .svg import (
    SERIES,
    Scale,
    drawing,
    element,
    line,
    log_span,
    marker,
    plot_box,
    polyline,
    span,
    text,
    x_axis,
    y_axis,
)

_WIDTH = 380.0
_LOG_FROM = 6  # an axis of times whose ends are this many times apart is logarithmic
_LETTER = 6.2  # rough width of a label's letter


def swatch(series: int) -> Markup:
    """The marker of a candidate, for legends; it says nothing that the name beside it does not."""
    return element("svg", marker(8, 8, series), viewBox="0 0 16 16", class_="swatch", aria_hidden="true")


def latency_domain(latencies: Sequence[Latency]) -> tuple[float, float]:
    """The milliseconds that every latency histogram of a report shares as its x axis."""
    values = [value for item in latencies for value in (*_filled_edges(item), item.p50_ms, item.p99_ms)]
    positive = [value for value in values if math.isfinite(value) and value > 0]
    return (min(positive), max(positive)) if positive else (0.1, 1.0)


def _filled_edges(latency: Latency) -> list[float]:
    """The ends of the bars that hold anything."""
    edges, counts = latency.histogram_edges_ms, latency.histogram_counts
    return [edge for index, count in enumerate(counts) if count for edge in edges[index : index + 2]]


def _time_scale(low: float, high: float, start: float, stop: float) -> Scale:
    if high / low >= _LOG_FROM:
        return Scale(*log_span([low, high]), start, stop, log=True)
    low, high = span([low, high])
    return Scale(max(0.0, low), high, start, stop)


def _time_title(scale: Scale, what: str) -> str:
    return f"{what}, ms (log scale)" if scale.log else f"{what}, ms"


def latency_histogram(latency: Latency, domain: tuple[float, float], title: str, series: int) -> Markup:
    """How the calls spread, with the median and the 99th percentile marked. Bars are relative to the fullest one: the
    panels share their x axis, their heights say nothing across panels."""
    height = 138.0
    left, right, top, bottom = plot_box(_WIDTH, height, left=12)
    x = _time_scale(*domain, left, right)
    y = Scale(0, max(latency.histogram_counts, default=1) or 1, bottom, top + 12)
    parts = []
    for index, count in enumerate(latency.histogram_counts):
        start, stop = (x(edge) for edge in latency.histogram_edges_ms[index : index + 2])
        if count:
            # at least a pixel: a quick candidate's bars are slivers on an axis that a slow teacher stretches
            size = {"width": max(stop - start - 0.4, 1.0), "height": bottom - y(count)}
            parts.append(element("rect", x=start, y=y(count), class_=f"bar s{series % SERIES}", **size))
    apart = x(latency.p99_ms) - x(latency.p50_ms)
    for name, value, anchor in (("p50", latency.p50_ms, "end"), ("p99", latency.p99_ms, "start")):
        parts.append(line(x(value), top + 3, x(value), bottom, f"mark {name}"))
        nudge = 0 if apart > 40 else -3 if name == "p50" else 3
        at = min(max(x(value), left + 26), right - 26) + nudge
        parts.append(text(at, top - 1, name, "tick", "middle" if apart > 40 else anchor))
    words = (
        f"Latency of {title}: median {short_number(latency.p50_ms, 3)} ms, 99th percentile "
        f"{short_number(latency.p99_ms, 3)} ms, {latency.samples:,} calls"
    )
    return drawing(_WIDTH, height, words, *parts, x_axis(x, bottom, _time_title(x, "one call")))


@dataclass(frozen=True)
class Point:
    """One candidate in the plot of quality against latency (milliseconds)."""

    name: str
    series: int
    latency: Figure
    quality: Figure


def quality_against_latency(points: Sequence[Point], quality_title: str, higher_is_better: bool) -> Markup:
    """Each candidate by its median latency and its quality, with 95% intervals as whiskers; a dashed line joins those
    that no other beats in both."""
    height = 300.0
    left, right, top, bottom = plot_box(_WIDTH, height)
    times = [end for point in points for end in _ends(point.latency) if end > 0]
    x = _time_scale(min(times, default=0.1), max(times, default=1.0), left, right)
    y = Scale(*span([end for point in points for end in _ends(point.quality)], padding=0.12), bottom, top)
    parts = [x_axis(x, bottom, _time_title(x, "median of one call")), y_axis(y, left, right, quality_title)]
    front = [(x(point.latency.value), y(point.quality.value)) for point in pareto_front(points, higher_is_better)]
    parts.append(polyline(front, "front"))
    for point in points:
        here = x(point.latency.value), y(point.quality.value)
        low, high = _ends(point.quality)
        early, late = _ends(point.latency)
        parts.append(line(here[0], y(low), here[0], y(high), "whisker"))
        parts.append(line(x(early), here[1], x(late), here[1], "whisker"))
        parts.append(marker(*here, point.series))
    parts += _labels([(x(point.latency.value), y(point.quality.value), point.name) for point in points], left, right)
    shown = "; ".join(f"{point.name}: {point.latency.text} ms, {point.quality.text}" for point in points)
    return drawing(_WIDTH, height, f"{quality_title} against latency. {shown}", *parts)


def _ends(figure: Figure) -> tuple[float, float]:
    return figure.value if figure.low is None else figure.low, figure.value if figure.high is None else figure.high


def pareto_front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The points that no other beats in both latency and quality, from the quickest to the slowest."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda item: (item.latency.value, -sign * item.quality.value)):
        if not front or sign * point.quality.value > sign * front[-1].quality.value:
            front.append(point)
    return front


def _labels(spots: Sequence[tuple[float, float, str]], left: float, right: float) -> list[Markup]:
    """Names beside their points, moved down or up where two would lie on each other."""
    taken: list[tuple[float, float, float]] = []
    parts = []
    for x, y, name in sorted(spots, key=lambda spot: spot[1]):
        shown = name if len(name) <= 28 else name[:27] + "…"
        width = len(shown) * _LETTER
        start = x + 10 if x + 10 + width <= right else max(left + 2, x - 10 - width)
        row = y + 4
        for shift in (0, 14, -14, 28, -28, 42, -42):
            row = y + 4 + shift
            if not any(abs(row - other) < 13 and start < end and begin < start + width for begin, end, other in taken):
                break
        taken.append((start, start + width, row))
        parts.append(text(start, row, shown, "label halo"))
    return parts


def reliability(bins: Sequence[ReliabilityBin], title: str, series: int) -> Markup:
    """Accuracy against confidence; on the diagonal a model is as sure as it is right. Points grow with their count."""
    height = 300.0
    left, right, top, bottom = plot_box(_WIDTH, height)
    x, y = Scale(0, 1, left, right), Scale(0, 1, bottom, top)
    parts = [x_axis(x, bottom, "confidence"), y_axis(y, left, right, "accuracy")]
    parts.append(line(left, bottom, right, top, "diagonal"))
    filled = [item for item in bins if item.count]
    most = max((item.count for item in filled), default=1)
    for item in filled:
        here = x(item.confidence), y(item.accuracy)
        parts.append(line(here[0], here[1], here[0], y(item.confidence), "gap"))
        parts.append(marker(*here, series, size=3 + 5 * math.sqrt(item.count / most)))
    return drawing(_WIDTH, height, f"Reliability of {title}: accuracy against confidence in {len(filled)} bins", *parts)


def curve(
    item: Curve,
    series: int,
    steps: tuple[float, float],
    title: str,
    marked: float | None = None,
    over: str = "training step",
) -> Markup:
    """A quantity over training steps, or over what `over` says that `item.steps` are.

    Args:
        steps: the ends of the x axis, which the panels of one training share.
        marked: the step whose point is marked; the last when not given.
    """
    height = 190.0
    left, right, top, bottom = plot_box(_WIDTH, height, left=52)
    known = [(at, value) for at, value in zip(item.steps, item.values, strict=True) if math.isfinite(value)]
    x = Scale(*steps, left, right)
    y = Scale(*span([value for _, value in known], padding=0.08), bottom, top)
    parts = [x_axis(x, bottom, over), y_axis(y, left, right)]
    points = [(x(at), y(value)) for at, value in known]
    parts.append(polyline(points, f"curve s{series % SERIES}"))
    words = f"{title}: nothing finite to draw"
    if known:
        place = next((index for index, (at, _) in enumerate(known) if at == marked), -1)
        parts.append(marker(*points[place], series, size=4.5))
        unit = f" {item.unit}" if item.unit else ""
        words = f"{title}, from {short_number(known[0][1], 3)} to {short_number(known[-1][1], 3)}{unit}"
    return drawing(_WIDTH, height, words, *parts)


def cut_widths(widths: Sequence[LayerWidths]) -> Markup:
    """What pruning cut: for each layer a frame for the width before and a bar for what was kept."""
    row, left, right = 34.0, 2.0, _WIDTH - 2
    widest = max((max(item.before, item.after) for item in widths), default=1) or 1
    x = Scale(0, widest, left, right)
    parts = []
    for index, item in enumerate(widths):
        top = index * row
        change = (
            f" ({(item.after - item.before) / item.before:+.0%})".replace("-", "−")
            if item.before and item.after != item.before
            else ""
        )
        name = item.layer if len(item.layer) <= 34 else "…" + item.layer[-33:]
        parts.append(text(left, top + 13, name, "label"))
        parts.append(text(right, top + 13, f"{item.before:,} → {item.after:,}{change}", "label number", "end"))
        for value, class_ in ((item.before, "cut"), (item.after, "kept")):
            size = {"width": max(x(value) - left, 1.0), "height": 9.0}
            parts.append(element("rect", x=left, y=top + 19, class_=class_, **size))
    words = "; ".join(f"{item.layer}: {item.before} to {item.after}" for item in widths)
    return drawing(_WIDTH, len(widths) * row, f"Widths before and after pruning. {words}", *parts)


def gate_interval(result: GateResult) -> Markup:
    """The observed value with its interval, against the limits; what a gate refuses is hatched."""
    width, height, middle = 200.0, 40.0, 15.0
    limits = [limit for limit in (result.gate.min, result.gate.max) if limit is not None]
    ends = [end for end in (result.low, result.observed, result.high) if end is not None and math.isfinite(end)]
    x = Scale(*span([*limits, *ends], padding=0.18), 4.0, width - 4)
    parts = []
    for limit, edge in ((result.gate.min, x.start), (result.gate.max, x.stop)):
        if limit is not None:
            size = {"width": abs(x(limit) - edge), "height": 22.0}
            parts.append(element("rect", x=min(x(limit), edge), y=middle - 11, class_="refused", **size))
            parts.append(line(x(limit), middle - 13, x(limit), middle + 13, "limit"))
            at = min(max(x(limit), 22.0), width - 22)
            parts.append(text(at, height - 1, exact_number(limit), "tick", "middle"))
    if ends:
        class_ = f"interval {result.verdict}"
        parts.append(line(x(min(ends)), middle, x(max(ends)), middle, class_))
        parts += [
            line(x(end), middle - 5, x(end), middle + 5, class_)
            for end in (result.low, result.high)
            if end is not None and math.isfinite(end)
        ]
    if result.observed is not None and math.isfinite(result.observed):
        parts.append(element("circle", cx=x(result.observed), cy=middle, r=4.5, class_=f"observed {result.verdict}"))
    return drawing(width, height, result.reason, *parts, class_="gate-chart")
