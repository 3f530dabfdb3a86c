"""The colour that stands for a precision, the same in every picture of layers."""

from __future__ import annotations

_COLOURS = {"float32": "s0", "float16": "s1", "bfloat16": "s6", "int8 weights and activations": "s3",
            "int8 weights only": "s2", "int4 weights only": "s5"}  # fmt: skip
_OTHER = "s4"


def precision_words(precision: str) -> str:
    """The precision by which a matrix is coloured: a table of integers is stored, not computed with."""
    return f"{precision} weights only" if precision in ("int8", "int4") else precision


def precision_class(precision: str) -> str:
    """The class of its colour in the style sheet."""
    words = precision_words(precision)
    return next((class_ for start, class_ in _COLOURS.items() if words.startswith(start)), _OTHER)
