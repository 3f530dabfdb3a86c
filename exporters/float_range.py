"""Range analysis: how close each float16 tensor of a graph comes to float16's end.

ONNX Runtime's CPU computes float16 through float32 and so hides an overflow that a GPU would show. Hence the graph's
float32 twin is run: same nodes, same (rounded) weights, every half tensor widened, with the largest magnitude of each
as an extra output. What is measured is therefore exactly what will be half on the device, fusions aside.

float16's lowest number itself is not counted: families that write their attention out put it where a query may not look
(DeBERTa), and no sum comes out at it by chance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ExportMismatch
from ..models.checkpoint import Checkpoint
from .inputs import longest, probe_batch
from .kv_cache import feed_whole_texts
from .node_scopes import module_of
from .settings import ShapeRange

if TYPE_CHECKING:
    import onnx_ir

FLOAT16_MAX = 65_504.0
MARGIN = 2.0
"""A tensor may reach 1/2 of the maximum: real traffic holds inputs that no calibration file does."""
_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Expand", "Slice", "Split", "Concat"})
"""Operators that only move values, so their outputs' ranges are known from their inputs'."""
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
"""Operators that square what they are given: in half precision a compiler may well do it in half."""
_PREFIX = "limbeck_largest_"
_LISTED = 10
RANGE_OF_FLOAT32 = "Use --precision bf16, which has the range of float32."


def float16_evidence(
    checkpoint: Checkpoint,
    shapes: ShapeRange,
    program: onnx_ir.Model,
    calibration: Sequence[Mapping[str, torch.Tensor]],
    hint: str = RANGE_OF_FLOAT32,
) -> dict[str, Any]:
    """Measure and check every half tensor of a graph, on real batches and on long random ones.

    Args:
        program: the graph of `checkpoint`'s module in float16.
        calibration: batches of real inputs, int64 [batch, sequence] by name.
        hint: what to do about a tensor that is too wide.

    Returns:
        What the manifest keeps: how many tensors were measured on what, and the widest.

    Raises:
        ExportMismatch: see `check_ranges`.
    """
    top = longest(checkpoint, shapes)
    random = [probe_batch(checkpoint, 4, top, padded=padded) for padded in (False, True)]
    ranges = measure_ranges(program, [*calibration, *random])
    check_ranges(ranges, hint=hint)
    return {
        "maximum": FLOAT16_MAX,
        "margin": MARGIN,
        "tensors": len(ranges),
        "real batches": len(calibration),
        "random batches": len(random),
        "widest": [{**asdict(entry), "share": entry.share} for entry in ranges[:_LISTED]],
    }


@dataclass(frozen=True)
class TensorRange:
    """The largest magnitude that was seen in one half-precision tensor."""

    tensor: str
    module: str
    """The module whose forward makes the tensor."""
    operator: str
    largest: float

    @property
    def share(self) -> float:
        """Of float16's maximum."""
        return self.largest / FLOAT16_MAX


