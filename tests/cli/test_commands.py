"""Every verb on tiny models, one after the other, as a person would call them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from limbeck.cli.main import _run
from limbeck.environment import gpu_facts
from limbeck.exporters.artifact import open_artifact
from limbeck.models.checkpoint import load_checkpoint
from limbeck.validate.records.report import load_report

Limbeck = Callable[..., Any]
LENGTH = 16  # tokens of a timed call


def run(*words: object) -> None:
    assert _run([str(word) for word in words]) == 0, words


@pytest.fixture(scope="session")
def teacher(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("bert")


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="session")
def student(work: Path, teacher: Path, text_file: Path) -> Path:
    out = work / "student"
    options = ("--task", "sentence-similarity", "--layers", 1, "--max-steps", 2, "--batch-size", 8)
    run("distill", teacher, "--data", text_file, *options, "--rationale", "half the latency", "--out", out)
    return out


@pytest.fixture(scope="session")
def narrow(work: Path, student: Path, text_file: Path) -> Path:
    out = work / "narrow"
    cut = ("--structure", "ffn", "--keep", 0.5, "--method", "taylor")
    run("prune", student, *cut, "--data", text_file, "--rationale", "channels", "--out", out)
    return out


@pytest.fixture(scope="session")
def sparse(work: Path, narrow: Path) -> Path:
    out = work / "sparse"
    run("prune", narrow, "--pattern", "2:4", "--method", "magnitude", "--out", out)
    return out


@pytest.fixture(scope="session")
def onnx(work: Path, narrow: Path) -> Path:
    out = work / "onnx"
    run("export", narrow, "--backend", "onnx", "--out", out)
    return out


@pytest.fixture(scope="session")
def openvino(work: Path, narrow: Path, text_file: Path) -> Path:
    out = work / "openvino"
    calibration = ("--precision", "int8", "--calibration", text_file, "--calibration-samples", 16)
    run("export", narrow, "--backend", "openvino", *calibration, "--out", out)
    return out


@pytest.fixture(scope="session")
def kit(work: Path, sparse: Path) -> Path:
    out = work / "kit"
    run(
        "export",
        sparse,
        "--backend",
        "tensorrt",
        "--precision",
        "fp16",
        "--sparsity",
        "2:4",
        "--kit-only",
        "--out",
        out,
    )
    return out


@pytest.fixture(scope="session")
def gates(work: Path) -> Callable[[str, str], Path]:
    """`gates(name, limits)`: a file with one gate on the agreement with the teacher."""

    def write(name: str, limits: str) -> Path:
        path = work / f"{name}.yaml"
        path.write_text(f"gates:\n  - {{metric: agreement_spearman, {limits}, why: a test}}\n", encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def report(work: Path, teacher: Path, onnx: Path, openvino: Path, held_out: Path, gates: Any) -> Path:
    out = work / "report"
    timing = ("--sequence-length", LENGTH, "--threads", 1, "--rounds", 2)
    options = ("--teacher", teacher, "--data", held_out, "--gates", gates("easy", "min: -1"), *timing)
    run("validate", onnx, openvino, *options, "--noise", "--out", out)
    return out


def test_the_changes_of_a_model_are_in_its_history(sparse: Path) -> None:
    steps = load_checkpoint(sparse).lineage.steps
    assert [step.verb for step in steps] == ["distill", "prune", "prune"]
    assert [step.rationale for step in steps] == ["half the latency", "channels", None]


def test_inspect_shows_a_checkpoint(narrow: Path, limbeck: Limbeck) -> None:
    shown = limbeck("inspect", narrow, "--json")
    summary = json.loads(shown.out)
    assert shown.code == 0
    assert (summary["kind"], summary["layers"], summary["ffn_widths"]) == ("checkpoint", 1, [32])
    assert summary["task"] == "sentence-similarity"
    table = limbeck("inspect", narrow)
    assert summary["hash"] in table.out
    assert "half the latency" in table.out


@pytest.mark.parametrize("made", ["onnx", "openvino", "kit"])
def test_inspect_shows_an_artifact(made: str, limbeck: Limbeck, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(made)
    shown = limbeck("inspect", folder, "--json")
    summary = json.loads(shown.out)
    assert shown.code == 0
    assert (summary["kind"], summary["artifact_id"]) == ("artifact", open_artifact(folder).artifact_id)
    assert {check["name"] for check in summary["checks"]} == {"parity", "weight audit"}
    assert all(check["passed"] for check in summary["checks"])
    table = limbeck("inspect", folder).out
    assert "[any x any]" in table  # brackets are no markup
    assert summary["parent_hash"] in table


@pytest.mark.parametrize("made", ["onnx", "openvino", "kit"])
def test_an_artifact_carries_its_tokenizer(
    made: str, teacher: Path, texts: list[str], request: pytest.FixtureRequest
) -> None:
    carried = AutoTokenizer.from_pretrained(request.getfixturevalue(made))
    assert carried(texts[:8])["input_ids"] == AutoTokenizer.from_pretrained(teacher)(texts[:8])["input_ids"]


def test_the_kit_lists_its_sparse_layers_and_says_what_is_unverified(kit: Path, limbeck: Limbeck) -> None:
    summary = json.loads(limbeck("inspect", kit, "--json").out)
    assert "never built" in summary["unverified"]
    eligible = [layer for layer in summary["sparse_layers"] if layer["eligible"]]
    assert eligible and all(layer["pattern"] for layer in eligible)
    assert (kit / "build.json").is_file()
    manifest = json.loads((kit / "manifest.json").read_text())
    assert "model.onnx" in manifest["program_files"]
    assert "config.json" not in manifest["program_files"]  # what is built of the kit needs it too


def test_export_as_json_prints_json_alone(narrow: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    shown = limbeck("export", narrow, "--backend", "onnx", "--out", tmp_path / "artifact", "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["artifact_id"] == open_artifact(tmp_path / "artifact").artifact_id
    assert "parity:" in shown.err


def test_prune_as_json_prints_json_alone(student: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    shown = limbeck("prune", student, "--pattern", "2:4", "--out", tmp_path / "sparse", "--json")
    assert shown.code == 0
    assert {layer["zeros"] for layer in json.loads(shown.out)["linear_layers"]} == {0.5}


@pytest.mark.skipif(bool(gpu_facts()), reason="there is a GPU: the kit may well be built")
def test_build_without_a_gpu_says_what_is_missing(kit: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    shown = limbeck("build", kit, "--out", tmp_path / "engine")
    assert shown.code == 3
    assert "GPU" in shown.err
    assert "pip install tensorrt" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_build_of_what_needs_none(onnx: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    shown = limbeck("build", onnx, "--out", tmp_path / "engine")
    assert shown.code == 2
    assert "needs no build" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_validate_writes_every_kind_of_report(report: Path) -> None:
    written = {"report.html", "report.json", "report.md", "junit.xml", "monitoring.json"}
    assert {path.name for path in report.iterdir()} == written
    loaded = load_report(report)
    assert loaded.verdict == "pass"
    assert [candidate.name for candidate in loaded.candidates] == ["onnx", "openvino"]
    assert [step.rationale for step in loaded.steps] == ["half the latency", "channels"]
    assert all(candidate.latencies[0].sequence_length == LENGTH for candidate in loaded.candidates)
    assert loaded.noise is not None and loaded.noise.subject == "teacher"
    for candidate, precision in zip(loaded.candidates, ("float32", "int8 weights and activations"), strict=True):
        inside = {matrix.kind: matrix for matrix in candidate.matrices if matrix.layer == 0}
        assert set(inside) == {"q", "k", "v", "o", "up", "down"}
        assert (inside["up"].shape[1], inside["up"].precision, inside["up"].pattern) == (32, precision, False)
    assert '<section id="layers"' in (report / "report.html").read_text(encoding="utf-8")


def test_a_kit_is_validated_and_never_timed(
    kit: Path, teacher: Path, held_out: Path, tmp_path: Path, limbeck: Limbeck
) -> None:
    options = ("--teacher", teacher, "--data", held_out, "--samples", 8, "--no-latency")
    shown = limbeck("validate", kit, *options, "--out", tmp_path / "report", "--json")
    assert shown.code == 0, shown.err
    candidate = json.loads(shown.out)["candidates"][0]
    assert "never built" in candidate["unverified"]
    assert candidate["latencies"] == []
    assert all(matrix["pattern"] for matrix in candidate["matrices"] if matrix["layer"] is not None)


def test_the_verdict_of_validate_is_its_exit_code_and_the_report_stays(
    onnx: Path, teacher: Path, held_out: Path, gates: Any, tmp_path: Path, limbeck: Limbeck
) -> None:
    options = ("--teacher", teacher, "--data", held_out, "--gates", gates("hard", "min: 1.5"), "--no-latency")
    shown = limbeck("validate", onnx, *options, "--out", tmp_path / "report")
    assert shown.code == 1
    assert load_report(tmp_path / "report").verdict == "fail"


def test_validate_finds_rows_that_were_trained_on(
    onnx: Path, teacher: Path, text_file: Path, tmp_path: Path, limbeck: Limbeck
) -> None:
    options = ("--teacher", teacher, "--data", text_file, "--no-latency")
    shown = limbeck("validate", onnx, *options, "--out", tmp_path / "report")
    assert shown.code == 1
    assert "32 of 32 validation rows were also trained on" in shown.err


def test_gate_passes(report: Path, gates: Any, limbeck: Limbeck) -> None:
    shown = limbeck("gate", report, "--gates", gates("easy", "min: -1"))
    assert shown.code == 0
    assert "2 of 2 gates pass" in shown.out


def test_gate_fails(report: Path, gates: Any, limbeck: Limbeck) -> None:
    shown = limbeck("gate", report / "report.json", "--gates", gates("hard", "min: 1.5"), "--json")
    assert shown.code == 1
    assert json.loads(shown.out)["verdict"] == "fail"
    assert "is not at least 1.5" in shown.out


def test_gate_cannot_decide(report: Path, gates: Any, limbeck: Limbeck) -> None:
    found = load_report(report).candidates[0].metric("agreement_spearman")
    assert found is not None and found.low is not None and found.low < found.value
    limit = (found.low + found.value) / 2
    shown = limbeck("gate", report, "--gates", gates("near", f"candidate: onnx, min: {limit}"))
    assert shown.code == 5
    assert "? Inconclusive" in shown.out and "cannot be decided" in shown.err


@pytest.mark.thorough
def test_bench_as_json(onnx: Path, teacher: Path, limbeck: Limbeck) -> None:
    shape = ("--batch-size", 2, "--sequence-length", LENGTH, "--threads", 1, "--rounds", 1)
    shown = limbeck("bench", onnx, "--against", teacher, *shape, "--json")
    assert shown.code == 0, shown.err
    eager, compiled = json.loads(shown.out)["candidates"]
    assert (eager["name"], compiled["name"]) == (teacher.name, "onnx")
    for candidate in (eager, compiled):
        assert 0 < candidate["p50_ms"] <= candidate["p90_ms"] <= candidate["p99_ms"]
        assert (candidate["batch_size"], candidate["sequence_length"]) == (2, LENGTH)
    assert eager["speedup"] is None
    assert compiled["speedup"] > 0
    assert compiled["properties"]["threads"] == "1"  # read back from the runtime
    assert compiled["properties"]["providers"] == "CPUExecutionProvider"
    assert shown.err.count("round 1 of 1") == 1


def test_overwrite_replaces_what_was_there(student: Path, narrow: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    shutil.copytree(student, tmp_path / "model")
    again = ("prune", student, "--structure", "ffn", "--keep", 0.5, "--out", tmp_path / "model")
    assert limbeck(*again).code == 2
    assert limbeck(*again, "--overwrite").code == 0
    assert load_checkpoint(tmp_path / "model").parameters == load_checkpoint(narrow).parameters
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("family", "task", "rows"),
    [
        ("distilbert", "text-classification", [{"sentence": "Go.", "label": "positive"}]),
        ("bert", "token-classification", [{"tokens": ["Anna", "left"], "tags": ["NAME", "O"]}]),
        ("llama", "text-generation", [{"text": "The kettle whistled long before anyone came."}]),
        ("bert", "fill-mask", [{"text": "The kettle whistled long before anyone came."}]),
    ],
)
def test_distil_and_prune_take_every_task(
    family: str,
    task: str,
    rows: list[dict[str, Any]],
    tiny_checkpoint: Callable[..., Path],
    write_jsonl: Callable[[Path, Iterable[dict[str, Any]]], Path],
    tmp_path: Path,
    limbeck: Limbeck,
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows * 8)
    options = ("--data", data, "--layers", 1, "--max-steps", 1, "--out", tmp_path / "student")
    trained = limbeck("distill", tiny_checkpoint(family, task=task), "--task", task, *options, "--json")
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["task"] == task
    cut = ("--structure", "ffn", "--keep", 0.5, "--method", "taylor", "--data", data, "--out", tmp_path / "narrow")
    pruned = limbeck("prune", tmp_path / "student", *cut, "--json")
    assert pruned.code == 0, pruned.err
    assert json.loads(pruned.out)["ffn_widths"] == [32]
