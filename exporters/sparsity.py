"""Evidence of 2:4 sparsity, taken from the graph that the compiler will read and not from the checkpoint.

TensorRT looks for the pattern in constants of a MatMul or Gemm, along the axis that is summed over. Exporters transpose
weights, and a weight behind a Transpose, Cast or Reshape is not seen, so what was pruned may not be what arrives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, UsageError
from ..files import path_inside
from ..models.anatomy import anatomy_of
from ..models.checkpoint import Checkpoint
from ..models.sparsity import first_break, is_semi_structured, why_not_sparse, zero_share
from .artifact import SparseLayer
from .node_scopes import module_of
from .onnx_weight_only import PackedMatrix, scales_of_table
from .parameter_names import TRANSPOSED, parts_of, rows_of

if TYPE_CHECKING:
    import onnx_ir

_LISTED = 5
_PASSED = ("Transpose", "Cast", "Reshape", "Identity", "DequantizeLinear", "QuantizeLinear")
_PRODUCTS = {"": ("MatMul", "Gemm"), "ai.onnx": ("MatMul", "Gemm"), "com.microsoft": ("FusedMatMul",)}
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
    stored: str = "float32"
    """The type in which the constant is stored."""
    computed: str = "float32"
    """The type of what it is multiplied with: an integer type where that is quantised."""
    size_bytes: int = 0
    """Of the constant as stored."""


def prunable_modules(checkpoint: Checkpoint) -> set[str] | None:
    """Names, in the exported module, of the matrices that pruning looks at; `None` for an unknown architecture."""
    try:
        inside = {id(part) for _, part in anatomy_of(checkpoint.model).linear_layers(checkpoint.model)}
    except InputError:
        return None
    return {name for name, part in checkpoint.module.named_modules() if id(part) in inside}


def sparsity_evidence(graph: Path, prunable: Collection[str] | None = None) -> list[SparseLayer]:
    """One row for each product with a constant in a written ONNX graph, in the graph's order.

    Args:
        prunable: names of the modules that pruning looks at; anything else is listed as not eligible. `None`: all.
    """
    import onnx_ir

    return [sparse_layer(use, prunable) for use in weight_uses(onnx_ir.load(str(graph)))]


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


def sparse_layer(use: WeightUse, prunable: Collection[str] | None) -> SparseLayer:
    """What a compiler with sparse kernels makes of one weight; `prunable` as for `sparsity_evidence`."""
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
    """Every product of a graph with a constant matrix, of ONNX or of ONNX Runtime; integer constants behind their
    DequantizeLinear count as constants, since that is how quantised weights are written. A constant in which several
    weights lie side by side is as many.

    Raises:
        InputError: a weight that the graph keeps outside its folder.
    """
    for node in model.graph.all_nodes():
        packed = PackedMatrix.of_node(node)
        if packed is not None:
            yield from _parts(node, packed.name, _use_of_packed(node, packed))
        if node.op_type not in _PRODUCTS.get(node.domain, ()):
            continue
        for position in (1, 0):
            source = _source_of(node.inputs[position])
            if source is None or len(source.value.const_value.shape) != 2:
                continue
            use = WeightUse(
                layer="",
                weight=_real_zeros(source),
                axis=_axis(node, position, source.transposed),
                behind=source.behind,
                stored=type_name(source.value.const_value.dtype),
                computed=_computed_in(node, node.inputs[1 - position]),
                size_bytes=int(source.value.const_value.nbytes),
            )
            yield from _parts(node, str(source.value.name).removesuffix("_quantized"), use)
            break


def _use_of_packed(node: Any, matrix: PackedMatrix) -> WeightUse:
    packed, scales = node.inputs[1], node.inputs[2]
    return WeightUse(
        layer="",
        weight=matrix.unpack(_array(packed)).T,
        axis=0,
        stored=f"int{matrix.bits}",
        computed=type_name(scales.const_value.dtype),  # the operator takes and gives the type of its scales
        size_bytes=int(packed.const_value.nbytes),
    )


def _parts(node: Any, name: str, use: WeightUse) -> Iterator[WeightUse]:
    """The use under its layer's name, or those of the layers whose weights lie side by side in the constant `name`."""
    columns = use.weight.shape[1]
    for part, taken in parts_of(name, columns):
        weight = use.weight[:, taken]
        size = use.size_bytes * weight.shape[1] // columns if columns else 0
        yield replace(use, layer=_layer_of(node, part), weight=weight, size_bytes=size)


