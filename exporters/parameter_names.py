"""Which parameter a constant of an exported graph is: found by content, since exporters rename and transpose."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

TRANSPOSED = ".T"
"""Suffix of a constant that holds a parameter's transpose."""
_PART = re.compile(r"(?P<name>[^+{}]+)\{(?P<width>\d{1,9})\}")
_ROWS = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")


def rows_of(constant: str) -> tuple[str, slice | None]:
    """The parameter that a constant's name stands for, and which rows of it where it holds only some (`name[0:24]`)."""
    match = _ROWS.fullmatch(constant)
    return (match["name"], slice(int(match["start"]), int(match["stop"]))) if match else (constant, None)


def parts_of(constant: str, columns: int) -> list[tuple[str, slice]]:
    """The names of the constants that one holds side by side, and the columns of each: `a{24}+b{8}` holds `a` in
    columns 0 to 23 and `b` in the rest. A name of any other form, or for other than `columns`, is one of its own."""
    matches = [_PART.fullmatch(part) for part in constant.split("+")]
    parts, start = [], 0
    for match in matches:
        if match is None:
            return [(constant, slice(0, columns))]
        stop = start + int(match["width"])
        parts.append((match["name"], slice(start, stop)))
        start = stop
    return parts if start == columns else [(constant, slice(0, columns))]


class ParameterNames:
    """Looks up the parameters of a module by the bytes they hold.

    Several parameters may hold the same bytes (tied weights, biases that are all zero): each look-up then hands out
    the one that belongs to the given scope, or the first that was not yet handed out.
    """

    def __init__(self, module: nn.Module) -> None:
        self._by_content: dict[tuple[int, bytes], list[str]] = defaultdict(list)
        self._given: set[str] = set()
        self._tables: dict[str, np.ndarray] = {}
        self._widths: dict[int, set[int]] = defaultdict(set)
        """Of the matrices with so many rows, as stored or turned."""
        tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not parameter.is_floating_point():
                continue
            values = _array(parameter)
            if id(parameter) in tables:
                self._tables[name] = values
            self._by_content[_key(values)].append(name)
            if values.ndim == 2 and min(values.shape) > 1:
                self._by_content[_key(values.T)].append(name + TRANSPOSED)
                for rows, width in (values.shape, values.T.shape):
                    self._widths[rows].add(width)

    def find(self, values: np.ndarray, scopes: Sequence[str] = ()) -> str | None:
        """The parameter's name (with `TRANSPOSED` where the constant holds its transpose, with `[start:stop]` where it
        holds rows of a table of embeddings, as the positions of a static length do; of several matrices side by side,
        as fusions pack them, all their names: see `parts_of`), or `None`.

        Args:
            values: the constant; axes of size one do not count.
            scopes: qualified names of the modules that use the constant.
        """
        candidates = self._by_content.get(_key(values), [])
        if not candidates:
            return self._find_rows(np.squeeze(values)) or self._find_parts(values)
        in_scope = [name for name in candidates if any(_owner(name) == scope for scope in scopes)]
        fresh = [name for name in (*in_scope, *candidates) if name not in self._given]
        name = fresh[0] if fresh else (in_scope or candidates)[0]
        self._given.add(name)
        return name

    def _find_rows(self, values: np.ndarray) -> str | None:
        if values.ndim != 2:
            return None
        for name, table in self._tables.items():
            if table.shape[1] != values.shape[1] or table.dtype != values.dtype or len(table) < len(values):
                continue
            for start in np.flatnonzero((table == values[0]).all(axis=1)):
                stop = start + len(values)
                if np.array_equal(table[start:stop], values):
                    return f"{name}[{start}:{stop}]"
        return None

    def _find_parts(self, values: np.ndarray) -> str | None:
        if values.ndim != 2:
            return None
        (rows, columns), start, parts = values.shape, 0, []
        widths = sorted(width for width in self._widths[rows] if width < columns)
        while start < columns:
            fitting = [width for width in widths if _key(values[:, start : start + width]) in self._by_content]
            fitting = [width for width in fitting if start + width <= columns]
            if not fitting:
                return None
            parts.append(f"{self.find(values[:, start : start + fitting[0]])}{{{fitting[0]}}}")
            start += fitting[0]
        return "+".join(parts)


def _owner(name: str) -> str:
    return name.removesuffix(TRANSPOSED).rpartition(".")[0]


def _array(parameter: nn.Parameter) -> np.ndarray:
    tensor = parameter.detach().cpu()
    # NumPy has no bfloat16: its bits travel as int16.
    array: np.ndarray = (tensor.view(torch.int16) if tensor.dtype.itemsize == 2 else tensor).numpy()
    return array


def _key(values: np.ndarray) -> tuple[int, bytes]:
    squeezed = np.ascontiguousarray(np.squeeze(values))
    return squeezed.ndim, hashlib.sha256(str(squeezed.shape).encode() + squeezed.tobytes()).digest()
