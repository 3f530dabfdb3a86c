"""TensorRT: a strongly typed ONNX graph with its build plan, together called a kit. It is written anywhere; only
building it into an engine needs TensorRT and a GPU.

Since TensorRT 11 every network is strongly typed: there are no precision flags, the graph's own types decide. So a
float16 kit is traced in float16 with float32 islands (`precision.py`), and an int8 or fp8 kit carries Q/DQ nodes.

Users of plain transformers get the exporter by one import:

    from limbeck.exporters.tensorrt import TensorRTConfig, TensorRTExporter
    TensorRTExporter().export(model, inputs, TensorRTConfig(precision="fp16", dynamic_shapes=...))
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from onnxruntime.quantization import QuantType
from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeStaticConfig
from transformers.exporters.auto import EXPORT_BACKENDS, register_backend
from transformers.exporters.configs import ExportFormat

from ..errors import InputError, UsageError
from ..models.checkpoint import Checkpoint
from .constant_weights import fold_weights
from .float8 import int8_to_float8
from .inputs import dynamic_shapes, sample_inputs
from .onnx import name_weights, quiet_exporters
from .options import OPSET
from .precision import HALF_DTYPES, half_precision
from .settings import CALIBRATED, ExportSettings, Precision
from .static_quantization import WeightQuantizer
from .unsupported import failures_named

if TYPE_CHECKING:
    import onnx_ir
    from transformers.exporters import ExportedModel

FORMAT = "tensorrt" if "tensorrt" not in EXPORT_BACKENDS else "limbeck-tensorrt"
"""transformers may come to ship a format of that name: ours must not take its place, and goes by another name then."""


PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")


@dataclass
class TensorRTConfig(OnnxConfig):
    """Settings of one graph: those of `OnnxConfig`, and the precision.

    Attributes:
        precision: `fp32`, `tf32` (the same graph, another flag of the builder), `fp16`, `bf16`, or `int8` and `fp8`
            with a `quantizer` (see `quantizer_for`).
        rest: what an int8 or fp8 graph computes in where it is not quantised.
    """

    export_format: Any = FORMAT
    precision: Precision = "fp16"
    rest: Literal["fp16", "fp32"] = "fp16"
    opset_version: int | None = OPSET

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise UsageError(f"TensorRT has no precision {self.precision!r} here; valid are {', '.join(PRECISIONS)}.")
        if self.ort_fusions is not None:
            raise UsageError("ort_fusions make a graph that only ONNX Runtime reads; leave them out for TensorRT.")
        if (self.precision in CALIBRATED) != (self.quantizer is not None):
            raise UsageError(
                "precision='int8' or 'fp8' and a quantizer go together; limbeck.exporters.tensorrt.quantizer_for."
            )

    @property
    def traced(self) -> torch.dtype:
        """What the graph is traced in, before it is quantised."""
        return HALF_DTYPES.get(self.rest if self.precision in CALIBRATED else self.precision, torch.float32)


class TensorRTExporter(OnnxExporter):
    """Traces a model into an ONNX graph that TensorRT reads as it is meant: types in the graph, each weight a constant
    of its MatMul or Gemm (2:4 sparsity is looked for there only) and named like its parameter."""

    export_format: Any = FORMAT
    config_class = TensorRTConfig

    def export_program(
        self, model: Any, sample_inputs: MutableMapping[str, Any], config: TensorRTConfig
    ) -> tuple[onnx_ir.Model, Any]:
        """See `OnnxExporter.export_program`; the model is unchanged afterwards, weights bit for bit."""
        # transformers' quantisers list the formats they know, "onnx" among them: quantise as that, after the trace.
        plain = copy.copy(config)
        plain.quantizer = None
        with half_precision(model, config.traced):
            program, metadata = super().export_program(model, sample_inputs, plain)
            fold_weights(program)
            name_weights(program, model)
        if config.quantizer is not None:
            program = config.quantizer.quantize(program, dict(sample_inputs), ExportFormat.ONNX)
        return program, metadata


if FORMAT not in EXPORT_BACKENDS:
    # Without a runner: transformers would open a saved kit at once on load, and a kit must load without a GPU.
    register_backend(TensorRTExporter)


class Float8Quantizer(WeightQuantizer):
    """The same for float8: ranges and places as for int8, numbers E4M3."""

    def quantize(
        self, model: onnx_ir.Model, sample_inputs: dict[str, Any], export_format: ExportFormat
    ) -> onnx_ir.Model:
        """See `OnnxRuntimeQuantizer.quantize`."""
        weights = {
            str(value.name): value.const_value.numpy()
            for value in model.graph.initializers.values()
            if value.const_value is not None and value.const_value.dtype.is_floating_point()
        }
        quantised = super().quantize(model, sample_inputs, export_format)
        int8_to_float8(quantised, weights)
        return quantised


def quantizer_for(precision: Precision, calibration: Sequence[Mapping[str, torch.Tensor]]) -> WeightQuantizer:
    """Static int8 or fp8 for products with a stored weight: symmetric (zero point 0, which is all that TensorRT takes),
    activations per tensor, weights per output channel in int8 and per tensor in fp8, where a scale a channel keeps
    TensorRT from its float8 kernels and E4M3's exponent does a scale's work; biases and outputs stay float.

    Args:
        calibration: batches of real inputs, int64 [batch, sequence] by name.

    Raises:
        InputError: no calibration data. One random sample would do for the quantiser, and ruin the model.
    """
    if not calibration:
        raise InputError(f"An {precision} export needs real inputs to calibrate on.", "Add --calibration FILE.")
    products = ["MatMul", "Gemm"]
    config = OnnxRuntimeStaticConfig(
        op_types_to_quantize=products,
        per_channel=precision == "int8",
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": products,
        },
    )
    kind = Float8Quantizer if precision == "fp8" else WeightQuantizer
    return kind(config, calibration_dataset=[dict(batch) for batch in calibration])


def export_graph(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    rest: Literal["fp16", "fp32"] = "fp16",
    calibration: Sequence[Mapping[str, torch.Tensor]] = (),
) -> ExportedModel:
    """Trace a checkpoint's module at the precision of the settings; `calibration` and `rest` are for int8 and fp8.

    Raises:
        InputError: int8 or fp8 without calibration data.
        ExportMismatch: a weight that float16 does not hold.
    """
    quantised = settings.precision in CALIBRATED
    config = TensorRTConfig(
        precision=settings.precision,
        rest=rest,
        dynamic_shapes=dynamic_shapes(checkpoint, settings.shapes),
        quantizer=quantizer_for(settings.precision, calibration) if quantised else None,
    )
    with quiet_exporters(), failures_named(checkpoint.module, OPSET):
        exported: ExportedModel = TensorRTExporter().export(
            checkpoint.module, sample_inputs(checkpoint, settings.shapes), config
        )
    return exported
