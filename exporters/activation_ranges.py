"""The ranges that an int8 program's activations were given when it was calibrated, read back from its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .parameter_names import TRANSPOSED

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class ActivationRange:
    """What the input of one product can hold once it is quantised."""

    module: str
    """The product's module, by its name in the traced module."""
    low: float
    high: float
    smoothing: np.ndarray | None = None
    """What each channel is multiplied by before it is quantised, [channels]."""


def onnx_ranges(path: Path) -> Iterator[ActivationRange]:
    """Those of an ONNX graph: `QuantizeLinear` and `DequantizeLinear` before a MatMul or Gemm with a stored weight."""
    import onnx_ir

    for node in onnx_ir.load(str(path)).graph.all_nodes():
        if node.op_type in ("MatMul", "Gemm"):
            yield from _of_product(*(value.producer() if value is not None else None for value in node.inputs[:2]))


def _of_product(given: Any, weight: Any) -> Iterator[ActivationRange]:
    """The range, if the nodes that make both operands dequantise them, the second a stored one."""
    if any(part is None or part.op_type != "DequantizeLinear" for part in (given, weight)):
        return
    constants = [weight.inputs[0], *given.inputs[1:3]]
    if len(constants) < 3 or any(value is None or value.const_value is None for value in constants):
        return
    scale, zero = (value.const_value.numpy() for value in constants[1:])
    if scale.size == 1 and zero.dtype.kind in "iu":
        ends, step = np.iinfo(zero.dtype), float(scale.reshape(-1)[0])
        name = str(constants[0].name).removesuffix("_quantized").removesuffix(TRANSPOSED).removesuffix(".weight")
        point = int(zero.reshape(-1)[0])
        yield ActivationRange(name, (ends.min - point) * step, (ends.max - point) * step)


def openvino_ranges(path: Path) -> Iterator[ActivationRange]:
    """Those of an OpenVINO IR: `FakeQuantize` before a MatMul, with SmoothQuant's factors where there are any."""
    import openvino

    from .openvino import smoothing_of

    for operation in openvino.Core().read_model(str(path)).get_ordered_ops():
        if operation.get_type_name() != "MatMul":
            continue
        node = operation.input_value(0).get_node()
        while node.get_type_name() in _LAYOUT:
            node = node.input_value(0).get_node()
        if node.get_type_name() != "FakeQuantize":
            continue
        low, high = (_scalar(node.input_value(place).get_node()) for place in (1, 2))
        if low is not None and high is not None:
            smoothing = smoothing_of(node)
            factors = None if smoothing is None else smoothing.reshape(-1)
            yield ActivationRange(operation.get_friendly_name(), low, high, factors)


def _scalar(node: Any) -> float | None:
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    values = np.asarray(node.data) if node.get_type_name() == "Constant" else np.empty(0)
    return float(values.reshape(-1)[0]) if values.size == 1 else None
