"""Pairs and prompts on the command line, in gates and reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck import export, load_checkpoint
from limbeck.exporters.settings import ExportSettings
from limbeck.validate.records.report import load_report, short_number

Limbeck = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Write) -> Path:
    return tiny_checkpoint("bert", task="text-classification")


@pytest.fixture(scope="module")
def artifact(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "artifact"
    settings = ExportSettings(backend="onnx", precision="int8-weight-only")
    export(load_checkpoint(teacher), settings, folder, beside_float=False)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: Write) -> Path:
    written = [{"sentence": text, "label": i % 3} for i, text in enumerate(texts)]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", written)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: Write) -> Path:
    written = [{"he": text, "she": text.replace("the", "a")} for text in texts]
    return write_jsonl(tmp_path_factory.mktemp("wide") / "wide.jsonl", written)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: Write) -> Path:
    written = [{"sentence": text, "label": i % 2, "pair_id": i // 2} for i, text in enumerate(texts)]
    return write_jsonl(tmp_path_factory.mktemp("edited") / "edited.jsonl", written)


def test_pairs_are_measured_gated_and_shown(
    artifact: Path, teacher: Path, rows: Path, wide: Path, tmp_path: Path, limbeck: Limbeck
) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "- {metric: gap_amplification, slice: gender, max: 0.5}\n"
        "- {metric: consistency_difference, slice: edited, min: -0.9}\n"
        "- {metric: invariance, slice: names, min: 1.1}\n"
    )
    options = ("--teacher", teacher, "--data", rows, "--no-latency", "--gates", gates, "--out", tmp_path / "report")
    pairs = ("--pairs", f"gender=bias:{wide}", "--pairs", f"names=invariance:{wide}")
    named = ("--column", "first=he", "--column", "second=she", "--column", "text=sentence", "--samples", "40")
    shown = limbeck("validate", artifact, *options, *pairs, *named)
    assert shown.code == 4 and "'edited', which matches none" in shown.err
    gates.write_text("".join(line for line in gates.read_text().splitlines(keepends=True) if "edited" not in line))
    shown = limbeck("validate", artifact, *options, *pairs, *named)
    assert shown.code == 1, shown.err
    report = load_report(tmp_path / "report")
    found = {part.name: part for part in report.candidates[0].slices}
    assert {name: (part.kind, part.count) for name, part in found.items()} == {
        "gender": ("bias", 40),
        "names": ("invariance", 40),
    }
    assert {result.slice: result.verdict for result in report.gates} == {"gender": "pass", "names": "fail"}
    assert [line.partition(":")[0] for line in report.data] == [
        "rows.jsonl", "wide.jsonl, slice gender", "wide.jsonl, slice names"
    ]  # fmt: skip
    assert "unseen data, slice names" in {check.name for check in report.candidates[0].checks}
    page, text = ((tmp_path / "report" / name).read_text() for name in ("report.html", "report.md"))
    values = {m.name: m.value for part in found.values() for m in part.metrics if m.name in ("gap", "invariance")}
    assert set(values) == {"gap", "invariance"}
    for told in (page, text):
        assert "teacher" in told
        assert all(f"{name} {short_number(value, 3)}" in told for name, value in values.items())


def test_few_pairs_judge_nothing(
    artifact: Path, teacher: Path, rows: Path, edited: Path, tmp_path: Path, limbeck: Limbeck
) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text("- {metric: consistency, slice: edited, min: 0}\n")
    shown = limbeck(
        "validate", artifact, "--teacher", teacher, "--data", rows, "--no-latency", "--gates", gates, "--samples", "29",
        "--pairs", f"edited=counterfactual:{edited}", "--out", tmp_path / "report",
    )  # fmt: skip
    assert shown.code == 5, shown.err
    part = load_report(tmp_path / "report").candidates[0].slices[0]
    assert (part.kind, part.count, part.note) == ("counterfactual", 29, "29 examples are too few to judge by")


@pytest.mark.parametrize(
    ("wanted", "code", "words"),
    [
        (("--pairs", "cad=wide.jsonl"), 2, ("--pairs takes NAME=KIND:FILE",)),
        (("--pairs", "cad"), 2, ("--pairs takes NAME=VALUE",)),
        (("--pairs", "cad=bias:nowhere.jsonl"), 4, ("nowhere.jsonl does not exist",)),
        (("--pairs", "cad=biased:{wide}"), 2, ("no pairs of the kind 'biased'", "Did you mean 'bias'?")),
        (("--pairs", "cad=bias:{wide}"), 4, ("no column for 'first'", "--column first=COLUMN")),
        (("--slices", "adversarial"), 2, ("'adversarial' is of prompts", "text-classification")),
        (("--column", "group=pair_id"), 2, ("no field 'group'",)),
    ],
)
def test_wrong_pairs_are_refused(
    wanted: tuple[str, str], code: int, words: tuple[str, ...], artifact: Path, teacher: Path, rows: Path, wide: Path,
    out: Path, limbeck: Limbeck,
) -> None:  # fmt: skip
    options = ("--teacher", teacher, "--data", rows, "--no-latency", "--out", out)
    given = (word.replace("{wide}", str(wide)) for word in wanted)
    limbeck("validate", artifact, *options, *given).assert_refused(code, *words)
