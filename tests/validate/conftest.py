"""What several tests of the bench run on: a tiny checkpoint and the artifact that the ONNX backend makes of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.backends.base import Backend, ExportJob
from limbeck.backends.onnx import OnnxBackend
from limbeck.backends.openvino import OpenVINOBackend
from limbeck.exporters.artifact import Manifest, seal
from limbeck.exporters.settings import ExportSettings
from limbeck.models.checkpoint import load_checkpoint


@pytest.fixture(scope="session")
def children() -> Callable[[], set[int]]:
    """`children()`: the processes that this one has started and that are not gone."""
    return lambda: {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


@pytest.fixture(scope="session")
def bert(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("bert")


@pytest.fixture(scope="session")
def artifact(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as an ONNX artifact, made by the backend's own export. Do not write into it."""
    return _artifact(OnnxBackend(), bert, tmp_path_factory.mktemp("artifact") / "onnx")


@pytest.fixture(scope="session")
def openvino_artifact(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by the OpenVINO backend."""
    return _artifact(OpenVINOBackend(), bert, tmp_path_factory.mktemp("artifact") / "openvino")


def _artifact(backend: Backend, bert: Path, folder: Path) -> Path:
    """Export a checkpoint without the proofs that `limbeck export` makes."""
    folder.mkdir()
    checkpoint, settings = load_checkpoint(bert), ExportSettings(backend=backend.name)
    program = backend.export(ExportJob(checkpoint, settings), folder)
    checkpoint.tokenizer.save_pretrained(folder)
    manifest = Manifest(
        format=program.format,
        task=checkpoint.task.name,
        settings=settings,
        parent_hash=checkpoint.hash,
        parent=str(bert),
        parameters=checkpoint.parameters,
        inputs=program.inputs,
        outputs=program.outputs,
        compile_properties=program.compile_properties,
        max_length=checkpoint.max_length,
        lineage=checkpoint.lineage,
    )
    seal(manifest, folder)
    return folder
