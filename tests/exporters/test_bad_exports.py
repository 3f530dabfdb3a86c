"""Models and surroundings that no export can be made of: one sentence that names the offender, and nothing left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from limbeck.backends.fitted import FittedRunner
from limbeck.backends.registry import get_backend, load_runner
from limbeck.errors import DiskFull, ExportMismatch, InputError
from limbeck.exporters.artifact import read_manifest
from limbeck.exporters.inputs import probe_batch
from limbeck.exporters.settings import ExportSettings, Precision, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.recipes.steps import export

TinyCheckpoint = Callable[..., Path]
SMALL = ShapeRange(max_batch=4, opt_batch=2, max_sequence=32, opt_sequence=16)
PLACE = "encoder.encoder.layer.1.intermediate.intermediate_act_fn"
THOROUGH = pytest.mark.thorough


class Activation(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.function(hidden)


def rotated(hidden: torch.Tensor) -> torch.Tensor:
    """ONNX's own RotaryEmbedding, which came with opset 23; by an angle of zero."""
    places = torch.zeros(hidden.shape[0], hidden.shape[1], dtype=torch.int64)
    table = torch.ones(64, 8), torch.zeros(64, 8)
    turned: torch.Tensor = torch.onnx.ops.rotary_embedding(hidden, *table, places, num_heads=4)
    return turned


def settings_for(backend: str, precision: Precision = "fp32", **options: Any) -> ExportSettings:
    return ExportSettings(backend=backend, precision=precision, shapes=SMALL, options=options)


