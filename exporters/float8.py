"""float8 (E4M3) for TensorRT: an int8 graph of ONNX Runtime's quantiser with its Q/DQ nodes turned into float8 ones.

ONNX Runtime has a float8 quantiser of its own, but its scale is a multiple of the standard deviation and cuts off
everything beyond 4.5 of them; transformers have weights and activations far outside. So ranges are measured as for
int8, by the largest magnitude, and that magnitude becomes E4M3's largest number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

LARGEST = 448.0
"""The largest E4M3 number (there is no infinity)."""
_LARGEST_INT8 = 127.0
_ROUNDING = 2.0**-4
"""Relative: three bits after the leading one."""
_SUBNORMAL_ROUNDING = 2.0**-10
"""Half the distance of the numbers below 2^-6."""


def int8_to_float8(model: onnx_ir.Model, weights: Mapping[str, np.ndarray]) -> None:
    """Turn every QuantizeLinear and DequantizeLinear of a symmetric int8 graph into a float8 one, in place.

    Args:
        weights: the float arrays that the quantised weights were made of, by their names before (the quantiser adds
            `_quantized`); they are rounded once, not through int8.
    """
    rescaled: set[str] = set()
    nodes: list[Any] = list(model.graph.all_nodes())
    for node in nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero_point = node.inputs[1], node.inputs[2]
        if scale.name not in rescaled:
            rescaled.add(scale.name)
            _hold(scale, _float8_scale(scale.const_value.numpy()))
        if zero_point.dtype != _type():
            _hold(zero_point, np.zeros(zero_point.const_value.numpy().shape), float8=True)
        value = node.inputs[0]
        if node.op_type == "DequantizeLinear" and value.const_value is not None:
            stored = weights[value.name.removesuffix("_quantized")].astype(np.float32)
            ratio = stored / scale.const_value.numpy().astype(np.float32)
            _hold(value, np.clip(ratio, -LARGEST, LARGEST), float8=True)
        elif node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = _type()


def float8_step(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The largest rounding of each weight that E4M3 storage explains, of the values' shape.

    Args:
        values: the weights, already multiplied with their scale.
    """
    step: np.ndarray = np.maximum(np.abs(values) * _ROUNDING, np.abs(scale) * _SUBNORMAL_ROUNDING)
    return step


def _float8_scale(int8_scale: np.ndarray) -> np.ndarray:
    wide = int8_scale.astype(np.float32) * (_LARGEST_INT8 / LARGEST)
    smallest = np.finfo(int8_scale.dtype).smallest_subnormal  # a scale of 0 would make NaN of a weight that is 0
    scale: np.ndarray = np.maximum(wide.astype(int8_scale.dtype), smallest)
    return scale


def _hold(value: Any, array: np.ndarray, *, float8: bool = False) -> None:
    """Put an array in an initializer's place, under its name."""
    import ml_dtypes
    import onnx_ir

    stored = array.astype(ml_dtypes.float8_e4m3fn) if float8 else array
    # Not `ascontiguousarray`: it makes a scale of one number an axis of size 1, which ONNX reads as a scale a channel.
    value.const_value = onnx_ir.Tensor(np.asarray(stored, order="C"), name=value.name)
    value.dtype = value.const_value.dtype
    value.shape = value.const_value.shape


def _type() -> Any:
    import onnx_ir

    return onnx_ir.DataType.FLOAT8E4M3FN
