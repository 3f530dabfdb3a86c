"""What `validate` does with a language model: the harness's tasks and greedy text as metrics that gates name, and the
baseline of monitoring that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck import export, load_checkpoint
from limbeck.exporters.artifact import read_manifest
from limbeck.exporters.settings import ExportSettings
from limbeck.validate.generation.harness_model import LimbeckLM
from limbeck.validate.records.profile import load_baseline
from limbeck.validate.records.report import load_report

Limbeck = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Write) -> Path:
    return tiny_checkpoint("llama", "text-generation")


@pytest.fixture(scope="module")
def artifact(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "artifact"
    export(load_checkpoint(teacher), ExportSettings(backend="onnx"), folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, write_jsonl: Write, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = write_jsonl(
        folder / "rows.jsonl",
        [{"start": text[: len(text) // 2], "ends": [text[len(text) // 2 :], " the"], "right": 0} for text in texts[:9]],
    )
    task = {"task": "tiny_endings", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{start}}",
            "doc_to_choice": "ends", "doc_to_target": "right"}  # fmt: skip
    (folder / "tiny_endings.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


def test_tasks_and_text_are_gated_and_a_baseline_is_left(
    artifact: Path, teacher: Path, tasks: Path, held_out: Path, tmp_path: Path, limbeck: Limbeck
) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "- {metric: lm_eval/tiny_endings/acc, relative_to: teacher, as: difference, min: -0.9}\n"
        "- {metric: generation_agreement, min: 0.6}\n"
        "- {metric: lm_eval/tiny_endings/acc, min: 1.1}\n"
    )
    options = ("--teacher", teacher, "--data", held_out, "--no-latency", "--gates", gates, "--out", tmp_path / "report")
    wanted = ("--harness", "tiny_endings", "--harness-tasks", tasks, "--samples", 8)
    shown = limbeck("validate", artifact, *options, *wanted, "--json")
    assert shown.code == 1 and "lm_eval/tiny_endings/acc of artifact" in shown.err, shown.err
    report = load_report(tmp_path / "report")
    assert [result.verdict for result in report.gates] == ["pass", "pass", "fail"]
    metric = report.candidates[0].metric("lm_eval/tiny_endings/acc")
    assert metric is not None and metric.count == 8 and metric.value == metric.teacher
    agreement = report.candidates[0].metric("generation_agreement")
    assert agreement is not None and agreement.value == 1 and agreement.count == 8
    assert "lm_eval/tiny_endings/acc" in (tmp_path / "report" / "report.html").read_text()
    assert "monitoring" not in (tmp_path / "report" / "report.json").read_text()
    baseline = load_baseline(tmp_path / "report")
    assert baseline.candidates["artifact"].artifact_id == read_manifest(artifact).artifact_id
    assert baseline.candidates["artifact"].texts == baseline.teacher.texts
    assert baseline.teacher.texts.tokens.count == 8 and baseline.teacher.negative_log_likelihood is not None


@pytest.mark.parametrize("backend", ["onnx", pytest.param("openvino", marks=pytest.mark.thorough)])
def test_how_far_it_is_from_its_teacher_is_gated(
    backend: str, artifact: Path, teacher: Path, held_out: Path, tmp_path: Path, limbeck: Limbeck
) -> None:
    if backend != "onnx":
        artifact = tmp_path / "artifact"
        export(load_checkpoint(teacher), ExportSettings(backend=backend), artifact)
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "- {metric: next_token_kl, max: 1.0e-6}\n"
        "- {metric: next_token_kl, slice: 'position 1-*', max: 1.0e-6}\n"
        "- {metric: generation_identical, min: 0.8}\n"
        "- {metric: first_divergence, min: 8}\n"
        "- {metric: first_divergence, min: 40}\n"
    )
    options = ("--teacher", teacher, "--data", held_out, "--no-latency", "--slices", "position", "--gates", gates)
    shown = limbeck("validate", artifact, *options, "--out", tmp_path / "report", "--json")
    assert shown.code == 1 and "first_divergence of artifact" in shown.err, shown.err
    report = load_report(tmp_path / "report")
    assert [result.verdict for result in report.gates] == ["pass", "pass", "pass", "pass", "fail"]
    candidate = report.candidates[0]
    kl, agreement = candidate.metric("next_token_kl"), candidate.metric("generation_agreement")
    assert kl is not None and 0 <= kl.value < 1e-8 and agreement is not None and agreement.value == 1
    checks = {check.name: check for check in candidate.checks}
    assert checks["cache"].passed and checks["parity"].passed
    page = (tmp_path / "report" / "report.html").read_text()
    for words in ("KL of next tokens", "position 1-", "Generation agreement", "first_divergence", "read whole"):
        assert words in page, words


def test_the_harness_opens_an_artifact_by_its_folder(artifact: Path, teacher: Path) -> None:
    asked = [type("Request", (), {"args": ("The kettle", " whistled")})]
    scores = [LimbeckLM(pretrained=str(folder)).loglikelihood(asked)[0][0] for folder in (artifact, teacher)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize(
    ("wanted", "code", "words"),
    [
        (("--generation", "1"), 2, ("1 prompts cannot be compared",)),
        (("--harness", "x", "--harness-tasks", "nowhere"), 4, ("nowhere is not a folder of task files",)),
        (("--harness-tasks", "nowhere"), 2, ("--harness",)),
    ],
)
def test_what_cannot_be_asked_is_refused(
    wanted: tuple[str, ...], code: int, words: tuple[str, ...], artifact: Path, teacher: Path, held_out: Path,
    out: Path, limbeck: Limbeck,
) -> None:  # fmt: skip
    options = ("--teacher", teacher, "--data", held_out, "--no-latency", "--out", out)
    limbeck("validate", artifact, *options, *wanted).assert_refused(code, *words)