def measure_ranges(model: onnx_ir.Model, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[TensorRange]:
    """Run the float32 twin of a half-precision graph on every batch.

    Args:
        batches: int64 tensors [batch, sequence] by input name; names that the graph lacks are left out.

    Returns:
        One entry a tensor that is half in `model`, the widest first; empty where nothing is half.
    """
    import onnxruntime

    twin, watched = _twin_with_ranges(model)
    if not watched:
        return []
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = write_graph(twin, Path(folder))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = session.get_inputs()
        largest = dict.fromkeys(watched, 0.0)
        for batch in batches:
            values = session.run([_PREFIX + name for name in watched], feed_whole_texts(inputs, batch))
            for name, value in zip(watched, values, strict=True):
                # A NaN here comes from infinities that met: as far beyond the range as can be.
                seen = float("inf") if value != value else float(value)
                largest[name] = max(largest[name], seen)
    found = [TensorRange(name, *watched[name], largest[name]) for name in watched]
    return sorted(found, key=lambda entry: -entry.largest)


def check_ranges(ranges: Sequence[TensorRange], margin: float = MARGIN, hint: str = RANGE_OF_FLOAT32) -> None:
    """Refuse tensors that come closer to float16's maximum than the margin allows.

    Raises:
        ExportMismatch: names the module of the widest tensor, and how wide it is.
    """
    beyond = [entry for entry in ranges if not entry.largest * margin <= FLOAT16_MAX]
    if beyond:
        worst = beyond[0]
        what = "overflows float16" if worst.largest > FLOAT16_MAX else "comes too close to float16's end"
        raise ExportMismatch(
            f"{worst.module or 'The model'} {what}: {worst.operator} reaches {worst.largest:,.0f}, float16 ends at "
            f"{FLOAT16_MAX:,.0f}, and a margin of {margin:g}x is kept ({len(beyond)} of {len(ranges)} tensors).",
            hint,
        )


def float32_twin(model: onnx_ir.Model) -> onnx_ir.Model:
    """The same graph with every half tensor widened to float32; weights keep the values they were rounded to."""
    import onnx_ir

    half = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
    twin = model.clone()
    for value in twin.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in half:
            value.const_value = onnx_ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
    for node in twin.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == onnx_ir.AttributeType.INT and name in ("to", "dtype") and attribute.value in half:
                node.attributes[name] = onnx_ir.AttrInt64(name, onnx_ir.DataType.FLOAT.value)
            elif attribute.type == onnx_ir.AttributeType.TENSOR and attribute.value.dtype in half:
                wide = onnx_ir.tensor(attribute.value.numpy().astype("float32"), name=attribute.value.name)
                node.attributes[name] = onnx_ir.AttrTensor(name, wide)
    made = [value for node in twin.graph.all_nodes() for value in node.outputs]
    for value in (*made, *twin.graph.inputs, *twin.graph.initializers.values()):
        if value.dtype in half:
            value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)  # a clone shares the type that it had
    return twin


def write_graph(model: onnx_ir.Model, folder: Path) -> Path:
    """Write a graph with its weights beside it (past protobuf's 2 GB too) and return the graph's path."""
    import onnx_ir

    path = folder / "graph.onnx"
    onnx_ir.save(model, str(path), external_data=f"{path.name}.data")
    return path


def _twin_with_ranges(model: onnx_ir.Model) -> tuple[onnx_ir.Model, dict[str, tuple[str, str]]]:
    """The twin with a scalar output for each half tensor, and module and operator of each by tensor name."""
    import onnx_ir

    watched = {
        str(value.name): (module_of(node), str(node.op_type))
        for node in model.graph
        if node.op_type not in _MOVES
        for value in node.outputs
        if value.dtype in (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
    }
    twin = float32_twin(model)
    values = {value.name: value for node in twin.graph for value in node.outputs}
    for norm in [node for node in twin.graph if node.op_type in _NORMS and node.outputs[0].name in watched]:
        name = str(norm.outputs[0].name)
        square = onnx_ir.node("Mul", [norm.inputs[0], norm.inputs[0]])
        twin.graph.append(square)
        values[f"{name}_squares"] = square.outputs[0]
        watched[f"{name}_squares"] = watched[name][0], f"the square inside {watched[name][1]}"
    lowest, zero = (_scalar(twin, name, number) for name, number in (("lowest", -FLOAT16_MAX), ("zero", 0.0)))
    for name in watched:
        masked = onnx_ir.node("Equal", [values[name], lowest])
        counted = onnx_ir.node("Where", [masked.outputs[0], zero, values[name]])
        size = onnx_ir.node("Abs", counted.outputs)
        largest = onnx_ir.node("ReduceMax", size.outputs, {"keepdims": 0})
        output = largest.outputs[0]
        output.name = _PREFIX + name
        output.shape, output.dtype = onnx_ir.Shape([]), onnx_ir.DataType.FLOAT
        twin.graph.extend([masked, counted, size, largest])
        twin.graph.outputs.append(output)
    return twin, watched


def _scalar(model: onnx_ir.Model, name: str, number: float) -> onnx_ir.Value:
    import onnx_ir

    constant = onnx_ir.tensor(number, dtype=onnx_ir.DataType.FLOAT, name=_PREFIX + name)
    value = onnx_ir.val(_PREFIX + name, const_value=constant)
    model.graph.register_initializer(value)
    return value
