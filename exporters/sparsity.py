"""Evidence of 2:4 sparsity, taken from the graph that the compiler will read and not from the checkpoint.

TensorRT looks for the pattern in constants of a MatMul or Gemm, along the axis that is summed over. Exporters transpose
weights, and a weight behind a Transpose, Cast or Reshape is not seen, so what was pruned may not be what arrives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..models.sparsity import first_break, is_semi_structured, why_not_sparse, zero_share
from .artifact import SparseLayer
from .node_scopes import module_of
from .parameter_names import TRANSPOSED

if TYPE_CHECKING:
    import onnx_ir

_LISTED = 5
_OUTSIDE = "it is outside the layers: embeddings, poolers and heads stay dense"


@dataclass(frozen=True)
class WeightUse:
    """A constant that one MatMul or Gemm multiplies with."""

    layer: str
    """The module's qualified name, or the node's where the graph does not say."""
    weight: np.ndarray
    axis: int
    """The axis of `weight` that is summed over."""
    behind: str = ""
    """The operator between the constant and the node, which hides it from the compiler; empty where there is none."""


def sparsity_evidence(graph: Path, prunable: Collection[str] | None = None) -> list[SparseLayer]:
    """One row for each product with a constant in a written ONNX graph, in the graph's order.

    Args:
        prunable: names of the modules that pruning looks at; anything else is listed as not eligible. `None`: all.
    """
    import onnx_ir

    return [_row(use, prunable) for use in weight_uses(onnx_ir.load(str(graph)))]


def require_pattern(layers: list[SparseLayer], source: str) -> None:
    """Refuse a 2:4 export of a checkpoint that is not 2:4.

    Raises:
        UsageError: an eligible layer without the pattern (the first few are named), or no eligible layer at all.
    """
    eligible = [layer for layer in layers if layer.eligible]
    dense = [layer for layer in eligible if not layer.pattern]
    hint = f"Prune it first: limbeck prune {source} --pattern 2:4 --out PRUNED, then export PRUNED."
    if not eligible:
        reason = layers[0].reason if layers else "it has no product with a constant"
        raise UsageError(f"{source} has no layer that could be 2:4 sparse: {reason}.", "Export without --sparsity.")
    if dense:
        named = "; ".join(f"{layer.layer} ({layer.reason})" for layer in dense[:_LISTED])
        more = f" and {len(dense) - _LISTED} more" if len(dense) > _LISTED else ""
        raise UsageError(f"{len(dense)} of {len(eligible)} eligible layers are not 2:4: {named}{more}.", hint)


def _row(use: WeightUse, prunable: Collection[str] | None) -> SparseLayer:
    reduction, output = use.weight.shape[use.axis], use.weight.shape[1 - use.axis]
    hidden = f"its weight reaches the product through {use.behind}, which the compiler does not look behind"
    outside = _OUTSIDE if prunable is not None and use.layer not in prunable else None
    reason = why_not_sparse(reduction, output) or (hidden if use.behind else None) or outside
    pattern = is_semi_structured(use.weight, use.axis)
    return SparseLayer(
        layer=use.layer,
        shape=[reduction, output],
        eligible=reason is None,
        pattern=pattern,
        zeros=zero_share(use.weight),
        reason=reason or ("" if pattern else _where_it_breaks(use)),
    )


def _where_it_breaks(use: WeightUse) -> str:
    broken = first_break(use.weight, use.axis)
    if broken is None:
        return f"its input size {use.weight.shape[use.axis]} does not divide into groups of 4"
    position, output = broken
    return f"more than 2 of 4 are not zero at inputs {position} to {position + 3} of output {output}"


def weight_uses(model: onnx_ir.Model) -> Iterator[WeightUse]:
    """Every MatMul and Gemm of a graph that multiplies with a constant matrix; int8 constants behind their
    DequantizeLinear count as constants, since that is how quantised weights are written."""
    for node in model.graph.all_nodes():
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
            continue
        for position in (1, 0):
            value, behind = _source_of(node.inputs[position])
            if value is None or len(value.const_value.shape) != 2:
                continue
            yield WeightUse(_layer_of(node, value.name), _stored(value), _axis(node, position, behind), behind)
            break


def _axis(node: Any, position: int, behind: str) -> int:
    """The summed axis of the stored constant: the last but one of a second operand, the last of a first."""
    axis = 0 if position == 1 else 1
    if node.op_type == "Gemm":
        attribute = node.attributes.get("transB" if position == 1 else "transA")
        axis = 1 - axis if attribute is not None and attribute.value else axis
    return 1 - axis if behind == "Transpose" else axis


def _source_of(value: Any) -> tuple[Any, str]:
    """The constant that feeds a product, and the name of what stands between them."""
    behind = ""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "Cast", "Reshape", "Identity", "DequantizeLinear"):
            return None, ""
        if node.op_type not in ("Identity", "DequantizeLinear"):
            behind = behind or node.op_type
        value = node.inputs[0]
    return value, behind


def _stored(value: Any) -> np.ndarray:
    array: np.ndarray = value.const_value.numpy()
    return array


def _layer_of(node: Any, weight: str | None) -> str:
    """The module's name: from the weight's where that is a parameter's (quantisers drop the scopes), else from the
    scopes that the trace left on the node."""
    name = (weight or "").removesuffix("_quantized").removesuffix(TRANSPOSED)
    if name.endswith(".weight"):
        return name.removesuffix(".weight")
    return module_of(node) or str(node.name or weight)
