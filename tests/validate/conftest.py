"""What several tests share: a tiny checkpoint, the artifacts made of it, and a report of made-up figures."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.backends.base import Backend, ExportJob
from limbeck.backends.onnx import OnnxBackend
from limbeck.backends.openvino import OpenVINOBackend
from limbeck.exporters.artifact import Manifest, seal
from limbeck.exporters.settings import ExportSettings
from limbeck.models.checkpoint import load_checkpoint
from limbeck.validate.gates.applying import apply_gates
from limbeck.validate.records.bisection import ModuleDifference, StepDifferences
from limbeck.validate.records.report import (
    Candidate,
    ChangedExample,
    Check,
    Curve,
    Gate,
    Latency,
    LayerSimilarity,
    LayerWidths,
    Matrix,
    Metric,
    ReliabilityBin,
    Report,
    Slice,
    Step,
)


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


@pytest.fixture(scope="session")
def full_report() -> Callable[..., Report]:
    """`full_report(word)`: a report that has a bit of everything, with `word` wherever a text may be anybody's."""
    return _full_report


def _latency(median: float) -> Latency:
    return Latency(
        batch_size=1, sequence_length=128, threads=2, rounds=3, samples=30, p50_ms=median, p90_ms=median * 1.2,
        p99_ms=median * 1.5, mean_ms=median, histogram_edges_ms=[median * 0.8, median, median * 1.6],
        histogram_counts=[20, 10], speedup=2.0,
    )  # fmt: skip


def _candidate(name: str, kind: Any = "artifact", value: float = 0.9, **more: Any) -> Candidate:
    accuracy = Metric(
        name="accuracy",
        value=value,
        low=value - 0.02,
        high=value + 0.02,
        count=500,
        higher_is_better=True,
        description=name,
    )
    return Candidate(name=name, kind=kind, backend="onnx", precision="fp32", path=name, metrics=[accuracy], **more)


def _sliced(part: str, kept: float, count: int = 60, **more: Any) -> Slice:
    metrics = [
        Metric(name=name, value=value, low=value - 0.01, high=value, teacher=0.9, higher_is_better=True, description="")
        for name, value in (("accuracy_kept", kept), ("invariance", 0.8))
    ]
    return Slice(name=part, kind="perturbed", count=count, metrics=metrics, **more)


def _full_report(word: str = "student") -> Report:
    checks = [Check(name="parity", passed=True, detail="close", rows=[{word: word, "within": True, "distance": 1e-5}])]
    checks.append(Check(name="weight audit", passed=False, detail=word))
    report = Report(
        kind="validation",
        title=word,
        created="2026-01-01T00:00:00Z",
        command=word,
        teacher=_candidate("teacher", "teacher", 0.93, latencies=[_latency(20.0)]),
        candidates=[
            _candidate(word, value=0.9, latencies=[_latency(1.0)], checks=checks, size_bytes=12_000_000,
                      unverified=word,
                      matrices=[Matrix(name=word, layer=0, kind="q", shape=[8, 8], precision="float32", zeros=0.5,
                                       pattern=True, size_bytes=256)],
                      reliability=[ReliabilityBin(confidence=0.8, accuracy=0.7, count=9)],
                      modules=[StepDifferences(before="student", after="program", precision="fp32", explained=1e-4,
                                               modules=[ModuleDifference(module=word, error=0.2, largest=1.0,
                                                                         cosine=0.9, beyond=True)])],
                      slices=[_sliced(word, 0.7, note=word), _sliced("few", 0.1, count=3)],
                      changed=[ChangedExample(row=7, text=word, label=word, teacher=word, candidate=word, distance=2.5,
                                              measure=word)]),
            _candidate("bad", value=0.5),
        ],
        steps=[Step(verb="prune", method=word, settings={word: {"a": [1, word]}}, rationale=word,
                    curves=[Curve(name=word, steps=[1, 2, 3], values=[3.0, math.nan, 1.0]),
                            Curve(name="none", steps=[], values=[])],
                    widths=[LayerWidths(layer=word, before=1536, after=768)],
                    similarity=LayerSimilarity(before=[[0.2, math.nan]], after=[[0.9, 0.4]]))],
        environment={"cpu": {"name": word}, "gpus": []},
        notes=[word],
    )  # fmt: skip
    report.gates = apply_gates(report, [Gate(metric="accuracy", min=0.89, why=word), Gate(metric="accuracy", max=0.99)])
    return report
