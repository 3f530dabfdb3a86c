"""The layers of compiled programs side by side: the precision and the zeros of every matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..records.report import Candidate, Matrix, Report, size_text
from .figures import Panel
from .precision_colours import precision_class, precision_words
from .svg import drawing, element, text

_WIDTH = 380.0
_LEFT, _RIGHT, _TOP = 26.0, 62.0, 18.0
_GAP, _BAR = 5.0, 11.0
_ROW, _ROW_WITH_WORDS = 19.0, 30.0
_MANY_ZEROS = 0.2
"""Fewer come of rounding alone."""
KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate+up", "down")
"""`models.anatomy.MATRIX_KINDS`, which is not to be had without torch."""


@dataclass(frozen=True)
class Program:
    """The matrices of one candidate: drawn by layer, and listed one by one."""

    panel: Panel
    rows: list[tuple[str, str, str, str, str]]


def programs(report: Report) -> list[Program]:
    """Every candidate whose matrices are known to lie in layers."""
    shown = [item for item in report.candidates if any(matrix.layer is not None for matrix in item.matrices)]
    return [Program(_panel(item), [_row(matrix) for matrix in item.matrices]) for item in shown]


def legend(report: Report) -> list[tuple[str, str]]:
    """The precisions that occur, each with the class of its colour."""
    inside = [matrix for item in report.candidates for matrix in item.matrices if matrix.layer is not None]
    return list({precision_words(matrix.precision): precision_class(matrix.precision) for matrix in inside}.items())


def _row(matrix: Matrix) -> tuple[str, str, str, str, str]:
    shape = " × ".join(f"{size:,}" for size in matrix.shape)
    return matrix.name, matrix.precision, zeros_text(matrix), shape, size_text(matrix.size_bytes)


def zeros_text(matrix: Matrix) -> str:
    """`2:4`, or the share of zeros."""
    return "2:4" if _has_pattern(matrix) else f"{matrix.zeros:.0%}" if matrix.zeros >= 0.005 else "none"


def _has_pattern(matrix: Matrix) -> bool:
    return matrix.pattern and matrix.zeros > 0


def _panel(candidate: Candidate) -> Panel:
    inside = [matrix for matrix in candidate.matrices if matrix.layer is not None]
    layers = len({matrix.layer for matrix in inside})
    size, whole = (sum(matrix.size_bytes for matrix in group) for group in (inside, candidate.matrices))
    sparse = sum(_has_pattern(matrix) for matrix in inside)
    note = f"{layers} layer{'' if layers == 1 else 's'}, {size_text(size)} of {size_text(whole)} of weights"
    note += f", {sparse} of {len(inside)} matrices 2:4" if sparse else ""
    return Panel(candidate.name, note, layer_grid(inside, candidate.name))


def layer_grid(matrices: Sequence[Matrix], name: str) -> Markup:
    """A row a layer, a column a kind of matrix: the colour of a bar is its precision, its dashed end its zeros."""
    by_place = {(matrix.layer, matrix.kind): matrix for matrix in reversed(matrices)}
    layers = sorted({matrix.layer for matrix in matrices if matrix.layer is not None})
    kinds = {matrix.kind or "" for matrix in matrices}
    columns = [kind for kind in KINDS if kind in kinds] + sorted(kinds - set(KINDS))
    wide = (_WIDTH - _LEFT - _RIGHT) / len(columns)
    tall = _ROW_WITH_WORDS if any(_is_sparse(matrix) for matrix in matrices) else _ROW
    parts = [text(0, 11, "layer", "tick"), text(_WIDTH, 11, "size", "tick", "end")]
    parts += [text(_LEFT + 8 + column * wide, 11, _fitting(kind, wide), "tick") for column, kind in enumerate(columns)]
    for row, layer in enumerate(layers):
        top = _TOP + row * tall
        size = sum(matrix.size_bytes for matrix in matrices if matrix.layer == layer)
        parts.append(text(_LEFT - 6, top + _BAR, str(layer), "tick", "end"))
        parts.append(text(_WIDTH, top + _BAR, size_text(size), "tick", "end"))
        for column, kind in enumerate(columns):
            if matrix := by_place.get((layer, kind)):
                parts.append(_bar(_LEFT + 8 + column * wide, top + 2, wide - _GAP, matrix))
    height = _TOP + len(layers) * tall + 2
    return drawing(_WIDTH, height, f"Layers of {name}: precision and zeros of every matrix", *parts)


def _bar(x: float, y: float, length: float, matrix: Matrix) -> Markup:
    told = f"{matrix.name}: {matrix.precision}, zeros {zeros_text(matrix)}, {size_text(matrix.size_bytes)}"
    kept = length * (1 - min(max(matrix.zeros, 0.0), 1.0)) if _is_sparse(matrix) else length
    parts = [element("title", told)]
    if kept < length:
        parts.append(element("rect", x=x, y=y, width=length, height=_BAR, class_="cut"))
    parts.append(element("rect", x=x, y=y, width=kept, height=_BAR, class_=precision_class(matrix.precision)))
    if kept < length:
        parts.append(text(x, y + _BAR + 11, zeros_text(matrix), "tick"))
    return element("g", *parts)


def _is_sparse(matrix: Matrix) -> bool:
    return _has_pattern(matrix) or matrix.zeros >= _MANY_ZEROS


def _fitting(words: str, width: float) -> str:
    letters = max(int(width / 6.5), 2)
    return words if len(words) <= letters else words[: letters - 1] + "…"
