"""ONNX Runtime's static quantiser as our exporters use it."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from transformers.exporters import OnnxRuntimeQuantizer
from transformers.exporters.configs import ExportFormat

if TYPE_CHECKING:
    import onnx_ir


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
