"""The N:M pattern on arrays: whether it is there, where it first breaks, and which sizes sparse kernels take."""

from __future__ import annotations

import re

import numpy as np

from ..errors import UsageError

KERNEL_MULTIPLE = 32
"""Both sizes of a sparse matrix must be multiples of this. cuSPARSELt takes multiples of 16 in float16 and bfloat16 and
of 32 in int8 and fp8, as PyTorch's table for it says (`torch/sparse/semi_structured.py`,
`SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS`); the stricter one, since the precision may change."""

_LARGEST_GROUP = 32


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`"2:4"` -> (2, 4): at most 2 of every 4 are not zero.

    Raises:
        UsageError: not of the form N:M with 1 <= N < M <= 32.
    """
    found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", pattern)
    if found is None or not 1 <= int(found[1]) < int(found[2]) <= _LARGEST_GROUP:
        raise UsageError(
            f"There is no pattern {pattern!r}; a pattern is N:M, N less than M and M at most {_LARGEST_GROUP}.",
            "Use 2:4, which is what sparse kernels take.",
        )
    return int(found[1]), int(found[2])


def is_semi_structured(weight: np.ndarray, axis: int, n: int = 2, m: int = 4) -> bool:
    """Whether every group of m consecutive values along `axis` has at most n that are not zero.

    A size that does not divide into groups counts as no pattern, since no sparse kernel takes it.
    """
    return weight.shape[axis] % m == 0 and first_break(weight, axis, n, m) is None


def first_break(weight: np.ndarray, axis: int, n: int = 2, m: int = 4) -> tuple[int, int] | None:
    """Where the pattern first breaks in a matrix: the group's first position along `axis` and the position along the
    other axis; `None` where it does not break. Values behind the last whole group are not looked at.

    Args:
        weight: [rows, columns] of any number type; NaN counts as not zero.
    """
    rows = np.moveaxis(weight != 0, axis, -1)  # [other, reduction]
    whole = rows.shape[-1] // m * m
    counts = rows[..., :whole].reshape(*rows.shape[:-1], -1, m).sum(axis=-1)  # [other, groups]
    broken = np.argwhere(counts > n)
    if not len(broken):
        return None
    return int(broken[0][-1]) * m, int(broken[0][0])


def zero_share(weight: np.ndarray) -> float:
    """The share of values that are exactly zero, 0 for an empty weight."""
    return float(np.mean(weight == 0)) if weight.size else 0.0


def why_not_sparse(reduction: int, output: int) -> str | None:
    """The reason for which sparse kernels do not take a matrix of these sizes, or `None` where they do."""
    for size, what in ((reduction, "input"), (output, "output")):
        if size % KERNEL_MULTIPLE:
            return f"its {what} size {size} is not a multiple of {KERNEL_MULTIPLE}, which sparse kernels need"
    return None
