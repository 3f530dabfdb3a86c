"""What an OpenVINO IR tells of its layers, and the FLOPs of its matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .layer_facts import ProgramFacts
from .sparsity import WeightUse

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")
_TYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16",
          "i8": "int8", "u8": "uint8", "i4": "int4", "u4": "uint4"}  # fmt: skip
_CHOSEN = "what the runtime chooses"


def openvino_facts(
    graph: Path, properties: Mapping[str, str], batch: int, sequence: int, no_kernels: str
) -> ProgramFacts:
    """The facts of a written IR, which may be anybody's.

    Args:
        graph: the `.xml` file.
        properties: the manifest's compile properties, which say what is computed in.
        batch: with `sequence`, the shape whose FLOPs are counted.
        no_kernels: as for `LayerFacts.of_product`.

    Raises:
        InputError: an IR that does not parse, or does not take that shape.
    """
    import openvino
    from openvino._offline_transformations import stateful_to_stateless_transformation

    hint = properties.get("INFERENCE_PRECISION_HINT", "")
    computed = _TYPES.get(hint, hint or _CHOSEN)
    try:
        model = openvino.Core().read_model(str(graph))
        products, tables = list(_products(model, computed)), list(_tables(model))
        if model.get_variables():
            stateful_to_stateless_transformation(model)  # the size of a state is not known
        model.reshape({port: _reading(port.get_partial_shape(), batch, sequence) for port in model.inputs})
        return ProgramFacts.of(products, tables, _flops_of(model), no_kernels)
    except RuntimeError as error:
        line = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        raise InputError(f"{graph} cannot be read as an OpenVINO IR: {line}") from error


def _reading(shape: Any, batch: int, sequence: int) -> list[int]:
    """Ids and masks are [batch, sequence], a cache that is still empty [batch, heads, 0, size], rows [batch]."""
    sizes = [batch, sequence] if len(shape) == 2 else [batch]
    return sizes if len(shape) < 4 else [batch, shape[1].get_length(), 0, shape[3].get_length()]


@dataclass(frozen=True)
class _Weight:
    """A stored weight as its operation reads it, moved so that what stands for zero is 0."""

    values: np.ndarray
    stored: str
    size_bytes: int
    behind: str = ""


def _products(model: Any, computed: str) -> Iterator[WeightUse]:
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "MatMul":
            continue
        for position in (1, 0):
            weight = _weight_of(operation.input_value(position).get_node())
            if weight is None or weight.values.ndim != 2:
                continue
            turned = operation.get_attributes()["transpose_b" if position else "transpose_a"]
            quantised = _quantised(operation.input_value(1 - position).get_node())
            yield WeightUse(
                layer=operation.get_friendly_name(),
                weight=weight.values,
                axis=int(turned) if position else 1 - int(turned),
                behind=weight.behind,
                stored=weight.stored,
                computed=quantised or computed,
                size_bytes=weight.size_bytes,
            )
            break


def _tables(model: Any) -> Iterator[WeightUse]:
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "Gather" or not operation.get_output_element_type(0).is_real():
            continue
        weight = _weight_of(operation.input_value(0).get_node())
        if weight is not None and weight.values.ndim == 2:
            name = operation.get_friendly_name()
            yield WeightUse(name, weight.values, 0, "", weight.stored, "", weight.size_bytes)


def _weight_of(node: Any) -> _Weight | None:
    """The constant behind an operand, through what unpacks it: `Constant -> Convert -> Subtract -> Multiply`, with a
    Reshape where scales are shared by groups."""
    kind = node.get_type_name()
    if kind == "Constant":
        stored = node.get_element_type().get_type_name()
        packed = stored in ("i4", "u4")
        # `data` shows two of them in a byte, and `get_data` unpacks to some types only
        values = node.get_data(dtype=np.int32).astype(np.int8) if packed else np.asarray(node.data)
        return _Weight(values, _TYPES.get(stored, stored), int(node.get_byte_size()))
    if kind not in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
        return None
    weight = _weight_of(node.input_value(0).get_node())
    if weight is None or kind in ("Convert", "Multiply"):
        return weight
    if kind == "Transpose":
        return replace(weight, values=weight.values.T, behind=kind) if weight.values.ndim == 2 else None
    if kind == "Reshape":
        shape = node.get_output_partial_shape(0)
        return replace(weight, values=weight.values.reshape(tuple(shape.to_shape()))) if shape.is_static else None
    point = _weight_of(node.input_value(1).get_node())
    if point is None:
        return None
    return replace(weight, values=weight.values.astype(np.int16) - point.values.astype(np.int16))


def _quantised(node: Any) -> str:
    """The integer type to which an activation is quantised; empty where it is not."""
    while node.get_type_name() in _LAYOUT:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "FakeQuantize":
        return ""
    return "int8" if int(node.get_attributes()["levels"]) > 16 else "int4"


def _flops_of(model: Any) -> int | None:
    total = 0
    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        if kind not in ("MatMul", "ScaledDotProductAttention"):
            continue
        ports = [operation.get_input_partial_shape(index) for index in range(operation.get_input_size())]
        output = operation.get_output_partial_shape(0)
        if not all(shape.is_static for shape in (output, *ports[:3])):
            return None
        if kind == "MatMul":
            left = list(ports[0].to_shape())
            turned = operation.get_attributes()["transpose_a"] and len(left) > 1
            total += 2 * math.prod(output.to_shape()) * left[-2 if turned else -1]
        else:
            query, key, value = (list(shape.to_shape()) for shape in ports[:3])
            total += 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return total
