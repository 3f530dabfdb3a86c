"""Engines: built and run where TensorRT and a GPU are, and clearly refused elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from limbeck.backends.base import BuildJob, ExportJob
from limbeck.backends.tensorrt import ENGINE, KIT, PLAN_NAME, TensorRTBackend, missing_for_engines
from limbeck.environment import gpu_facts, is_importable
from limbeck.errors import BackendUnavailable
from limbeck.exporters.artifact import Manifest
from limbeck.exporters.inputs import probe_batches
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.validate.parity import check_parity

MISSING = missing_for_engines()
without_engines = pytest.mark.skipif(not MISSING, reason="TensorRT and a GPU are here")


def manifest(checkpoint: Checkpoint, settings: ExportSettings, artifact_format: str) -> Manifest:
    return Manifest(
        format=artifact_format,
        task=checkpoint.task.name,
        settings=settings,
        parent_hash=checkpoint.hash,
        parent=checkpoint.source,
        parameters=checkpoint.parameters,
        inputs=[],
        outputs=[],
        max_length=checkpoint.max_length,
        lineage=checkpoint.lineage,
    )


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert"), "sentence-similarity")


@without_engines
def test_building_without_tensorrt_or_gpu_says_what_is_missing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    known = manifest(checkpoint, ExportSettings(backend="tensorrt"), KIT)
    with pytest.raises(BackendUnavailable) as refused:
        TensorRTBackend().build(BuildJob(tmp_path, known), tmp_path / "out")
    assert refused.value.exit_code == 3
    assert all(part in refused.value.message for part in MISSING)
    assert "pip install tensorrt" in str(refused.value.hint)
    if not is_importable("tensorrt"):
        assert "not installed: tensorrt" in refused.value.message
    if not gpu_facts():
        assert "NVIDIA GPU" in refused.value.message


@without_engines
def test_loading_an_engine_without_tensorrt_or_gpu_says_what_is_missing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    known = manifest(checkpoint, ExportSettings(backend="tensorrt"), ENGINE)
    with pytest.raises(BackendUnavailable, match="cannot run here"):
        TensorRTBackend().load(tmp_path, known)


@without_engines
def test_the_probe_offers_the_export_and_explains_the_rest() -> None:
    available = TensorRTBackend().probe()
    assert available.can_export and not available.can_run
    assert "kits are exported" in available.reason and "pip install" in available.mend


def test_the_probe_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from limbeck.backends.tensorrt import TensorRTBackend\n"
        "TensorRTBackend().probe()\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'tensorrt', 'polygraphy', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.gpu
@pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING) or "-")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_computes_what_the_model_computes(checkpoint: Checkpoint, tmp_path: Path, precision: str) -> None:
    shapes = ShapeRange(max_batch=8, max_sequence=48)
    settings = ExportSettings.model_validate({"backend": "tensorrt", "precision": precision, "shapes": shapes})
    backend = TensorRTBackend()
    kit, built = tmp_path / "kit", tmp_path / "engine"
    kit.mkdir()
    built.mkdir()
    backend.export(ExportJob(checkpoint, settings), kit)
    evidence = backend.build(kit, manifest(checkpoint, settings, KIT), built, lambda _: None)
    assert evidence["layers"] > 0 and (built / PLAN_NAME).stat().st_size > 0
    runner = backend.load(built, manifest(checkpoint, settings, ENGINE))
    try:
        with torch.inference_mode():
            parity = check_parity(runner, checkpoint.run, probe_batches(checkpoint, shapes), settings.precision)
        assert parity.passed, parity.rows
        for _, batch in probe_batches(checkpoint, shapes):
            runner.prepare(batch)()
    finally:
        runner.close()
