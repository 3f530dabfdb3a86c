"""The few SVG parts that charts are drawn from: an element, a scale, axes. Pure functions from numbers to markup.

Colours come from the style sheet by class, so that a drawing follows light and dark. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from ..records.report import short_number

SERIES = 7  # colours (Okabe-Ito) in the style sheet: classes s0 (the teacher) to s6
_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 46, 12, 12, 38


def element(name: str, *children: str, **attributes: object) -> Markup:
    """One SVG element. `class_` gives `class`, `stroke_width` gives `stroke-width`; `None` leaves an attribute out."""
    written = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.2f}" if isinstance(value, float) else str(value)
        )
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(
        Markup(name), written, Markup("").join(escape(child) for child in children)
    )


def drawing(width: float, height: float, title: str, *children: Markup, class_: str = "chart") -> Markup:
    """A whole `<svg>` that scales with its container and tells a screen reader what it shows."""
    return element(
        "svg",
        element("title", title),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=title,
        class_=class_,
        # height by hand: some readers of saved pages do not take it from the viewBox
        width=f"{width:g}",
        height=f"{height:g}",
    )


def text(x: float, y: float, words: str, class_: str = "label", anchor: str | None = None) -> Markup:
    """A line of text; `anchor` is `start`, `middle` or `end`."""
    return element("text", words, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    return element("polyline", points=" ".join(f"{x:.2f},{y:.2f}" for x, y in points), class_=class_)


def marker(x: float, y: float, series: int, size: float = 5.5) -> Markup:
    """A point whose shape differs with its series, as its colour does."""
    half = size * 0.9
    class_ = f"marker s{series % SERIES}"
    outlines = {
        1: f"M{x - half:.2f},{y - half:.2f}h{2 * half:.2f}v{2 * half:.2f}h{-2 * half:.2f}z",
        2: f"M{x:.2f},{y - size:.2f}l{size:.2f},{1.8 * size:.2f}h{-2 * size:.2f}z",
        3: f"M{x:.2f},{y - 1.2 * size:.2f}l{1.1 * size:.2f},{1.2 * size:.2f}l{-1.1 * size:.2f},{1.2 * size:.2f}"
        f"l{-1.1 * size:.2f},{-1.2 * size:.2f}z",
        4: f"M{x:.2f},{y + size:.2f}l{size:.2f},{-1.8 * size:.2f}h{-2 * size:.2f}z",
    }
    outline = outlines.get(series % SERIES)
    if outline is None:
        return element("circle", cx=float(x), cy=float(y), r=float(size), class_=class_)
    return element("path", d=outline, class_=class_)


@dataclass(frozen=True)
class Scale:
    """Maps values from `low`..`high` to pixels from `start`..`stop`, linearly or by logarithm (then `low` > 0)."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._by(self.low), self._by(self.high)
        share = (self._by(value) - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start)

    def _by(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value

    def ticks(self) -> list[float]:
        """Round values inside the scale, at most six or so."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            fine = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
            inside = [tick for tick in fine if self.low <= tick <= self.high]
            if len(inside) <= 7:
                return inside
            return [10.0**decade for decade in decades if self.low <= 10.0**decade <= self.high]
        rough = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def span(values: Sequence[float], padding: float = 0.06) -> tuple[float, float]:
    """The range of the finite values with some air around it; never empty."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    air = (high - low) * padding or max(abs(high) * 0.05, 1e-6)
    return low - air, high + air


def log_span(values: Sequence[float]) -> tuple[float, float]:
    """The range of the positive finite values with some air around it, for a logarithmic scale."""
    positive = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    return min(positive) / 1.25, max(positive) * 1.25


def tick_text(value: float) -> str:
    """A tick's number, as short as it can be."""
    return f"{value:g}" if 1e-4 <= abs(value) < 1e4 or value == 0 else short_number(value, 2)


def plot_box(width: float, height: float, left: float = _MARGIN_LEFT) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of the area inside the axes, in pixels."""
    return left, width - _MARGIN_RIGHT, _MARGIN_TOP, height - _MARGIN_BOTTOM


def x_axis(scale: Scale, bottom: float, title: str) -> Markup:
    """The line under a plot, with its ticks, their numbers and a title."""
    parts = [line(scale.start, bottom, scale.stop, bottom, "axis")]
    for tick in scale.ticks():
        parts += [line(scale(tick), bottom, scale(tick), bottom + 4, "axis")]
        parts += [text(scale(tick), bottom + 16, tick_text(tick), "tick", "middle")]
    parts.append(text((scale.start + scale.stop) / 2, bottom + 32, title, "axis-title", "middle"))
    return Markup("").join(parts)


def y_axis(scale: Scale, left: float, right: float, title: str = "") -> Markup:
    """Grid lines across a plot with their numbers, and a title that runs upwards beside them."""
    parts = []
    for tick in scale.ticks():
        parts += [line(left, scale(tick), right, scale(tick), "grid")]
        parts += [text(left - 6, scale(tick) + 4, tick_text(tick), "tick", "end")]
    if title:
        turned = f"translate(11 {(scale.start + scale.stop) / 2:.1f}) rotate(-90)"
        parts.append(element("text", title, class_="axis-title", text_anchor="middle", transform=turned))
    return Markup("").join(parts)