def table_uses(model: onnx_ir.Model) -> Iterator[WeightUse]:
    """Every constant matrix of real numbers from which a graph gathers rows: embeddings. Integers count with their
    scales, as one table."""
    graph = model.graph
    scales = [scales_of_table(name, graph) for name in graph.initializers]
    for node in model.graph.all_nodes():
        source = _source_of(node.inputs[0]) if node.op_type == "Gather" else None
        if source is None or len(source.value.const_value.shape) != 2:
            continue
        tensor, quantised = source.value.const_value, scales_of_table(str(source.value.name), graph) is not None
        if any(source.value is scale for scale in scales):
            continue
        if quantised or source.dequantised is not None or tensor.dtype.is_floating_point():
            stored, size = type_name(tensor.dtype), int(tensor.nbytes)
            yield WeightUse(_layer_of(node, source.value.name), _real_zeros(source), 0, "", stored, "", size)


def _axis(node: Any, position: int, transposed: bool) -> int:
    """The summed axis of the stored constant: the last but one of a second operand, the last of a first."""
    axis = 0 if position == 1 else 1
    if node.op_type in ("Gemm", "FusedMatMul"):
        attribute = node.attributes.get("transB" if position == 1 else "transA")
        axis = 1 - axis if attribute is not None and attribute.value else axis
    return 1 - axis if transposed else axis


@dataclass(frozen=True)
class _Source:
    """The constant that feeds a node, and what stands between them."""

    value: Any
    behind: str
    transposed: bool
    dequantised: Any
    """The DequantizeLinear behind it, or `None`."""


def _source_of(value: Any) -> _Source | None:
    behind, transposed, dequantised = "", False, None
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in _PASSED:
            return None
        if node.op_type == "DequantizeLinear":
            dequantised = node
        elif node.op_type != "Identity":
            behind = behind or node.op_type
        transposed ^= node.op_type == "Transpose"
        value = node.inputs[0]
    return None if value is None else _Source(value, behind, transposed, dequantised)


def _real_zeros(source: _Source) -> np.ndarray:
    """The stored constant, moved so that what stands for zero is 0: unsigned types have their zero elsewhere."""
    stored, node = _array(source.value), source.dequantised
    point = node.inputs[2] if node is not None and len(node.inputs) > 2 else None
    if point is None or point.const_value is None or source.value.const_value.dtype.is_floating_point():
        return stored
    zero = _array(point).astype(np.int16)
    axis = node.attributes["axis"].value if "axis" in node.attributes else 1
    if zero.ndim == stored.ndim:  # in blocks
        zero = zero.repeat(-(-stored.shape[axis] // zero.shape[axis]), axis)
        zero = zero.take(range(stored.shape[axis]), axis)
    elif zero.size > 1:
        zero = zero.reshape([-1 if index == axis % stored.ndim else 1 for index in range(stored.ndim)])
    moved: np.ndarray = stored.astype(np.int16) - zero
    return moved


def _array(value: Any) -> np.ndarray:
    """A constant's values. A graph names the files that hold them, and it may be anybody's."""
    import onnx_ir

    tensor = value.const_value
    if isinstance(tensor, onnx_ir.ExternalTensor):
        path_inside(Path(tensor.base_dir), str(tensor.location))
    array: np.ndarray = tensor.numpy()
    return array


def _computed_in(node: Any, other: Any) -> str:
    """The type of the operand that is not the weight: what it was quantised to, or the graph's own for the product."""
    producer = other.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        point = producer.inputs[2] if len(producer.inputs) > 2 else None
        known = producer.inputs[0].dtype or (point.dtype if point is not None else None)
        return type_name(known) if known is not None else "uint8"  # what ONNX takes where no zero point says more
    known = other.dtype or node.outputs[0].dtype
    return type_name(known) if known is not None else "unknown"


def type_name(dtype: Any) -> str:
    """An `onnx_ir.DataType` as NumPy calls it: `float32`, `bfloat16`, `int4`."""
    return str(dtype.numpy())


def _layer_of(node: Any, weight: str | None) -> str:
    """The module's name: from the weight's where that is a parameter's (quantisers drop the scopes), else from the
    scopes that the trace left on the node."""
    name = rows_of((weight or "").removesuffix("_quantized").removesuffix(TRANSPOSED))[0]
    if name.endswith(".weight"):
        return name.removesuffix(".weight")
    return module_of(node) or str(node.name or weight)