@pytest.fixture
def checkpoint(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert"))


def with_activation(checkpoint: Checkpoint, function: Callable[[torch.Tensor], torch.Tensor]) -> Checkpoint:
    checkpoint.model.get_submodule("encoder.layer.1.intermediate").intermediate_act_fn = Activation(function)
    return checkpoint


# operator, backend, what is said beside the module's name; kits are made of the ONNX exporter's graphs
UNSUPPORTED: list[Any] = [
    (torch.special.bessel_j0, "onnx", ["aten.special_bessel_j0", "ONNX opset 20", "No opset up to"]),
    pytest.param(torch.special.bessel_j0, "openvino", ["aten.special_bessel_j0", "OpenVINO"], marks=THOROUGH),
    pytest.param(torch.special.bessel_j0, "tensorrt", ["aten.special_bessel_j0", "ONNX opset 20"], marks=THOROUGH),
    (lambda x: torch.cumprod(x, -1), "onnx", ["aten.cumprod (it comes down to prims.prod)", "CumProd since opset 26"]),
    pytest.param(rotated, "onnx", ["RotaryEmbedding", "opset 20 does not have; opset 23 has it"], marks=THOROUGH),
    pytest.param(rotated, "tensorrt", ["RotaryEmbedding", "opset 23 has it"], marks=THOROUGH),
    (lambda x: x if x.sum() > 0 else -x, "onnx", ["cannot be traced", "a branch", "test_bad_exports.py, line"]),
    (lambda x: torch.from_numpy(x.numpy()), "openvino", ["cannot be traced", "numpy"]),
]


@pytest.mark.parametrize(("function", "backend", "said"), UNSUPPORTED)
def test_an_operator_that_the_compiler_lacks_is_named_with_its_module(
    function: Callable[[torch.Tensor], torch.Tensor],
    backend: str,
    said: list[str],
    checkpoint: Checkpoint,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(InputError) as refused:
        export(with_activation(checkpoint, function), settings_for(backend), tmp_path / "out")
    for words in (f"The module {PLACE} ", *said):
        assert words in refused.value.message
    assert refused.value.exit_code == 4 and refused.value.hint
    assert function is not rotated or refused.value.hint == "Use --backend onnx --option opset=23."
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""  # no page of the compiler's beside the sentence


def test_the_opset_that_has_the_operator_mends_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    manifest = export(with_activation(checkpoint, rotated), settings_for("onnx", opset=23), tmp_path / "out")
    assert all(check.passed for check in manifest.checks)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_code_that_fixes_a_size_is_told_the_sizes(checkpoint: Checkpoint, tmp_path: Path, backend: str) -> None:
    fixing = with_activation(checkpoint, lambda hidden: hidden.reshape(2, 16, -1))
    with pytest.raises(InputError, match=r"its code fixes batch at 2 and sequence at 16") as refused:
        export(fixing, settings_for(backend), tmp_path / "out")
    assert "--batch N --sequence N" in str(refused.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_defect_of_an_exporter_is_not_blamed_on_the_model(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.exporters import OnnxExporter

    monkeypatch.delattr(OnnxExporter, "export_program")
    monkeypatch.setattr("transformers.exporters.exporter_dynamo.prepare_for_export", None)
    with pytest.raises(TypeError):
        export(checkpoint, settings_for("onnx"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["onnx", "tensorrt"])
def test_a_weight_that_float16_does_not_hold_is_named(checkpoint: Checkpoint, tmp_path: Path, backend: str) -> None:
    with torch.no_grad():
        checkpoint.module.get_parameter("encoder.encoder.layer.0.intermediate.dense.weight")[3, 5] = 1e6
    with pytest.raises(ExportMismatch, match=r"layer\.0\.intermediate\.dense\.weight reaches 1,000,000") as refused:
        export(checkpoint, settings_for(backend, "fp16"), tmp_path / "out")
    assert refused.value.exit_code == 6 and "bf16" in str(refused.value.hint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("backend", "precision"), [("onnx", "int8"), ("openvino", "int8"), ("tensorrt", "fp8")])
def test_calibrating_without_data_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, backend: str, precision: Precision
) -> None:
    with pytest.raises(InputError, match=r"needs real inputs to calibrate on") as refused:
        export(checkpoint, settings_for(backend, precision), tmp_path / "out")
    assert "--calibration" in str(refused.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_named_before_the_trace(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with torch.no_grad():
        checkpoint.module.get_parameter("encoder.encoder.layer.1.output.dense.bias")[:3] = torch.nan
    with pytest.raises(InputError, match=r"layer\.1\.output\.dense\.bias of \S+ holds 3 NaN"):
        export(checkpoint, settings_for("onnx"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("static", "backend"),
    [
        (False, "onnx"),
        pytest.param(False, "openvino", marks=THOROUGH),
        pytest.param(True, "onnx", marks=THOROUGH),
        (True, "openvino"),
    ],
)
def test_a_shape_out_of_range_is_refused_with_the_range(
    checkpoint: Checkpoint, tmp_path: Path, backend: str, static: bool
) -> None:
    shapes = ShapeRange(min_batch=2, max_batch=2, min_sequence=16, max_sequence=16) if static else SMALL
    settings = ExportSettings(backend=backend, precision="fp32", shapes=shapes)
    manifest = export(checkpoint, settings, tmp_path / "out")
    bare = get_backend(backend).load(tmp_path / "out", manifest, threads=1)
    fitted, _ = load_runner(tmp_path / "out", threads=1)
    assert isinstance(fitted, FittedRunner)
    longer = {name: torch.ones(2, 65, dtype=torch.int64) for name in checkpoint.input_names}
    with pytest.raises(InputError, match=r"does not take inputs of shape \(2, 65\)"):
        bare(longer)
    least, most = (16, 16) if static else (1, 32)
    with pytest.raises(InputError, match=rf"takes sequences of {least} to {most} tokens, not of 65") as refused:
        fitted(longer)
    assert "--sequence" in str(refused.value.hint)
    assert fitted(probe_batch(checkpoint, 2, 16))["sentence_embedding"].shape == (2, 32)
    assert read_manifest(tmp_path / "out").settings.shapes == shapes.within(checkpoint.max_length)


@pytest.mark.parametrize(
    "backend", ["onnx", pytest.param("openvino", marks=THOROUGH), pytest.param("tensorrt", marks=THOROUGH)]
)
def test_a_disk_that_fills_up_under_the_weights(
    checkpoint: Checkpoint, small_disk: Callable[[int], Path], backend: str
) -> None:
    disk = small_disk(100)  # room for the graph and not for its weights beside it
    with pytest.raises(DiskFull, match=rf"The disk is full: {disk / 'out'} could not be written") as refused:
        export(checkpoint, settings_for(backend), disk / "out")
    assert refused.value.exit_code == 4
    assert list(disk.iterdir()) == []
