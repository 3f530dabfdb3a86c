"""The layers of a checkpoint or an artifact, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_WIDEST_NAME = 46


def layer_tables(summary: dict[str, Any]) -> Iterator[Table | str]:
    """Every stored matrix with its size, precision and zeros; where none takes part in sparse kernels, why, once."""
    if summary.get("layers_unknown"):
        yield f"Layers: not known. {summary['layers_unknown']}"
    layers = summary.get("linear_layers") or []
    reasons = {layer["reason"] for layer in layers if not layer["eligible"]}
    shared = reasons.pop() if len(reasons) == 1 and not any(layer["eligible"] for layer in layers) else ""
    if layers:
        yield _table(layers, summary.get("tables") or [], shared)
    if shared:
        yield f"2:4 sparsity gains nothing here: {shared}."


def _table(layers: list[dict[str, Any]], tables: list[dict[str, Any]], shared: str) -> Table:
    from rich.table import Column, Table

    from ..validate.records.report import size_text

    width = min(max(len(layer["layer"]) for layer in (*tables, *layers)), _WIDEST_NAME)
    plain = [Column("layer", overflow="fold", min_width=width), Column("in x out", justify="right", no_wrap=True),
             Column("size", justify="right", no_wrap=True)]  # fmt: skip
    table = Table(*plain, "precision", "sparsity", *([] if shared else ["2:4 kernels"]))
    for layer in (*tables, *layers):
        cells = [layer["layer"], " x ".join(map(str, layer["shape"])), size_text(layer["size_bytes"]),
                 layer["precision"], layer["sparsity"]]  # fmt: skip
        kernels = "looked up" if layer in tables else _kernels(layer)
        table.add_row(*cells, *([] if shared else [kernels]))
    return table


def _kernels(layer: dict[str, Any]) -> str:
    """Whether sparse kernels take it; where the pattern breaks is of interest in a layer that was pruned."""
    if not layer["eligible"]:
        return f"no: {layer['reason']}"
    if layer["pattern"]:
        return "yes"
    return f"no: {layer['reason']}" if layer["sparsity"].startswith("unstructured") else "could, when pruned"
