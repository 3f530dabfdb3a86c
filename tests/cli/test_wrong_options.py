"""Options that are wrong, misspelt or missing: the sentence that names them, and nothing written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Limbeck = Callable[..., Any]

DISTIL = ("distill", "MODEL", "--data", "DATA", "--layers", "1", "--max-steps", "1", "--out", "OUT")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("exprot",), "Did you mean 'export'?"),
        (("export", "MODEL", "--out", "OUT"), "Missing option '--backend'"),
        (("export", "MODEL", "--backnd", "onnx", "--out", "OUT"), "'--backend'"),
        (("export", "MODEL", "--backend", "onnx", "--kit-only", "--out", "OUT"), "onnx has no kits"),
        (("export", "MODEL", "--backend", "onnx", "--batch", "0", "--out", "OUT"), "--batch"),
        (("export", "MODEL", "--backend", "onnx", "--batch", "8:4", "--out", "OUT"), "smallest batch 8 is above"),
        (("export", "MODEL", "--backend", "onnx", "--precision", "auto", "--out", "OUT"), "--validation FILE"),
        (("export", "MODEL", "--backend", "onnx", "--floor", "2", "--out", "OUT"), "--floor: input should be less"),
        (("export", "MODEL", "--backend", "onnx", "--floor", "0.9", "--out", "OUT"), "--validation FILE"),
        (("export", "MODEL", "--backend", "onnx", "--option", "opset", "--out", "OUT"), "NAME=VALUE, not 'opset'"),
        (("export", "MODEL", "--backend", "onnx", "--option", "opset=[", "--out", "OUT"), "in YAML"),
        (("export", "MODEL", "--backend", "onnx", "--calibration-samples", "0", "--out", "OUT"), "or equal to 1"),
        (("export", "MODEL", "--backend", "onnx", "--sequence", "1:2:3:4", "--out", "OUT"), "--sequence"),
        (("export", "MODEL", "--backend", "onnx", "--option", "opsett=21", "--out", "OUT"), "Did you mean 'opset'"),
        (("export", "MODEL", "--backend", "onnx", "--option", "opset=3", "--out", "OUT"), "The option opset"),
        (("export", "MODEL", "--backend", "tensorrt", "--option", "opset=21", "--out", "OUT"), "has no option"),
        (("distill", "MODEL", "--data", "DATA", "--out", "OUT"), "--layers N"),
        (("distill", "MODEL", "--data", "DATA", "--layers", "9", "--out", "OUT"), "choose 1 to 2"),
        (("distill", "MODEL", "--data", "DATA", "--layers", "two", "--out", "OUT"), "0,2,5"),
        ((*DISTIL, "--objective", "hidden-state=1"), "Did you mean 'hidden-states'?"),
        ((*DISTIL, "--objective", "mse"), "NAME=VALUE"),
        ((*DISTIL, "--objective", "embedding-cosine=often"), "with a number"),
        ((*DISTIL, "--objective", "embedding-cosine={waight: 1}"), "waight"),
        ((*DISTIL, "--objective", "hidden-states={layers: {}}"), "names no layer"),
        ((*DISTIL, "--objective", "hidden-states={layers: {0: 7}}"), "layer 7 of the teacher"),
        ((*DISTIL, "--objective", "labels=1"), "does not fit sentence-similarity"),
        ((*DISTIL, "--teacher-runtime", "openvin"), "Did you mean 'openvino'?"),
        ((*DISTIL, "--report-to", "wandb"), "tensorboard, mlflow"),
        ((*DISTIL, "--precision", "half"), "--precision"),
        ((*DISTIL, "--eval-data", "DATA", "--metric", "acuracy"), "agreement_spearman"),
        ((*DISTIL, "--patience", "2"), "--eval-data"),
        (("prune", "MODEL", "--out", "OUT"), "--structure ffn --keep 0.5, --pattern 2:4"),
        (("prune", "MODEL", "--structure", "ffn", "--keep", "2", "--out", "OUT"), "more than 0 and at most 1"),
        (("prune", "MODEL", "--structure", "neurons", "--keep", "0.5", "--out", "OUT"), "'heads', 'ffn'"),
        (("prune", "MODEL", "--structure", "heads", "--keep", "half", "--out", "OUT"), "one for each layer"),
        (("prune", "MODEL", "--structure", "heads", "--keep", "0.1", "--out", "OUT"), "leaves none of 4 heads"),
        (("prune", "MODEL", "--structure", "ffn", "--keep", "0.5", "--method", "fishr", "--out", "OUT"), "fisher"),
        (("prune", "MODEL", "--structure", "ffn", "--keep", "0.5", "--repair", "--out", "OUT"), "--data"),
        (("prune", "MODEL", "--pattern", "4:2", "--out", "OUT"), "N less than M"),
        (("prune", "MODEL", "--pattern", "2:4", "--method", "wanda", "--out", "OUT"), "--data"),
        (("prune", "MODEL", "--sparsity", "1", "--out", "OUT"), "between 0 and 1"),
        (("prune", "MODEL", "--sparsity", "0.5", "--block", "4", "--out", "OUT"), "ROWSxCOLUMNS"),
        (("prune", "MODEL", "--sparsity", "0.5", "--method", "movement", "--out", "OUT"), "sparsify"),
        (("prune", "MODEL", "--budget", "latency_ms=2", "--out", "OUT"), "backend=openvino"),
        (("bench", "MODEL", "--against", "MODEL"), "same name"),
    ],
)
def test_options_that_are_wrong(
    words: tuple[str, ...], said: str, limbeck: Limbeck, model: Path, text_file: Path, out: Path
) -> None:
    given = {"MODEL": str(model), "DATA": str(text_file), "OUT": str(out)}
    limbeck(*(given.get(word, word) for word in words)).assert_refused(2, said)


def test_gates_that_are_no_gates(limbeck: Limbeck, tmp_path: Path) -> None:
    (tmp_path / "gates.yaml").write_text("gates:\n  - {metrc: spearman, min: 0.5}\n")
    refused = limbeck("gate", tmp_path, "--gates", tmp_path / "gates.yaml")
    refused.assert_refused(4, "gates.yaml, line 2", "'metrc'", "metric")
    limbeck("gate", tmp_path, "--gates", tmp_path / "none.yaml").assert_refused(4, "none.yaml does not exist")


def test_an_error_is_quick(limbeck: Limbeck, model: Path, out: Path) -> None:
    """What can be seen without a model is said before one is loaded."""
    started = time.monotonic()
    assert limbeck("export", model, "--backend", "onnx", "--out", out, "--precision", "fp8").code == 2
    assert time.monotonic() - started < 1
