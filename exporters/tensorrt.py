"""TensorRT: a strongly typed ONNX graph with its build plan, together called a kit. It is written anywhere; only
building it into an engine needs TensorRT and a GPU.

Since TensorRT 11 every network is strongly typed: there are no precision flags, the graph's own types decide. So a
float16 kit is traced in float16 with float32 islands (`precision.py`), and an int8 kit carries Q/DQ nodes.

Users of plain transformers get the exporter by one import:

    from limbeck.exporters.tensorrt import TensorRTConfig, TensorRTExporter
    TensorRTExporter().export(model, inputs, TensorRTConfig(precision="fp16", dynamic_shapes=...))
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from onnxruntime.quantization import QuantType
from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeQuantizer, OnnxRuntimeStaticConfig
from transformers.exporters.auto import EXPORT_BACKENDS, register_backend
from transformers.exporters.configs import ExportFormat

from ..errors import InputError, UsageError
from ..models.anatomy import anatomy_of
from ..models.checkpoint import Checkpoint
from .constant_weights import fold_weights
from .inputs import dynamic_shapes, sample_inputs
from .onnx import OPSET, name_weights, quiet_exporters
from .precision import HALF_DTYPES, half_precision
from .settings import ExportSettings, Precision

if TYPE_CHECKING:
    import onnx_ir
    from transformers.exporters import ExportedModel

FORMAT = "tensorrt" if "tensorrt" not in EXPORT_BACKENDS else "limbeck-tensorrt"
"""transformers may come to ship a format of that name: ours must not take its place, and goes by another name then."""


@dataclass
class TensorRTConfig(OnnxConfig):
    """Settings of one graph: those of `OnnxConfig`, and the precision.

    Attributes:
        precision: `fp32`, `fp16`, `bf16`, or `int8` with a `quantizer` (see `int8_quantizer`).
    """

    export_format: Any = FORMAT
    precision: Precision = "fp16"
    opset_version: int | None = OPSET

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in ("fp32", *HALF_DTYPES, "int8"):
            raise UsageError(f"TensorRT has no precision {self.precision!r} here; valid are fp32, fp16, bf16 and int8.")
        if self.ort_fusions is not None:
            raise UsageError("ort_fusions make a graph that only ONNX Runtime reads; leave them out for TensorRT.")
        if (self.precision == "int8") != (self.quantizer is not None):
            raise UsageError("precision='int8' and a quantizer go together; limbeck.exporters.tensorrt.int8_quantizer.")


class TensorRTExporter(OnnxExporter):
    """Traces a model into an ONNX graph that TensorRT reads as it is meant: types in the graph, each weight a constant
    of its MatMul or Gemm (2:4 sparsity is looked for there only) and named like its parameter."""

    export_format: Any = FORMAT
    config_class = TensorRTConfig

    def export_program(
        self, model: Any, sample_inputs: MutableMapping[str, Any], config: TensorRTConfig
    ) -> tuple[onnx_ir.Model, Any]:
        """See `OnnxExporter.export_program`; the model is unchanged afterwards, weights bit for bit."""
        dtype = HALF_DTYPES.get(config.precision, torch.float32)
        # transformers' quantisers list the formats they know, "onnx" among them: quantise as that, after the trace.
        plain = copy.copy(config)
        plain.quantizer = None
        with half_precision(model, dtype):
            program, metadata = super().export_program(model, sample_inputs, plain)
            fold_weights(program)
            name_weights(program, model)
        if config.quantizer is not None:
            program = config.quantizer.quantize(program, dict(sample_inputs), ExportFormat.ONNX)
        return program, metadata


if FORMAT not in EXPORT_BACKENDS:
    # Without a runner: transformers would open a saved kit at once on load, and a kit must load without a GPU.
    register_backend(TensorRTExporter)


class WeightQuantizer(OnnxRuntimeQuantizer):
    """ONNX Runtime's static quantiser, kept to products with a stored weight: attention's own two products stay float,
    since their ranges move with the text and nothing of them is stored."""

    def quantize(
        self, model: onnx_ir.Model, sample_inputs: dict[str, Any], export_format: ExportFormat
    ) -> onnx_ir.Model:
        """See `OnnxRuntimeQuantizer.quantize`."""
        chosen = copy.copy(self)
        names = [
            str(node.name)
            for node in model.graph
            if node.op_type in ("MatMul", "Gemm")
            and any(value is not None and value.const_value is not None for value in node.inputs[:2])
        ]
        chosen.config = dataclasses.replace(self.config, nodes_to_quantize=names)
        quantised: onnx_ir.Model = super(WeightQuantizer, chosen).quantize(model, sample_inputs, export_format)
        return quantised


def int8_quantizer(calibration: Sequence[Mapping[str, torch.Tensor]]) -> WeightQuantizer:
    """Static int8 for products with a stored weight: symmetric (zero point 0, which is all that TensorRT takes),
    weights per output channel, activations per tensor; biases and outputs stay float.

    Args:
        calibration: batches of real inputs, int64 [batch, sequence] by name.

    Raises:
        InputError: no calibration data. One random sample would do for the quantiser, and ruin the model.
    """
    if not calibration:
        raise InputError("An int8 export needs real inputs to calibrate on.", "Add --calibration FILE.")
    products = ["MatMul", "Gemm"]
    config = OnnxRuntimeStaticConfig(
        op_types_to_quantize=products,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": products,
        },
    )
    return WeightQuantizer(config, calibration_dataset=[dict(batch) for batch in calibration])


def export_graph(
    checkpoint: Checkpoint, settings: ExportSettings, calibration: Sequence[Mapping[str, torch.Tensor]] = ()
) -> ExportedModel:
    """Trace a checkpoint's module at the precision of the settings; `calibration` is needed for int8 alone.

    Raises:
        InputError: int8 without calibration data.
        ExportMismatch: a weight that float16 does not hold.
    """
    config = TensorRTConfig(
        precision=settings.precision,
        dynamic_shapes=dynamic_shapes(checkpoint, settings.shapes),
        quantizer=int8_quantizer(calibration) if settings.precision == "int8" else None,
    )
    with quiet_exporters():
        exported: ExportedModel = TensorRTExporter().export(
            checkpoint.module, sample_inputs(checkpoint, settings.shapes), config
        )
    return exported


def prunable_modules(checkpoint: Checkpoint) -> set[str] | None:
    """Names, in the exported module, of the matrices that pruning looks at; `None` for an unknown architecture."""
    try:
        inside = {id(part) for _, part in anatomy_of(checkpoint.model).linear_layers(checkpoint.model)}
    except InputError:
        return None
    return {name for name, part in checkpoint.module.named_modules() if id(part) in inside}
