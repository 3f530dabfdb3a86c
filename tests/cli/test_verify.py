"""`limbeck verify`: what the files prove, as an exit code, as lines and as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck import export, load_checkpoint
from limbeck.exporters.artifact import read_manifest, seal
from limbeck.exporters.settings import ExportSettings

Limbeck = Callable[..., Any]


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "artifact"
    export(load_checkpoint(tiny_checkpoint("bert", task="text-classification")), ExportSettings(backend="onnx"), folder)
    return folder


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copied"))


def test_a_good_artifact_is_verified(artifact: Path, limbeck: Limbeck) -> None:
    shown = limbeck("verify", artifact)
    assert shown.code == 0, shown.err
    lines = [line.split(": ")[:2] for line in shown.out.splitlines()]
    assert lines == [
        [name, "passed"]
        for name in ("integrity", "tokenizer", "truncation", "label names", "stored precision", "weight audit")
    ]
    told = json.loads(limbeck("verify", artifact, "--json").out)
    assert told["passed"] is True and told["notes"] == []
    assert [check["name"] for check in told["checks"]] == [name for name, _ in lines]


def test_a_claim_that_does_not_hold_exits_with_1(copied: Path, limbeck: Limbeck) -> None:
    manifest = read_manifest(copied)
    settings = manifest.settings.model_copy(update={"precision": "int8"})
    seal(manifest.model_copy(update={"settings": settings, "max_length": 8}), copied)
    shown = limbeck("verify", copied)
    assert shown.code == 1
    assert "truncation: FAILED: manifest.json cuts texts at 8 tokens" in shown.out
    assert "2 checks failed." in shown.err and "no layer is quantised" in shown.err and "Traceback" not in shown.err


def test_a_changed_file_exits_with_4(copied: Path, limbeck: Limbeck) -> None:
    (copied / "config.json").write_text("{}")
    limbeck("verify", copied).assert_refused(4, "config.json is not the file that was exported")


def test_a_student_that_is_gone_is_said(copied: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    seal(read_manifest(copied).model_copy(update={"parent": str(tmp_path / "gone")}), copied)
    shown = limbeck("verify", copied)
    assert shown.code == 0
    assert "not checked, since the checkpoint gone" in shown.err and "weight audit" not in shown.out


def test_a_given_student_is_used_or_refused(
    copied: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path], limbeck: Limbeck
) -> None:
    seal(read_manifest(copied).model_copy(update={"parent": str(tmp_path / "gone")}), copied)
    student = tiny_checkpoint("bert", task="text-classification")
    assert "weight audit: passed" in limbeck("verify", copied, "--student", student).out
    other = tiny_checkpoint("distilbert", task="text-classification")
    limbeck("verify", copied, "--student", other).assert_refused(4, "is not the checkpoint that the artifact was made")
    limbeck("verify", tmp_path).assert_refused(4, "is not a limbeck artifact")
