"""Attribution: quality at every point from teacher to program, and defects between two points named."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch

from limbeck.environment import cache_folder
from limbeck.errors import InputError
from limbeck.exporters.artifact import open_artifact, seal
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.lineage import Step
from limbeck.recipes.exporting import export
from limbeck.recipes.steps import ValidationAsked, validate
from limbeck.validate.attribution import reference
from limbeck.validate.attribution.points import AttributionAsked
from limbeck.validate.attribution.reference import reference_graph
from limbeck.validate.records.report import Candidate, Parity, Report
from limbeck.validate.rendering import render_html, render_markdown

TinyCheckpoint = Callable[..., Path]
TASK = "text-classification"
SMALL = ShapeRange(max_batch=32, opt_batch=2, max_sequence=48, opt_sequence=16)
NORM = "bert.encoder.layer.1.attention.output.LayerNorm"


class Scene:
    """A teacher, a worse student of it, and the student's program."""

    def __init__(self, folder: Path, teacher: Path, texts: list[str], write_jsonl: Callable[..., Path]) -> None:
        self.teacher = load_checkpoint(teacher, TASK)
        student = load_checkpoint(teacher, TASK)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            student.model.classifier.weight.add_(torch.randn_like(student.model.classifier.weight), alpha=0.3)
        self.student_folder = folder / "student"
        student.after(student.model, Step(verb="distill", method="test")).save(self.student_folder)
        self.artifact = folder / "artifact"
        export(self.student, ExportSettings(backend="onnx", shapes=SMALL), self.artifact)
        labels = self.teacher.model.config.id2label
        rows = [{"text": text, "label": labels[index % 3]} for index, text in enumerate(texts)]
        self.data = self.teacher.read(write_jsonl(folder / "rows.jsonl", rows))

    @property
    def student(self) -> Checkpoint:
        return load_checkpoint(self.student_folder, TASK)

    def report(self, artifact: Path, **asked: Any) -> Report:
        return validate({"artifact": artifact}, self.teacher, self.data, ValidationAsked(**asked))

    def planted(self, folder: Path, change: Callable[[onnx_ir.Graph], None]) -> Candidate:
        """The program changed before its manifest was written."""
        shutil.copytree(self.artifact, folder)
        model = onnx_ir.load(str(self.artifact / "model.onnx"))
        change(model.graph)
        onnx_ir.save(model, str(folder / "model.onnx"), external_data="model.onnx.data")
        (folder / "manifest.json").unlink()
        seal(open_artifact(self.artifact), folder)
        return self.report(folder).candidates[0]


