"""Weight-only precisions for ONNX: matrices in 8 or 4 bits by ONNX Runtime's `MatMulNBits`, embeddings in 8.

What is multiplied stays float32, so nothing is calibrated; what is gained is size, and time where reading the weights
is what takes it (one token at a time). Tables of embeddings have 8 bits in both precisions, a scale a row, as NNCF has
them: in small encoders they are half of the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .parameter_names import TRANSPOSED
from .program import ProgramWeight, rounding_of

if TYPE_CHECKING:
    import onnx_ir

_SMALLEST_TABLE = 2**14
"""Weights from which on a table of embeddings is worth its scales."""
_QUANTISED, _SCALE = "_quantized", "_scale"
_DOMAIN = "com.microsoft"


def quantize_weights(model: onnx_ir.Model, bits: int, group_size: int) -> onnx_ir.Model:
    """The graph with every stored matrix of a MatMul, and every table of embeddings, as integers and scales.

    Rounded to nearest, symmetric: a scale for `group_size` weights along the summed axis, for a row of a table.

    Args:
        model: with its weights folded into their products (`constant_weights.fold_weights`), else some stay float.
        bits: of the matrices, 8 or 4.
    """
    _write_out_gemms(model)
    _quantize_embeddings(model)
    return _quantize_matrices(model, bits, group_size)


def _write_out_gemms(model: onnx_ir.Model) -> None:
    """Gemm(x, W, b) -> MatMul(x, W) + b, since the quantiser looks for MatMul alone."""
    import onnx_ir

    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "Gemm" else None
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        if (
            weight is None
            or weight.const_value is None
            or any(name in node.attributes and node.attributes[name].value != usual for name, usual in plain.items())
        ):
            continue
        if node.attributes.get_int("transB", 0):
            name = str(weight.name)
            turned = name.removesuffix(TRANSPOSED) if name.endswith(TRANSPOSED) else name + TRANSPOSED
            values = np.ascontiguousarray(weight.const_value.numpy().T)
            weight = _stored(model, turned, values)
        last = product = onnx_ir.node("MatMul", [node.inputs[0], weight])
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            last = onnx_ir.node("Add", [product.outputs[0], node.inputs[2]])
        _replace(model, node, dict.fromkeys((product, last)))


def _replace(model: onnx_ir.Model, node: Any, others: Iterable[Any]) -> None:
    """Put nodes in a node's place; the last of them has its output."""
    import onnx_ir

    new, output = list(others), node.outputs[0]
    new[-1].outputs[0].shape, new[-1].outputs[0].type = output.shape, output.type
    model.graph.insert_before(node, new)
    onnx_ir.convenience.replace_all_uses_with(output, new[-1].outputs[0], replace_graph_outputs=True)
    new[-1].outputs[0].name = output.name
    model.graph.remove(node, safe=True)
    for value in node.inputs:
        if value is not None and value.name in model.graph.initializers and not value.uses():
            del model.graph.initializers[value.name]


def _quantize_matrices(model: onnx_ir.Model, bits: int, group_size: int) -> onnx_ir.Model:
    import onnx
    import onnx_ir
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with tempfile.TemporaryDirectory() as folder:
        # From and to files with external data, so that protobuf's limit of 2 GB is none for the model.
        before, after = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
        onnx_ir.save(model, str(before), external_data="float.onnx.data")
        quantizer = MatMulNBitsQuantizer(onnx.load(str(before)), bits=bits, block_size=group_size, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(after), use_external_data_format=True)
        quantised = onnx_ir.load(str(after))
        onnx_ir.external_data.load_to_model(quantised)
    return quantised


def _quantize_embeddings(model: onnx_ir.Model) -> None:
    """Gather(float table) -> Gather(int8 table) x Gather(scales): what is looked up is made float, not the table."""
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or not table.const_value.dtype.is_floating_point():
            continue
        values = table.const_value.numpy()
        if values.ndim != 2 or values.size < _SMALLEST_TABLE or node.attributes.get_int("axis", 0) != 0:
            continue
        _look_up_integers(model, node, str(table.name), np.asarray(values, dtype=np.float32))


