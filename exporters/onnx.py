"""ONNX: trace a checkpoint's module into a graph with stable names, write it, and read its weights back."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..environment import cpu_facts
from ..errors import InputError
from ..models.checkpoint import Checkpoint
from .artifact import TensorSpec
from .constant_weights import fold_weights
from .float8 import float8_step
from .inputs import dynamic_shapes, sample_inputs
from .kv_cache import CachedTrace, freeze_counters
from .node_scopes import module_of
from .onnx_weight_only import quantize_weights, weights_of_embeddings, weights_of_matrices
from .options import ATTENTION_OPSET, OPSET, OnnxOptions
from .parameter_names import ParameterNames
from .precision import HALF_DTYPES
from .program import ProgramWeight
from .settings import WEIGHT_ONLY, ExportSettings, Precision
from .unsupported import failures_named

if TYPE_CHECKING:
    import onnx_ir
    from transformers.exporters import ExportedModel

GRAPH_FILE = "model.onnx"
_GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"
_HALF_ROUNDING = 2.0**-11
"""Relative rounding of float16; bfloat16 keeps 8 bits (2^-8)."""
_BFLOAT16_ROUNDING = 2.0**-8


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Keep tracing's chatter (version drift, missing torchvision, decomposition ticks) out of the user's terminal;
    errors still come through."""
    names = (
        "transformers",
        "torch.onnx",
        "torch.export",
        "torch.fx.experimental.symbolic_shapes",
        "onnxscript",
        "onnx_ir",
        "onnxruntime",
        "nncf",
        "root",
    )
    loggers = [logging.getLogger(None if name == "root" else name) for name in names]
    levels, handlers = [logger.level for logger in loggers], list(logging.root.handlers)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # torch.onnx prints its ticks
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        logging.root.handlers[:] = handlers  # ONNX Runtime's quantiser configures the root logger when it is imported


def export_graph(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    options: OnnxOptions | None = None,
    trace: CachedTrace | None = None,
) -> ExportedModel:
    """Trace the checkpoint's module into an ONNX graph whose weights carry their parameters' names.

    Batch and sequence vary within `settings.shapes`, and so does what the cache of a `trace` holds; every other axis is
    fixed.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    options = options or OnnxOptions()
    opset = options.opset or _opset(settings, options, trace)
    config = OnnxConfig(
        opset_version=opset,
        dynamic_shapes=trace.varying if trace else dynamic_shapes(checkpoint, settings.shapes),
        ort_fusions="cpu" if options.fusions else None,
    )
    inputs = dict(trace.inputs) if trace else sample_inputs(checkpoint, settings.shapes)
    few_heads = grouped_heads() if trace and opset >= ATTENTION_OPSET else nullcontext()
    with quiet_exporters(), failures_named(checkpoint.module, opset), few_heads:
        exported = OnnxExporter().export(checkpoint.module, inputs, config)
    if trace:
        freeze_counters(exported.program, trace)
    if settings.precision in WEIGHT_ONLY:
        fold_weights(exported.program)  # the head of tied embeddings has a matrix of its own then
    name_weights(exported.program, checkpoint.module)
    return exported


def _opset(settings: ExportSettings, options: OnnxOptions, trace: CachedTrace | None) -> int:
    """Attention as one operator takes half the time of its parts where a long cache of many texts is read. ONNX
    Runtime's quantiser and its own fusions look for the parts, and half precision writes them out (`precision.py`)."""
    in_parts = settings.precision == "int8" or settings.precision in HALF_DTYPES or options.fusions
    whole = trace is not None and not in_parts
    return ATTENTION_OPSET if whole else OPSET


@contextmanager
def grouped_heads() -> Iterator[None]:
    """Let transformers hand key heads that several query heads share to torch's attention as they are, where it would
    repeat them: its own switch, a variable of the environment."""
    before = os.environ.get(_GROUPED)
    os.environ[_GROUPED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_GROUPED]
        else:
            os.environ[_GROUPED] = before


def name_weights(graph_model: onnx_ir.Model, module: nn.Module) -> None:
    """Give every weight of the graph its parameter's name; a constant that holds the transpose, as the second operand
    of a MatMul does, gets the suffix `.T`, and one that holds several side by side has all their names."""
    names = ParameterNames(module)
    graph = graph_model.graph
    taken = set(graph.initializers)
    for value in list(graph.initializers.values()):
        if value.const_value is None or not value.const_value.dtype.is_floating_point():
            continue
        scopes = [module_of(use.node) for use in value.uses()]
        name = names.find(_bits(value.const_value), scopes)
        if name is None or name == value.name or name in taken:
            continue
        taken.add(name)
        value.name = name
        value.const_value.name = name


