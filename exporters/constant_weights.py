"""Weights as constants of the node that multiplies with them: what stands between the two is computed beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

_SHARED_LIMIT = 256 * 2**20
"""Bytes: a tied matrix (an embedding that is also the output head) is stored twice when folded, up to this size."""


def fold_weights(model: onnx_ir.Model) -> int:
    """Fold every Transpose, Cast, Reshape or Identity between a stored weight and its MatMul or Gemm, in place.

    The tracer's own optimiser folds most; the head of a model with tied embeddings is left, since its weight has a
    second use. TensorRT looks for 2:4 sparsity in constants of the node only.

    Returns:
        How many operands were folded.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    folded = 0
    for node in list(model.graph.all_nodes()):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        for position in (0, 1):
            operand = node.inputs[position]
            if operand is None or operand.const_value is not None:
                continue
            array = _computed(operand)
            if array is None:
                continue
            name = f"{operand.name}_folded"
            if name not in model.graph.initializers:
                tensor = onnx_ir.tensor(np.ascontiguousarray(array), name=name)
                value = onnx_ir.Value(name=name, const_value=tensor, shape=onnx_ir.Shape(array.shape))
                value.dtype = tensor.dtype
                model.graph.register_initializer(value)
            node.replace_input_with(position, model.graph.initializers[name])
            folded += 1
    RemoveUnusedNodesPass()(model)
    return folded


def _computed(value: Any) -> np.ndarray | None:
    """What a chain of layout operators over a stored weight evaluates to; `None` where it is no such chain."""
    if value is None:
        return None
    if value.const_value is not None:
        tied = len(value.uses()) > 1
        return None if tied and value.const_value.nbytes > _SHARED_LIMIT else value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type not in ("Transpose", "Cast", "Reshape", "Identity"):
        return None
    array = _computed(node.inputs[0])
    if array is None or node.op_type == "Identity":
        return array
    if node.op_type == "Transpose":
        order = node.attributes.get("perm")
        return array.transpose(list(order.value) if order is not None else None)
    if node.op_type == "Cast":
        import onnx_ir

        return array.astype(onnx_ir.DataType(node.attributes["to"].value).numpy())
    shape = node.inputs[1]
    if shape is None or shape.const_value is None:
        return None
    # In ONNX a 0 copies the input's size at that place.
    sizes = [array.shape[i] if size == 0 else int(size) for i, size in enumerate(shape.const_value.numpy())]
    return array.reshape(sizes)
