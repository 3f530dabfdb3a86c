"""The picture of a model's layers: a row a layer, a column a kind of matrix; size, precision and zeros in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from ...errors import InputError
from ...exporters.layer_facts import LayerFacts, ProgramFacts
from ...files import write_text
from ...models.anatomy import MATRIX_KINDS
from ..records.report import size_text
from .pages import page_environment
from .precision_colours import precision_class, precision_words
from .svg import element, line, text

_LEFT, _RIGHT, _TOP = 66.0, 78.0, 84.0
_CELL, _ROW, _GAP = 112.0, 40.0, 14.0
_BAR = 13.0
_NARROWEST = 560.0
_LINE = 20.0
_LISTED = 8
_LONGEST_NAME = 52
_STYLE = """
.layers { font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.layers text { fill: var(--ink); } .layers .soft { fill: var(--soft); }
.layers .name { font-size: 17px; font-weight: 650; }
.layers .number { font-variant-numeric: tabular-nums; } .layers .strong { font-weight: 700; }
.card { fill: var(--card); } .rule { stroke: var(--rule); }
.zeros { fill: var(--faint); stroke: var(--soft); stroke-width: .8; stroke-dasharray: 3 2; }
.s0 { fill: var(--s0); } .s1 { fill: var(--s1); } .s2 { fill: var(--s2); } .s3 { fill: var(--s3); }
.s4 { fill: var(--s4); } .s5 { fill: var(--s5); } .s6 { fill: var(--s6); }
"""


def write_layers(facts: ProgramFacts | None, name: str, path: Path, unknown: str = "") -> None:
    """Write the picture as an SVG file of its own, which follows light and dark.

    Args:
        unknown: why there are no facts, where there are none.

    Raises:
        InputError: no layer is known.
        DiskFull: no room was left.
    """
    if facts is None or not any(layer.number is not None for layer in facts.layers):
        raise InputError(f"There are no layers of {name} to draw. {unknown}".strip())
    write_text(path, str(draw_layers(facts, name)))


def draw_layers(facts: ProgramFacts, name: str) -> Markup:
    """The whole `<svg>`. A bar's length says how many weights a matrix has, its colour their precision, and its dashed
    end how many of them are zero."""
    inside = {(layer.number, layer.kind): layer for layer in reversed(facts.layers) if layer.number is not None}
    rows = sorted({number for number, _ in inside if number is not None})
    kinds = {str(kind) for _, kind in inside}
    columns = [kind for kind in MATRIX_KINDS if kind in kinds] + sorted(kinds - set(MATRIX_KINDS))
    outside = [*facts.tables, *(layer for layer in facts.layers if layer.number is None)]
    most = max(layer.shape[0] * layer.shape[1] for layer in inside.values())
    width = max(_LEFT + len(columns) * (_CELL + _GAP) + _RIGHT, _NARROWEST)
    parts = [_heading(facts, name, len(rows))]
    for column, kind in enumerate(columns):
        parts.append(text(_LEFT + column * (_CELL + _GAP), _TOP - 10, _clean(kind), "soft"))
    parts.append(text(width - 14, _TOP - 10, "size", "soft", "end"))
    for row, number in enumerate(rows):
        top = _TOP + row * _ROW
        parts += [line(14, top, width - 14, top, "rule"), text(14, top + 19, f"layer {number}", "number")]
        there = [layer for (owner, _), layer in inside.items() if owner == number]
        size = sum(layer.size_bytes for layer in there)
        parts.append(text(width - 14, top + 19, size_text(size), "number", "end"))
        for column, kind in enumerate(columns):
            if layer := inside.get((number, kind)):
                parts.append(_cell(_LEFT + column * (_CELL + _GAP), top + 8, layer, most))
    bottom = _TOP + len(rows) * _ROW
    parts.append(line(14, bottom, width - 14, bottom, "rule"))
    parts.append(_outside(outside, bottom + 22, width))
    bottom += 22 + _LINE * (min(len(outside), _LISTED + 1) + bool(outside))
    legend, height = _legend([*inside.values(), *outside], bottom + 6, width)
    title = f"Layers of {_clean(name)}: size, precision and zeros of every matrix"
    return element(
        "svg", element("title", title), element("style", _style()),
        element("rect", class_="card", width="100%", height="100%", rx=10), *parts, legend,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width:g} {height:g}", width=f"{width:g}",
        height=f"{height:g}", role="img", aria_label=title, class_="layers",
    )  # fmt: skip


def _style() -> Markup:
    return Markup(page_environment().get_template("colours.css.j2").render() + _STYLE)


def _heading(facts: ProgramFacts, name: str, layers: int) -> Markup:
    size = sum(layer.size_bytes for layer in (*facts.layers, *facts.tables))
    matrices = len(facts.layers)
    told = f"{layers} layers, {matrices} matrices that are multiplied; {size_text(size)} of weights as stored"
    return Markup("").join([text(14, 28, _clean(name), "name"), text(14, 46, told, "soft")])


def _cell(x: float, y: float, layer: LayerFacts, most: int) -> Markup:
    length = max(_CELL * layer.shape[0] * layer.shape[1] / most, 2.0)
    kept = length * (1 - layer.zeros)
    told = (f"{_clean(layer.layer)}: {layer.shape[0]} x {layer.shape[1]}, {layer.precision}, {layer.sparsity}, "
            f"{size_text(layer.size_bytes)}")  # fmt: skip
    parts = [element("title", told)]
    if layer.zeros:
        parts.append(element("rect", x=x, y=y, width=length, height=_BAR, class_="zeros"))
    parts.append(element("rect", x=x, y=y, width=kept, height=_BAR, class_=precision_class(layer.precision)))
    parts.append(text(x, y + 26, f"{layer.shape[0]} × {layer.shape[1]}", "soft number"))
    if not layer.sparsity.startswith("dense"):
        short = "2:4" if layer.sparsity == "2:4" else f"{layer.zeros:.0%}"
        parts.append(text(x + _CELL, y + 26, short, "strong number", "end"))
    return element("g", *parts)


def _outside(layers: Sequence[LayerFacts], y: float, width: float) -> Markup:
    """Embeddings and heads, in words: their sizes have nothing to do with the layers'."""
    if not layers:
        return Markup("")
    parts = [text(14, y, "Outside the layers", "soft")]
    for index, layer in enumerate(layers[:_LISTED], 1):
        row = y + index * _LINE
        parts.append(
            element("rect", x=14.0, y=row - 9, width=10.0, height=10.0, class_=precision_class(layer.precision))
        )
        name = _clean(layer.layer)
        shown = name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
        parts.append(text(30, row, f"{shown}  {layer.shape[0]:,} × {layer.shape[1]:,}", "number"))
        parts.append(text(width - 14, row, size_text(layer.size_bytes), "number", "end"))
    if len(layers) > _LISTED:
        parts.append(text(30, y + (_LISTED + 1) * _LINE, f"and {len(layers) - _LISTED} more", "soft"))
    return Markup("").join(parts)


def _legend(layers: Sequence[LayerFacts], y: float, width: float) -> tuple[Markup, float]:
    """What the colours mean, in lines that fit; and the height of the whole drawing."""
    named = {precision_words(layer.precision): precision_class(layer.precision) for layer in layers}
    if any(layer.zeros for layer in layers):
        named["zeros, with their pattern or share where they are many"] = "zeros"
    parts, x, row = [], 14.0, y + 8
    for words, class_ in named.items():
        room = 30 + 6.2 * len(words)
        if x > 14 and x + room > width:
            x, row = 14.0, row + _LINE
        parts.append(element("rect", x=x, y=row - 9, width=10.0, height=10.0, class_=class_))
        parts.append(text(x + 16, row, words))
        x += room
    row += _LINE
    parts.append(text(14, row, "A bar's length is the number of weights, inputs × outputs.", "soft"))
    return Markup("").join(parts), row + 16


def _clean(words: str) -> str:
    """Names come from files of anybody; an SVG takes no control characters."""
    return "".join(letter for letter in words if letter.isprintable())