def _bits(tensor: Any) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array.view(np.int16) if array.dtype.itemsize == 2 else array


def require_calibration(calibration: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Refuse an int8 export without data, before the model is traced.

    Raises:
        InputError: no calibration data.
    """
    if not calibration:
        raise InputError("An int8 export needs real inputs to calibrate on.", "Add --calibration FILE.")


def quantize_weights_only(exported: ExportedModel, precision: Precision, options: OnnxOptions) -> None:
    """A weight-only precision: nothing is calibrated."""
    component = exported.components["model"]
    with quiet_exporters():
        bits = 4 if precision == "int4-weight-only" else 8
        component.program = quantize_weights(component.program, bits, options.group_size)


def quantize_int8(exported: ExportedModel, calibration: Sequence[Mapping[str, Any]]) -> None:
    """Static int8 by ONNX Runtime's quantiser (Q/DQ nodes), calibrated on real batches: unsigned activations and
    signed weights per channel, the pair that VNNI instructions multiply. What a product hands on stays float: its range
    is the widest there is, and rounding it gains nothing."""
    from onnxruntime.quantization import QuantType
    from transformers.exporters import OnnxRuntimeStaticConfig

    from .static_quantization import WeightQuantizer

    products = ["MatMul", "Gemm"]
    config = OnnxRuntimeStaticConfig(
        op_types_to_quantize=products,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # Without VNNI the int16 sums of u8 x s8 products saturate at full range.
        reduce_range=not any("vnni" in flag for flag in cpu_facts()["instruction_sets"]),
        extra_options={"QuantizeBias": False, "OpTypesToExcludeOutputQuantization": products},
    )
    quantizer = WeightQuantizer(config, calibration_dataset=[dict(batch) for batch in calibration])
    component = exported.components["model"]
    with quiet_exporters():
        component.program = quantizer.quantize(component.program, dict(calibration[0]), "onnx")


def read_weights(path: Path) -> Iterator[ProgramWeight]:
    """Every named weight of a written graph, as float32 in its parameter's layout, one at a time."""
    import onnx_ir

    graph = onnx_ir.load(str(path)).graph
    for value in graph.initializers.values():
        if value.const_value is None or value.name is None:
            continue
        yield from _weight_of(value.name, value, graph)
    yield from weights_of_matrices(graph)


def _weight_of(name: str, value: Any, graph: Any) -> Iterator[ProgramWeight]:
    tensor = value.const_value
    if name.endswith("_quantized"):
        dequantize = next((use.node for use in value.uses() if use.node.op_type == "DequantizeLinear"), None)
        if dequantize is not None:
            yield from _dequantized(name.removesuffix("_quantized"), tensor.numpy(), dequantize)
        else:
            yield from weights_of_embeddings(value, graph)
    elif tensor.dtype.is_floating_point() and not name.endswith(("_scale", "_scales", "_zero_point")):
        values = np.asarray(tensor.numpy(), dtype=np.float32)
        rounding = {"FLOAT16": _HALF_ROUNDING, "BFLOAT16": _BFLOAT16_ROUNDING}.get(tensor.dtype.name)
        step: np.ndarray | float = 0.0 if rounding is None else np.abs(values) * rounding + 2.0**-24
        yield from ProgramWeight.of_constant(name, values, step)


def _dequantized(name: str, values: np.ndarray, node: Any) -> Iterator[ProgramWeight]:
    scale = node.inputs[1].const_value.numpy().astype(np.float32)
    zero_point = node.inputs[2].const_value.numpy().astype(np.float32) if len(node.inputs) > 2 else np.float32(0)
    axis = node.attributes["axis"].value if "axis" in node.attributes else 1
    if scale.ndim == 1 and scale.size > 1:
        shape = [1] * values.ndim
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), np.reshape(zero_point, shape)
    real = (values.astype(np.float32) - zero_point) * scale
    step = float8_step(real, scale) if values.dtype.name == "float8_e4m3fn" else np.broadcast_to(scale / 2, real.shape)
    if node.inputs[1].const_value.dtype.name == "FLOAT16":  # what was quantised had been rounded to float16 before
        step = step + np.abs(real) * _HALF_ROUNDING + 2.0**-24
    return ProgramWeight.of_constant(name, real, step)


def tensor_specs(values: Sequence[Any]) -> list[TensorSpec]:
    """Inputs or outputs of an `onnx_ir` graph as the manifest lists them."""
    return [
        TensorSpec(
            name=value.name,
            dtype=value.dtype.name.lower(),
            shape=[size if isinstance(size, int) else None for size in value.shape],
        )
        for value in values
    ]
