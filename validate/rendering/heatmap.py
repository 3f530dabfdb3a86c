"""The picture of what each layer of a student has learnt: its similarity to every layer of the teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from .svg import drawing, element, text

_WIDTH = 380.0
_LEFT, _TOP, _BOTTOM, _RIGHT = 40.0, 4.0, 36.0, 2.0
_LARGEST, _LOWEST = 56.0, 22.0
_WITH_VALUE = 19.0  # a cell narrower than this has no room for its two decimals
_BEST = 64.0  # room beside such cells for each row's largest value
_UPRIGHT = 76.0  # room that the title beside the rows takes
_LABELS = 16  # numbers under so many columns at most


def closest(matrix: Sequence[Sequence[float]]) -> list[tuple[int, float]]:
    """For each student layer (row) the teacher layer (column) that it is most like, and how much, 0 to 1."""
    places = [max(range(len(row)), key=lambda column, row=row: _known(row[column])) for row in matrix]  # type: ignore[misc]
    return [(place, row[place]) for place, row in zip(places, matrix, strict=True)]


def layer_similarity(matrix: Sequence[Sequence[float]], when: str) -> Markup:
    """A cell for every student layer (row) and teacher layer (column), both counted from 0: the fuller its colour, the
    more alike, on one scale from 0 to 1 with the value written in; a frame marks the most alike of each row.

    The colour is kept light enough (dark enough on a dark page) for the writing on it.
    """
    rows, columns = len(matrix), len(matrix[0])
    wide = (_WIDTH - _LEFT - _RIGHT) / columns
    written = wide >= _WITH_VALUE
    width = min(wide, _LARGEST) if written else (_WIDTH - _LEFT - _RIGHT - _BEST) / columns
    height = min(max(width, _LOWEST), 34.0)
    best = closest(matrix)
    parts = []
    for row, values in enumerate(matrix):
        y = _TOP + row * height
        parts.append(text(_LEFT - 6, y + height / 2 + 4, str(row), "tick", "end"))
        for column, value in enumerate(values):
            x = _LEFT + column * width
            parts.append(_cell(x, y, width, height, value))
            if written:
                class_ = "value best" if column == best[row][0] else "value"
                parts.append(text(x + width / 2, y + height / 2 + 4, _short(value), class_, "middle"))
        if not written:
            told = f"{best[row][0]}: {_short(best[row][1])}"
            parts.append(text(_LEFT + columns * width + 6, y + height / 2 + 4, told, "value"))
    for row, (column, _) in enumerate(best):  # after every cell, so that no neighbour lies on a frame
        frame = {"x": _LEFT + column * width, "y": _TOP + row * height, "width": width, "height": height}
        parts.append(element("rect", class_="most-alike", **frame))
    bottom = _TOP + rows * height
    every = math.ceil(columns / _LABELS)
    parts += [
        text(_LEFT + (column + 0.5) * width, bottom + 15, str(column), "tick", "middle")
        for column in range(0, columns, every)
    ]
    parts.append(text(_LEFT + columns * width / 2, bottom + 31, "teacher layer", "axis-title", "middle"))
    turned = f"translate(11 {(_TOP + bottom) / 2:.1f}) rotate(-90)"
    upright = "student layer" if bottom - _TOP >= _UPRIGHT else "student"
    parts.append(element("text", upright, class_="axis-title", text_anchor="middle", transform=turned))
    every_value = "; ".join(f"student layer {row}: {_listed(values)}" for row, values in enumerate(matrix))
    parts.append(element("desc", f"Similarity to teacher layers 0 to {columns - 1}. {every_value}"))
    said = ", ".join(f"{row} to {column} ({_short(value)})" for row, (column, value) in enumerate(best))
    title = f"Similarity of layers {when}; each student layer with the teacher layer that it is most like: {said}"
    return drawing(_WIDTH, bottom + _BOTTOM, title, *parts)


def _cell(x: float, y: float, width: float, height: float, value: float) -> Markup:
    """From 4 % to 80 % of the full colour: at 80 % text on it still has the contrast that WCAG asks (4.5)."""
    strength = 0.04 + 0.76 * min(max(_known(value), 0.0), 1.0)
    return element("rect", x=x, y=y, width=width, height=height, class_="heat", fill_opacity=strength)


def _known(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _short(value: float) -> str:
    """Two decimals without the 0 before them: a phone has no room for it."""
    return f"{value:.2f}".removeprefix("0") if math.isfinite(value) else "–"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" if math.isfinite(value) else "unknown" for value in values)
