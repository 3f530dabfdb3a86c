"""The drawings of a sensitivity report: a map of layers and structures, and curves of quality against what is cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from ..records.report import short_number
from ..records.sensitivity import TITLES, Sensitivity, SensitivityRecord
from .svg import Scale, drawing, element, line, log_span, marker, plot_box, polyline, span, text, tick_text, y_axis

_WIDTH = 380.0
_LEFT, _TOP, _RIGHT = 40.0, 38.0, 2.0
_CELL_HEIGHT, _WIDEST_CELL = 24.0, 84.0
_SHORT = {"heads": "heads", "ffn": "channels", "layers": "layer", "2:4": "2:4", "unstructured": "weights"}
_LOG_FROM = 6  # a metric whose values lie this many times apart is drawn by its logarithm, where it is better lower
_OTHER = "other"
MOST, LEAST = "s5", "s3"
"""The colours of the layer that is missed most, and of the one missed least."""
_LABEL_ROOM, _LABEL_HEIGHT = 46.0, 13.0
_TICKS = 12


def loss_map(
    found: Sensitivity,
    amounts: Mapping[tuple[str, int], float],
    title: str,
    framed: frozenset[tuple[str, int]] = frozenset(),
) -> Markup:
    """A cell for every structure (column) and layer (row): the fuller its colour, the more is lost, by the square root,
    so that small losses are seen beside large ones. What is framed must not be touched.

    Args:
        amounts: the loss by structure and layer, 1 = everything; no cell where there is none.
    """
    finite = [value for value in amounts.values() if math.isfinite(value)]
    full = min(max(finite, default=1.0), 1.0) or 1.0
    wide = min((_WIDTH - _LEFT - _RIGHT) / len(found.structures), _WIDEST_CELL)
    parts, frames = [], []
    for column, structure in enumerate(found.structures):
        middle = _LEFT + (column + 0.5) * wide
        parts.append(text(middle, 14, _SHORT.get(structure, structure), "label", "middle"))
        parts.append(text(middle, 29, _share_of(found, structure), "tick", "middle"))
        for layer in range(found.layers):
            amount = amounts.get((structure, layer))
            if amount is None:
                continue
            box = {"x": _LEFT + column * wide, "y": _TOP + layer * _CELL_HEIGHT, "width": wide, "height": _CELL_HEIGHT}
            strength = 0.04 + 0.76 * math.sqrt(min(max(amount, 0.0) / full, 1.0))
            parts.append(element("rect", class_="heat", fill_opacity=strength, **box))
            parts.append(text(middle, box["y"] + 16, _cell_text(amount), "value", "middle"))
            if (structure, layer) in framed:
                frames.append(element("rect", class_="untouchable", **{**box, **_inset(box)}))
    parts += [
        text(_LEFT - 8, _TOP + layer * _CELL_HEIGHT + 16, str(layer), "tick", "end") for layer in range(found.layers)
    ]
    bottom = _TOP + found.layers * _CELL_HEIGHT
    turned = f"translate(11 {(_TOP + bottom) / 2:.1f}) rotate(-90)"
    parts.append(element("text", "layer", class_="axis-title", text_anchor="middle", transform=turned))
    told = "; ".join(f"{TITLES[name]} of layer {layer} {_cell_text(v)}" for (name, layer), v in amounts.items())
    parts.append(element("desc", f"{title}: {told}"))
    return drawing(_WIDTH, bottom + 4, title, *parts, *frames)


def _inset(box: Mapping[str, float]) -> dict[str, float]:
    """A frame inside its cell, so that neighbours' frames stay apart."""
    return {"x": box["x"] + 1.5, "y": box["y"] + 1.5, "width": box["width"] - 3, "height": box["height"] - 3}


def _share_of(found: Sensitivity, structure: str) -> str:
    shares = {record.share for record in found.shown(structure).values()}
    return "all" if shares == {1.0} else ", ".join(f"{share * 100:g} %" for share in sorted(shares))


def _cell_text(amount: float) -> str:
    """A loss in per cent without the sign, short enough for a cell."""
    if not math.isfinite(amount):
        return "all"
    size = abs(amount) * 100
    if size >= 1000:
        return f"{short_number(size, 2)}"
    shown = f"{size:.0f}" if size >= 9.95 else f"{size:.1f}" if size >= 0.05 else "0"
    return f"−{shown}" if amount < 0 and shown != "0" else shown


def value_scale(found: Sensitivity, start: float, stop: float) -> Scale:
    """The y axis that all curves of a report share."""
    values = [found.uncut, *(record.value for record in found.records)]
    finite = [value for value in values if math.isfinite(value)]
    if not found.higher_is_better and min(finite) > 0 and max(finite) / min(finite) >= _LOG_FROM:
        return Scale(*log_span(finite), start, stop, log=True)
    return Scale(*span(finite), start, stop)


