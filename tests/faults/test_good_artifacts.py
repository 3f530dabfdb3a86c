"""No false alarm: good artifacts pass every check that applies to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limbeck.validate.checks import CHECKS

ALWAYS = {"tokenizer", "truncation", "label names", "stored precision", "weight audit", "shapes", "threads",
          "long inputs", "determinism", "padding mask", "parity", "label order", "teacher"}  # fmt: skip


def unchecked(report: Any) -> list[str]:
    return [note for note in report.notes if "not checked" in note]


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("onnx", "int8"),
        pytest.param("onnx", "fp32", marks=pytest.mark.thorough),
        pytest.param("openvino", "fp32", marks=pytest.mark.thorough),
        pytest.param("openvino", "int8", marks=pytest.mark.thorough),
    ],
)
def test_a_good_artifact_passes(backend: str, precision: str, bench: Any) -> None:
    report = bench.validated(bench.good(backend, precision))
    checks = {check.name: check for check in report.candidates[0].checks}
    assert report.verdict == "pass", [check.detail for check in checks.values() if not check.passed]
    assert {*checks} >= ALWAYS
    assert ("activation ranges" in checks) == (precision == "int8")
    assert ("runtime precision" in checks) == (backend == "openvino" and precision == "fp32")
    assert unchecked(report) == []


def test_what_cannot_be_checked_is_said(bench: Any, tmp_path: Path) -> None:
    folder = bench.planted("onnx", "fp32", parent=str(tmp_path / "gone"), parent_hash="0" * 64)
    report = bench.validated(folder)
    assert report.verdict == "pass"
    assert unchecked(report) == [
        "artifact: not checked, since the checkpoint gone that it was made from is not where it was: "
        "weight audit, parity."
    ]


def test_every_check_says_what_it_sees() -> None:
    for name, check in CHECKS.items():
        assert check.name == name
        assert check.__doc__