def _look_up_integers(model: onnx_ir.Model, node: Any, name: str, values: np.ndarray) -> None:
    import onnx_ir

    largest = np.abs(values).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    integers = np.round(values / scales).astype(np.int8)
    stored = [_stored(model, name + suffix, array) for suffix, array in ((_QUANTISED, integers), (_SCALE, scales))]
    rows, factors = (onnx_ir.node("Gather", [value, node.inputs[1]], {"axis": 0}) for value in stored)
    real = onnx_ir.node("Cast", rows.outputs, {"to": onnx_ir.DataType.FLOAT})
    product = onnx_ir.node("Mul", [real.outputs[0], factors.outputs[0]])
    _replace(model, node, [rows, factors, real, product])


def _stored(model: onnx_ir.Model, name: str, array: np.ndarray) -> Any:
    """The initializer of that name; a table that is looked up twice is stored once."""
    import onnx_ir

    if name not in model.graph.initializers:
        tensor = onnx_ir.tensor(array, name=name)
        value = onnx_ir.Value(name=name, const_value=tensor, shape=onnx_ir.Shape(array.shape))
        value.dtype = tensor.dtype
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def weights_of_embeddings(value: Any, graph: Any) -> Iterator[ProgramWeight]:
    """The table that an initializer `..._quantized` holds with its scales, if it is one of ours."""
    scales = scales_of_table(value.name, graph)
    if scales is not None:
        scale = scales.const_value.numpy()
        real = value.const_value.numpy().astype(np.float32) * scale
        yield ProgramWeight(value.name.removesuffix(_QUANTISED), real, np.broadcast_to(scale / 2, real.shape))


def scales_of_table(name: str, graph: Any) -> Any | None:
    """The initializer with the scales of the table that is stored in integers under this name, if it is one of ours."""
    return graph.initializers.get(name.removesuffix(_QUANTISED) + _SCALE) if name.endswith(_QUANTISED) else None


def weights_of_matrices(graph: Any) -> Iterator[ProgramWeight]:
    """Every matrix of a `MatMulNBits`, dequantised."""
    for node in graph:
        packed = PackedMatrix.of_node(node)
        if packed is not None:
            yield from _dequantised(packed, *(value.const_value.numpy() for value in node.inputs[1:3]))


def _dequantised(matrix: PackedMatrix, packed: np.ndarray, scales: np.ndarray) -> Iterator[ProgramWeight]:
    integers = matrix.unpack(packed)
    scale = np.repeat(scales.reshape(matrix.outputs, -1), matrix.group_size, axis=1)[:, : matrix.columns]
    top = 2 ** (matrix.bits - 1) - 1
    step = rounding_of(integers, top) * np.abs(scale)
    yield from ProgramWeight.of_constant(matrix.name, (integers.astype(np.float32) * scale).T, step.T)


@dataclass(frozen=True)
class PackedMatrix:
    """How a `MatMulNBits` stores its matrix."""

    name: str
    """Of the constant that was quantised."""
    columns: int
    """The summed axis."""
    outputs: int
    bits: int
    group_size: int

    @classmethod
    def of_node(cls, node: Any) -> PackedMatrix | None:
        """What the node multiplies with; `None` for any other operator, and for a matrix with zero points of its own,
        which no graph of ours has."""
        packed = node.inputs[1] if node.op_type == "MatMulNBits" and node.domain == _DOMAIN else None
        if packed is None or packed.const_value is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
            return None
        columns, outputs, group_size = (node.attributes[name].value for name in ("K", "N", "block_size"))
        bits = node.attributes.get_int("bits", 4)
        return cls(str(packed.name).removesuffix(f"_Q{bits}"), columns, outputs, bits, group_size)

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """The integers [outputs, columns] as int16, zero being 0.

        Operator documentation: they lie as [outputs, groups, bytes of a group], the lower half of a byte first; without
        a zero point they are unsigned around the middle of their range.
        """
        integers = packed.reshape(self.outputs, -1)
        if self.bits == 4:
            integers = np.stack([integers & 0xF, integers >> 4], axis=-1).reshape(self.outputs, -1)
        moved: np.ndarray = integers[:, : self.columns].astype(np.int16) - 2 ** (self.bits - 1)
        return moved
