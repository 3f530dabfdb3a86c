"""What each step from teacher to program lost: as rows for the tables, and as a waterfall."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..metrics.headline import higher_is_better
from ..records.report import Candidate, Loss, Report, Waypoint, short_number
from .figures import Panel, title_of
from .slices import PlainTable
from .svg import Scale, drawing, element, line, plot_box, span, text, y_axis

_WIDTH, _HEIGHT = 380.0, 230.0
_LEAST_SPAN = 0.01
"""Share of the quality that the axis spans at least: what is far smaller should not look like an abyss."""
_HEADINGS = ("Candidate", "Point", "Runs on", "Quality", "Lost (95% interval)", "Answers moved by", "Weights")


@dataclass(frozen=True)
class Row:
    """One point of one candidate, in words."""

    candidate: str
    point: str
    runtime: str
    quality: str
    lost: str
    moved: str
    weights: str
    note: str = ""

    @property
    def cells(self) -> list[str]:
        return [self.candidate, self.point, self.runtime, self.quality, self.lost, self.moved, self.weights]


@dataclass(frozen=True)
class Steps:
    """The points of all candidates."""

    metric: str
    headings: Sequence[str]
    rows: list[Row]
    panels: list[Panel]


def attribution(report: Report) -> Steps | None:
    """The points of every candidate that has them; nothing where none has."""
    shown = [candidate for candidate in report.candidates if len(candidate.waypoints) > 1]
    metric = next((stop.loss.metric for each in shown for stop in each.waypoints if stop.loss), None)
    if metric is None:
        return None
    rows = [row for candidate in shown for row in _rows(candidate, metric)]
    ends = _ends(shown, metric)
    panels = [panel for candidate in shown if (panel := _panel(candidate, metric, ends))]
    return Steps(title_of(metric), [*_HEADINGS[:3], title_of(metric), *_HEADINGS[4:]], rows, panels)


def attribution_table(report: Report, escape: Callable[[str], str]) -> Iterator[PlainTable]:
    """The same as a table in the markup that `escape` makes of a text."""
    found = attribution(report)
    if found is not None:
        rows = [[*map(escape, row.cells[:-1]), escape(row.weights + (f"; {row.note}" if row.note else ""))]
                for row in found.rows]  # fmt: skip
        yield PlainTable("What each step lost", [*map(escape, found.headings)], rows)


def _rows(candidate: Candidate, metric: str) -> Iterator[Row]:
    for stop in candidate.waypoints:
        figure = stop.metric(metric)
        yield Row(
            candidate.name,
            stop.name,
            f"{stop.runtime.partition('-')[0]}, {stop.precision}",  # without the build's number
            short_number(figure.value if figure else None),
            loss_text(stop.loss),
            _moved(stop),
            "–" if stop.audit is None else "the student's" if stop.audit.passed else "✘ others",
            stop.note or "",
        )


def loss_text(loss: Loss | None) -> str:
    """What was lost, with its interval where it has one."""
    if loss is None:
        return "–"
    if loss.low is None or loss.high is None:
        return _signed(loss.value)
    return f"{_signed(loss.value)} ({_signed(loss.low)} to {_signed(loss.high)})"


def _signed(value: float) -> str:
    """Three digits; what vanishes beside any quality is 0."""
    return "0" if abs(value) < 1e-6 else short_number(value, 2 if abs(value) < 0.1 else 3).replace("-", "−")


def _moved(stop: Waypoint) -> str:
    if stop.parity is None:
        return "–"
    mark = "" if stop.parity.passed else "✘ "
    return f"{mark}{short_number(stop.parity.error, 2)}"


def _panel(candidate: Candidate, metric: str, ends: tuple[float, float]) -> Panel | None:
    known = _measured(candidate, metric)
    if len(known) < 2:
        return None
    lost = [f"{stop.name} {loss_text(stop.loss)}" for stop in known if stop.loss and _signed(stop.loss.value) != "0"]
    told = f"Lost by the {'; by the '.join(lost)}" if lost else "Nothing was lost from point to point"
    return Panel(candidate.name, told, waterfall(known, metric, ends))


def _measured(candidate: Candidate, metric: str) -> list[Waypoint]:
    return [stop for stop in candidate.waypoints if stop.metric(metric)]


def _ends(candidates: Sequence[Candidate], metric: str) -> tuple[float, float]:
    """The ends of the axis that all waterfalls share, so that their bars compare."""
    sign = 1.0 if higher_is_better(metric) else -1.0
    ways = [_measured(candidate, metric) for candidate in candidates]
    levels = [_value(stop, metric) for way in ways for stop in way]
    whiskers = [
        end
        for way in ways
        for before, stop in itertools.pairwise(way)
        for end in _whisker(stop.loss, _value(before, metric), sign)
    ]
    low, high = span([value for value in (*levels, *whiskers) if math.isfinite(value)], padding=0.15)
    room = max(_LEAST_SPAN * abs(levels[0]) - (high - low), 0.0) / 2 if levels else 0.0
    return low - room, high + room


def waterfall(stops: Sequence[Waypoint], metric: str, ends: tuple[float, float]) -> Markup:
    """Quality from point to point: a level line for each, and a bar for what a step lost or gained, with the 95%
    interval of the paired difference as a whisker. The axis does not start at zero, so only differences are bars.

    Args:
        ends: of the axis, in the metric's unit.
    """
    levels = [_value(stop, metric) for stop in stops]
    sign = 1.0 if higher_is_better(metric) else -1.0
    whiskers = [_whisker(stop.loss, before, sign) for stop, before in zip(stops[1:], levels, strict=False)]
    left, right, top, bottom = plot_box(_WIDTH, _HEIGHT, left=52)
    y = Scale(*ends, bottom, top + 14)
    wide = (right - left) / len(stops)
    parts = [y_axis(y, left, right)]
    for place, (stop, level) in enumerate(zip(stops, levels, strict=True)):
        x = left + (place + 0.5) * wide
        if place:
            parts += _step(x, wide, (y(levels[place - 1]), y(level)), whiskers[place - 1], y, sign)
        parts.append(line(x - 0.36 * wide, y(level), x + 0.36 * wide, y(level), "mark"))
        under = place > 0 and (levels[place - 1] - level) * sign > 0 and sign > 0  # a bar that ends here hangs above
        parts.append(text(x, y(level) + (13 if under else -6), short_number(level), "value halo", "middle"))
        parts.append(text(x, bottom + 16, stop.name, "label", "middle"))
        parts.append(text(x, bottom + 31, stop.precision, "tick", "middle"))
    said = "; ".join(f"{stop.name} {short_number(level)}" for stop, level in zip(stops, levels, strict=True))
    return drawing(_WIDTH, _HEIGHT, f"{title_of(metric)} from teacher to program: {said}", *parts)


def _step(
    x: float, wide: float, ends: tuple[float, float], whisker: tuple[float, float], y: Scale, sign: float
) -> Iterator[Markup]:
    before, after = ends
    worse = (after - before) * sign > 0  # pixels run downwards
    size = {"width": 0.5 * wide, "height": max(abs(after - before), 1.0)}
    yield line(x - 0.64 * wide, before, x + 0.25 * wide, before, "gap-line")
    yield element("rect", x=x - 0.25 * wide, y=min(before, after), class_="lost" if worse else "gained", **size)
    yield line(x + 0.3 * wide, y(whisker[0]), x + 0.3 * wide, y(whisker[1]), "whisker")


def _whisker(loss: Loss | None, before: float, sign: float) -> tuple[float, float]:
    """The ends of the interval of a step as levels of quality."""
    if loss is None or loss.low is None or loss.high is None:
        return before, before
    return before - sign * loss.low, before - sign * loss.high


def _value(stop: Waypoint, metric: str) -> float:
    figure = stop.metric(metric)
    return figure.value if figure else math.nan
