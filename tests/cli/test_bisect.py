"""`limbeck bisect` as it is typed, and `validate --student`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck import export, load_checkpoint
from limbeck.exporters.settings import ExportSettings

Limbeck = Callable[..., Any]


@pytest.fixture(scope="module")
def student(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(model, tmp_path_factory.mktemp("bisect") / "student"))


@pytest.fixture(scope="module")
def artifact(student: Path) -> Path:
    export(load_checkpoint(student), ExportSettings(backend="onnx"), student.parent / "artifact")
    return student.parent / "artifact"


def test_the_answer_is_shown_and_written(artifact: Path, held_out: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    shown = limbeck("bisect", artifact, "--data", held_out, "--samples", 4, "--out", tmp_path / "<b>")
    assert shown.code == 0, shown.err
    assert "exported graph (float32) → compiled program: every module is within what fp32 explains" in shown.out
    assert "encoder.encoder.layer.1.intermediate.intermediate_act_fn" in shown.out
    found = json.loads((tmp_path / "<b>" / "bisection.json").read_text())
    assert found["rows"] == 4 and len(found["steps"]) == 2
    page = (tmp_path / "<b>" / "bisection.html").read_text()
    assert "Error over depth" in page and "<svg" in page and "<script" not in page


def test_a_report_draws_it_too(artifact: Path, student: Path, held_out: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    options = ("--teacher", student, "--data", held_out, "--no-latency", "--modules")
    shown = limbeck("validate", artifact, *options, "--out", tmp_path / "report")
    assert shown.code == 0, shown.err
    steps = json.loads((tmp_path / "report" / "report.json").read_text())["candidates"][0]["modules"]
    assert [(step["before"], step["after"]) for step in steps] == [("student", "graph"), ("graph", "program")]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "What each module hands on" in page
    assert "artifact: exported graph (float32) → compiled program" in page
    moved = student.rename(student.with_name("moved"))
    try:
        shown = limbeck("validate", artifact, *options[2:], "--teacher", moved, "--out", tmp_path / "unknown")
    finally:
        moved.rename(student)
    assert shown.code == 0, shown.err
    notes = json.loads((tmp_path / "unknown" / "report.json").read_text())["notes"]
    assert any("artifact: its modules were not compared. There is nothing to compare" in note for note in notes)


def test_a_student_that_is_gone_or_another_is_named(
    artifact: Path, student: Path, held_out: Path, tiny_checkpoint: Callable[..., Path], limbeck: Limbeck
) -> None:
    other = tiny_checkpoint("distilbert")
    limbeck("bisect", artifact, "--data", held_out, "--student", other).assert_refused(4, "is not the checkpoint")
    moved = student.rename(student.with_name("moved"))
    try:
        refused = limbeck("bisect", artifact, "--data", held_out)
        refused.assert_refused(4, "student that it was made from is not where it was", "--student CKPT")
    finally:
        moved.rename(student)


def test_a_student_without_attribution_is_refused(artifact: Path, held_out: Path, out: Path, limbeck: Limbeck) -> None:
    options = ("--teacher", artifact, "--data", held_out, "--out", out, "--no-attribution", "--student", artifact)
    limbeck("validate", artifact, *options).assert_refused(2, "--student", "--no-attribution")