def curves(found: Sensitivity, structure: str) -> Markup:
    """The metric against the share cut, a line a layer; the layer that is missed most and the one missed least, by the
    mean loss over the shares, are coloured and named."""
    height = 230.0
    left, right, top, bottom = plot_box(_WIDTH, height, left=52)
    right -= _LABEL_ROOM
    lines = {layer: found.of(structure, layer) for layer in sorted({item.layer for item in found.of(structure)})}
    x = Scale(0.0, max((_cut(item) for items in lines.values() for item in items), default=1.0), left, right)
    y = value_scale(found, bottom, top)
    parts = [
        _shares_axis(x, bottom),
        y_axis(y, left, right, ""),
        line(left, y(found.uncut), right, y(found.uncut), "front"),
    ]
    classes = extremes(found, structure)
    ends = []
    for layer in sorted(lines, key=lambda layer: classes.get(layer, _OTHER) != _OTHER):  # the coloured ones on top
        points = [(0.0, found.uncut), *((_cut(item), item.value) for item in lines[layer])]
        drawn = [(x(at), y(value)) for at, value in points if math.isfinite(value)]
        class_ = classes.get(layer, _OTHER)
        parts.append(polyline(drawn, f"curve {class_}"))
        if class_ != _OTHER:
            parts += [marker(*point, int(class_[1:]), size=3.0) for point in drawn[1:]]
            ends.append((drawn[-1][1], f"layer {layer}"))
    parts += _end_labels(right + 6, ends)
    said = "; ".join(f"layer {layer}: {_listed(items)}" for layer, items in lines.items())
    title = f"{found.metric} against the share of {TITLES[structure]} cut from one layer"
    return drawing(_WIDTH, height, title, element("desc", f"Uncut {short_number(found.uncut)}; {said}"), *parts)


def _cut(record: SensitivityRecord) -> float:
    return record.cut / record.units


def extremes(found: Sensitivity, structure: str) -> dict[int, str]:
    """The layers that are drawn in colour, with its class."""
    by_layer: dict[int, list[float]] = {}
    for item in found.of(structure):
        by_layer.setdefault(item.layer, []).append(item.loss)
    ranked = sorted(by_layer, key=lambda layer: sum(by_layer[layer]))
    return {ranked[0]: LEAST, ranked[-1]: MOST} if len(ranked) > 1 else dict.fromkeys(ranked, MOST)


def _listed(items: Sequence[SensitivityRecord]) -> str:
    return ", ".join(f"{_cut(item):.0%} {_told(item.value)}" for item in items)


def _told(value: float) -> str:
    return short_number(value, 3) if math.isfinite(value) else "nothing"


def _shares_axis(x: Scale, bottom: float) -> Markup:
    parts = [line(x.start, bottom, x.stop, bottom, "axis")]
    for tick in x.ticks():
        parts.append(line(x(tick), bottom, x(tick), bottom + 4, "axis"))
        parts.append(text(x(tick), bottom + 16, f"{tick * 100:g} %", "tick", "middle"))
    parts.append(text((x.start + x.stop) / 2, bottom + 32, "cut from one layer", "axis-title", "middle"))
    return Markup("").join(parts)


def _end_labels(x: float, ends: Sequence[tuple[float, str]]) -> list[Markup]:
    """Names at the ends of their lines, moved down where two would lie on each other."""
    parts, free = [], -math.inf
    for y, name in sorted(ends):
        row = max(y + 4, free)
        free = row + _LABEL_HEIGHT
        parts.append(text(x, row, name, "label"))
    return parts


def by_layer(found: Sensitivity, structure: str) -> Markup:
    """The metric with a structure cut from each layer in turn, for one that is cut or not; lines hang from the uncut
    model's value."""
    height = 230.0
    left, right, top, bottom = plot_box(_WIDTH, height, left=52)
    x = Scale(-0.5, found.layers - 0.5, left, right)
    y = value_scale(found, bottom, top)
    parts = [line(left, bottom, right, bottom, "axis"), y_axis(y, left, right, "")]
    for layer in range(0, found.layers, math.ceil(found.layers / _TICKS)):
        parts.append(text(x(layer), bottom + 16, tick_text(layer), "tick", "middle"))
    parts.append(text((left + right) / 2, bottom + 32, "layer", "axis-title", "middle"))
    parts.append(line(left, y(found.uncut), right, y(found.uncut), "front"))
    classes, records = extremes(found, structure), found.of(structure)
    for item in records:
        class_ = classes.get(item.layer, _OTHER)
        lost = not math.isfinite(item.value)
        here = x(item.layer), y(found.uncut) if lost else y(item.value)
        parts.append(line(here[0], y(found.uncut), *here, "whisker"))
        if lost:
            parts.append(text(here[0], here[1] + 14, "lost", "tick", "middle"))
        else:
            parts.append(marker(*here, int(class_[1:]) if class_ != _OTHER else 0, size=4.5))
    said = "; ".join(f"layer {item.layer}: {_told(item.value)}" for item in records)
    title = f"{found.metric} with {TITLES[structure]} cut from one layer"
    return drawing(_WIDTH, height, title, element("desc", f"Uncut {short_number(found.uncut)}; {said}"), *parts)