@pytest.fixture(scope="module")
def scene(
    tiny_checkpoint: TinyCheckpoint,
    texts: list[str],
    write_jsonl: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Scene:
    return Scene(tmp_path_factory.mktemp("attribution"), tiny_checkpoint("bert", task=TASK), texts, write_jsonl)


def failed(candidate: Candidate) -> dict[str, str]:
    return {check.name: check.detail for check in candidate.checks if not check.passed}


def test_each_step_stands_alone(scene: Scene) -> None:
    report = scene.report(scene.artifact)
    candidate = report.candidates[0]
    _, student, graph, program = candidate.waypoints
    assert [stop.name for stop in candidate.waypoints] == ["teacher", "student", "graph", "program"]
    assert program.metrics == [metric for metric in candidate.metrics if metric.name != "size_mb"]
    assert [metric.name for metric in student.metrics] == [metric.name for metric in program.metrics]
    accuracy = {stop.name: stop.metric("accuracy") for stop in candidate.waypoints}
    assert student.loss is not None and student.loss.metric == "accuracy"
    assert student.loss.value == pytest.approx(accuracy["teacher"].value - accuracy["student"].value)
    assert student.loss.low < student.loss.value < student.loss.high
    assert graph.loss is not None and graph.loss.value == 0 and program.loss is not None and program.loss.value == 0
    assert student.parity is not None and student.parity.tolerance is None and student.parity.share > 1e-2
    assert graph.parity is not None and graph.parity.passed and 0 < graph.parity.share < 1e-5
    assert graph.parity.error < 1e-5 and student.parity.error > 1e-2
    assert graph.audit is not None and graph.audit.passed and program.audit is not None and program.audit.passed
    assert not failed(candidate)
    assert "parity, graph to program" in {check.name for check in candidate.checks}
    page, text = render_html(report), render_markdown(report)
    assert 'id="attribution"' in page and "Accuracy from teacher to program" in page
    assert "### What each step lost" in text and "| artifact | student | eager torch, fp32 |" in text
    assert Report.model_validate_json(report.model_dump_json()).candidates[0].waypoints == candidate.waypoints


def test_a_changed_weight_is_named_at_its_step(scene: Scene, tmp_path: Path) -> None:
    def other(graph: onnx_ir.Graph) -> None:
        value = graph.initializers["bert.encoder.layer.0.attention.self.query.weight.T"]
        value.const_value = onnx_ir.Tensor(value.const_value.numpy() * 1.02, name=value.name)

    found = failed(scene.planted(tmp_path / "planted", other))
    assert "bert.encoder.layer.0.attention.self.query.weight" in found["weight audit"]
    assert "they part first at bert.encoder.layer.0.attention.self.query" in found["parity, graph to program"]
    assert not any("exported graph" in name or "student to graph" in name for name in found)


def test_an_epsilon_that_no_weight_shows_is_named_by_parity(scene: Scene, tmp_path: Path) -> None:
    def large(graph: onnx_ir.Graph) -> None:
        norm = [node for node in graph if node.op_type == "LayerNormalization"][3]
        norm.attributes["epsilon"] = onnx_ir.AttrFloat32("epsilon", 1e-2)

    found = failed(scene.planted(tmp_path / "planted", large))
    assert list(found) == ["parity", "parity, graph to program"]
    assert f"they part first at {NORM} (" in found["parity, graph to program"]


def test_without_the_student_the_ends_are_compared_and_the_report_says_why(scene: Scene, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    scene.student_folder.rename(moved)
    try:
        candidate = scene.report(scene.artifact).candidates[0]
        assert [stop.name for stop in candidate.waypoints] == ["teacher", "program"]
        assert "student that it was made from is not where it was" in (candidate.waypoints[1].note or "")
        assert candidate.waypoints[1].loss is not None and not failed(candidate)
        given = AttributionAsked(load_checkpoint(moved, TASK))
        assert len(scene.report(scene.artifact, attribution=given).candidates[0].waypoints) == 4
    finally:
        moved.rename(scene.student_folder)


def test_a_student_of_another_artifact_is_refused_before_anything_is_measured(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "run", property(lambda _: pytest.fail("the teacher was run")))
    with pytest.raises(InputError, match=r"is not the checkpoint that was exported: its hash starts with"):
        scene.report(scene.artifact, attribution=AttributionAsked(scene.teacher))


def test_quantised_programs_are_judged_by_all_answers_and_never_past_one_that_is_no_number() -> None:
    outlier = Parity(rows=9, largest=0.2, share=0.7, error=0.2, cosine=0.98, tolerance=0.5, by_error=True)
    assert outlier.passed and not outlier.model_copy(update={"by_error": False}).passed
    assert not outlier.model_copy(update={"largest": math.nan}).passed


def test_none_is_asked_none_is_made(scene: Scene) -> None:
    assert scene.report(scene.artifact, attribution=None).candidates[0].waypoints == []


def test_a_kept_graph_is_read_verified_made_again_and_purged(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, student, said = open_artifact(scene.artifact), scene.student, []
    with reference_graph(student, manifest, said.append) as first:
        weights = first.folder / "model.onnx.data"
    said.clear()
    with reference_graph(student, manifest, said.append) as again:
        assert again.folder == first.folder and said == []
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with reference_graph(student, manifest, said.append) as third:
        assert said == ["exporting the reference graph"] and open_artifact(third.folder) == third.manifest
    monkeypatch.setattr(reference, "_KEPT", 1)
    other = shutil.copytree(first.folder, first.folder.with_name("an-older-one"))
    os.utime(other, (1, 1))
    with reference_graph(student, manifest):
        assert not other.exists() and first.folder.is_dir()
    assert first.folder.parent == cache_folder() / "reference-graphs"
