"""Precision and sparsity that are claimed and not there, and int8 ranges that fit other inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from limbeck.environment import multiplies_bf16
from limbeck.exporters.artifact import read_manifest, seal
from limbeck.exporters.settings import ExportSettings
from limbeck.models.checkpoint import load_checkpoint
from limbeck.prune.settings import PruneSettings
from limbeck.recipes.steps import export, prune, validate

Bench = Any


@pytest.mark.skipif(not multiplies_bf16(), reason="a CPU without bfloat16 computes in float32 whatever is asked")
@pytest.mark.parametrize(
    "properties", [{}, pytest.param({"INFERENCE_PRECISION_HINT": "bf16"}, marks=pytest.mark.thorough)]
)
def test_bfloat16_where_float32_is_claimed(properties: dict[str, str], bench: Bench) -> None:
    folder = bench.planted("openvino", "fp32", compile_properties=properties)
    said = "fp32 is claimed, but the runtime computes in bfloat16: the manifest asks for"
    report = bench.assert_caught(folder, "runtime precision", said)
    assert "bfloat16 arithmetic" in next(
        check.detail for check in report.candidates[0].checks if check.name == "parity"
    )


def test_int8_that_is_not_there(bench: Bench) -> None:
    settings = read_manifest(bench.good("onnx", "fp32")).settings.model_copy(update={"precision": "int8"})
    folder = bench.planted("onnx", "fp32", settings=settings)
    bench.assert_caught(folder, "stored precision", "int8 is claimed, but no layer is quantised")


@pytest.mark.parametrize(("factor", "problem"), [(1 / 16, "cuts its inputs"), (16.0, "of its range")])
def test_int8_calibrated_on_noise(factor: float, problem: str, bench: Bench, edit_onnx: Any) -> None:
    """Noise that is too quiet, or too loud."""

    def change(model: onnx.ModelProto) -> None:
        held = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                scale = held[node.input[1]]
                values = onnx.numpy_helper.to_array(scale) * np.float32(factor)
                scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))

    folder = bench.planted("onnx", "int8", lambda folder: edit_onnx(folder, change))
    said = ("calibrated on other inputs than these texts", "bert.encoder.layer.", problem)
    bench.assert_caught(folder, "activation ranges", *said)


def test_a_broken_pattern(bench: Bench, rewrite_weights: Any, tmp_path: Path) -> None:
    sparse = prune(load_checkpoint(bench.home.folder / "student"), PruneSettings(pattern="2:4", method="magnitude"))
    sparse.save(tmp_path / "sparse")
    sparse = load_checkpoint(tmp_path / "sparse")
    shapes = read_manifest(bench.good("onnx", "fp32")).settings.shapes
    folder = tmp_path / "kit"
    export(sparse, ExportSettings(backend="tensorrt", precision="fp32", sparsity="2:4", shapes=shapes), folder)
    assert validate({"artifact": folder}, sparse, bench.home.data).verdict == "pass"

    def filled(values: np.ndarray) -> np.ndarray:
        values[0, :4] = 1.0
        return values

    rewrite_weights(folder, {"bert.encoder.layer.1.intermediate.dense.weight": filled})
    seal(read_manifest(folder), folder)
    said = "2:4 pattern is broken in 1 of 18 layers: bert.encoder.layer.1.intermediate.dense: more than 2 of 4"
    bench.assert_caught(folder, "2:4 pattern", said, teacher=sparse)
