"""Weight-only precisions: what is stored shrinks, what is computed stays near, and every weight is found again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.backends.base import ExportJob
from limbeck.backends.registry import get_backend
from limbeck.errors import UsageError
from limbeck.exporters.onnx import GRAPH_FILE, read_weights
from limbeck.exporters.onnx_weight_only import quantize_weights, weights_of_matrices
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.steps import export
from limbeck.validate.proofs.weight_audit import audit_weights

TinyCheckpoint = Callable[..., Path]
SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=32, opt_sequence=16)
THOROUGH = pytest.mark.thorough


def settings_for(backend: str, precision: str) -> ExportSettings:
    return ExportSettings.model_validate({"backend": backend, "precision": precision, "shapes": SMALL})


@pytest.fixture(autouse=True)
def small_tables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.exporters.onnx_weight_only._SMALLEST_TABLE", 1000)


@pytest.mark.parametrize(
    ("backend", "family", "task", "precision"),
    [
        ("onnx", "bert", "text-classification", "int8-weight-only"),
        ("onnx", "gpt2", "text-generation", "int4-weight-only"),
        pytest.param("onnx", "modernbert", "fill-mask", "int4-weight-only", marks=THOROUGH),
        pytest.param("openvino", "llama", "text-generation", "int4-weight-only", marks=THOROUGH),
        pytest.param("openvino", "mpnet", "sentence-similarity", "int8-weight-only", marks=THOROUGH),
    ],
)
def test_every_weight_is_found_again_within_its_rounding(
    backend: str, family: str, task: str, precision: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task=task)
    manifest = export(checkpoint, settings_for(backend, precision), tmp_path / "out", beside_float=False)
    assert {"parity", "weight audit"} <= {check.name for check in manifest.checks if check.passed}
    weights = {"onnx": "model.onnx.data", "openvino": "openvino_model.bin"}[backend]
    whole = 4 * sum(parameter.numel() for parameter in checkpoint.module.parameters())
    assert (tmp_path / "out" / weights).stat().st_size < (0.5 if precision == "int4-weight-only" else 0.6) * whole


@pytest.mark.parametrize("precision", [pytest.param("int8-weight-only", marks=THOROUGH), "int4-weight-only"])
def test_a_weight_that_is_not_the_checkpoints_is_found(
    precision: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    get_backend("onnx").export(ExportJob(checkpoint, settings_for("onnx", precision)), tmp_path)
    for part in ("embeddings.word_embeddings", "encoder.layer.1.output.dense"):
        weight = dict(checkpoint.model.named_parameters())[f"{part}.weight"]
        before = weight.detach().clone()
        with torch.no_grad():
            weight[3] += 0.4 * weight.abs().max()
        audit = audit_weights(checkpoint.module, read_weights(tmp_path / GRAPH_FILE))
        assert not audit.passed and f"{part}.weight" in audit.detail
        with torch.no_grad():
            weight.copy_(before)
    assert audit_weights(checkpoint.module, read_weights(tmp_path / GRAPH_FILE)).passed


@given(
    rows=st.integers(1, 70), columns=st.integers(1, 9), bits=st.sampled_from([4, 8]), group=st.sampled_from([16, 32])
)
def test_matrices_of_any_size_come_back_within_a_step(rows: int, columns: int, bits: int, group: int) -> None:
    values = np.random.default_rng(rows * 10 + columns).normal(size=(rows, columns)).astype(np.float32)
    weight = onnx_ir.Value(name="part.weight.T", const_value=onnx_ir.tensor(values), shape=onnx_ir.Shape(values.shape))
    weight.dtype = onnx_ir.DataType.FLOAT
    given_ = onnx_ir.Value(name="x", shape=onnx_ir.Shape([None, rows]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    product = onnx_ir.node("MatMul", [given_, weight])
    product.outputs[0].name, product.outputs[0].dtype = "y", onnx_ir.DataType.FLOAT
    graph = onnx_ir.Graph(
        [given_], product.outputs, nodes=[product], initializers=[weight], opset_imports={"": 20}, name="one"
    )
    (found,) = weights_of_matrices(quantize_weights(onnx_ir.Model(graph, ir_version=10), bits, group).graph)
    assert found.name == "part.weight"
    assert np.all(np.abs(found.values - values.T) <= np.asarray(found.step) + 1e-6)


@pytest.mark.thorough
def test_a_wrong_weight_among_packed_ones_is_found(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Fusions put the weights of query, key and value side by side; the audit takes them apart again."""
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"), task="text-generation")
    settings = ExportSettings.model_validate({"backend": "onnx", "shapes": SMALL, "options": {"fusions": True}})
    manifest = export(checkpoint, settings, tmp_path / "out", beside_float=False)
    assert {"parity", "weight audit"} <= {check.name for check in manifest.checks if check.passed}
    wrong = "model.layers.1.self_attn.k_proj.weight"
    with torch.no_grad():
        dict(checkpoint.module.named_parameters())[wrong][3] += 0.01
    audit = audit_weights(checkpoint.module, read_weights(tmp_path / "out" / GRAPH_FILE))
    assert not audit.passed and wrong in audit.detail and "(1 weights are wrong)" in audit.detail


def test_fusions_are_refused_where_the_quantiser_cannot_read_them(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    job = ExportJob(
        load_checkpoint(tiny_checkpoint("bert")),
        ExportSettings.model_validate({"backend": "onnx", "precision": "int8", "options": {"fusions": True}}),
    )
    with pytest.raises(UsageError, match="fusions"):
        get_backend("onnx").export(job, tmp_path)


@pytest.mark.thorough
def test_the_quantiser_leaves_the_users_logging_alone(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Importing it configures the root logger, which would print limbeck's own messages a second time."""
    code = (
        "import logging, sys\n"
        "from limbeck.backends.base import ExportJob\n"
        "from limbeck.backends.onnx import OnnxBackend\n"
        "from limbeck.exporters.settings import ExportSettings\n"
        "from limbeck.models.checkpoint import load_checkpoint\n"
        "from pathlib import Path\n"
        "job = ExportJob(load_checkpoint(sys.argv[1]), ExportSettings(backend='onnx', precision='int4-weight-only'))\n"
        "OnnxBackend().export(job, Path(sys.argv[2]))\n"
        "assert logging.root.handlers == [] and logging.root.level == logging.WARNING\n"
    )
    words = [sys.executable, "-c", code, str(tiny_checkpoint("bert")), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert "quantiz" not in done.stderr  # nor does it tell of every operator
