"""Weights that are not the student's: the audit says whose, or what was done to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

Bench = Any
Rewrite = Callable[[Path, dict[str, Callable[[np.ndarray], np.ndarray]]], None]
BACKENDS = pytest.mark.parametrize("backend", ["onnx", pytest.param("openvino", marks=pytest.mark.thorough)])
LAYER = "bert.encoder.layer."


@pytest.fixture
def weights(bench: Bench) -> dict[str, np.ndarray]:
    """The student's, by name."""
    held = load_file(bench.home.folder / "student" / "model.safetensors")
    return {name: tensor.numpy() for name, tensor in held.items()}


@BACKENDS
def test_a_zeroed_head(backend: str, bench: Bench, rewrite_weights: Rewrite) -> None:
    def zeroed(values: np.ndarray) -> np.ndarray:
        values[:, 8:16] = 0  # head 1 of 4, each 8 channels wide
        return values

    def plant(folder: Path) -> None:
        rewrite_weights(folder, {f"{LAYER}2.attention.output.dense.weight": zeroed})

    report = bench.assert_caught(bench.planted(backend, "fp32", plant), "weight audit", "head 1 of layer 2 is zero")
    parity = next(check for check in report.candidates[0].checks if check.name == "parity")
    assert not parity.passed and "head 1 of layer 2 zeroed" in parity.detail


@BACKENDS
def test_swapped_layers(
    backend: str, bench: Bench, rewrite_weights: Rewrite, weights: dict[str, np.ndarray]
) -> None:  # fmt: skip
    changes = {}
    for one, other in ((0, 2), (2, 0)):
        for name in weights:
            if name.startswith(f"{LAYER}{one}."):
                values = weights[name.replace(f"{LAYER}{one}.", f"{LAYER}{other}.")]
                changes[name] = lambda _, values=values: values
    folder = bench.planted(backend, "fp32", lambda folder: rewrite_weights(folder, changes))
    report = bench.assert_caught(folder, "weight audit", "layers 0 and 2 are swapped")
    parity = next(check for check in report.candidates[0].checks if check.name == "parity")
    assert not parity.passed and "layers 0 and 2 swapped" in parity.detail


@BACKENDS
def test_weights_of_an_older_student(backend: str, bench: Bench, rewrite_weights: Rewrite) -> None:
    older = load_file(bench.home.folder / "older" / "model.safetensors")
    changes = {name: lambda _, tensor=tensor: tensor.numpy() for name, tensor in older.items()}
    folder = bench.planted(backend, "fp32", lambda folder: rewrite_weights(folder, changes))
    bench.assert_caught(folder, "weight audit", "not this student's weights but those of older")


@BACKENDS
def test_weights_of_nobody(backend: str, bench: Bench, rewrite_weights: Rewrite, weights: Any) -> None:
    changes = {name: lambda values: values * 1.01 for name, values in weights.items() if values.ndim == 2}
    folder = bench.planted(backend, "fp32", lambda folder: rewrite_weights(folder, changes))
    bench.assert_caught(folder, "weight audit", "these are not this student's weights")


@BACKENDS
def test_weights_rounded_to_bfloat16(backend: str, bench: Bench, rewrite_weights: Rewrite, weights: Any) -> None:
    def rounded(values: np.ndarray) -> np.ndarray:
        return torch.from_numpy(values).bfloat16().float().numpy()

    changes = {name: rounded for name, values in weights.items() if values.ndim == 2}
    folder = bench.planted(backend, "fp32", lambda folder: rewrite_weights(folder, changes))
    bench.assert_caught(folder, "weight audit", "the weights are rounded to bfloat16")


@BACKENDS
def test_nan_on_long_inputs(backend: str, bench: Bench, rewrite_weights: Rewrite) -> None:
    def broken(values: np.ndarray) -> np.ndarray:
        values[40:] = np.nan
        return values

    changes = {"bert.embeddings.position_embeddings.weight": broken}
    folder = bench.planted(backend, "fp32", lambda folder: rewrite_weights(folder, changes))
    bench.assert_caught(folder, "long inputs", "NaN or infinity in texts of 41 tokens and more")


@BACKENDS
def test_exchanged_label_columns(backend: str, bench: Bench, rewrite_weights: Rewrite) -> None:
    def exchanged(values: np.ndarray) -> np.ndarray:
        return values.reshape(3, -1)[[2, 1, 0]].reshape(values.shape)

    changes = {"classifier.weight": exchanged, "classifier.bias": exchanged}
    folder = bench.planted(backend, "fp32", lambda folder: rewrite_weights(folder, changes))
    bench.assert_caught(folder, "label order", "the order of the labels is swapped", "'short' answers for 'long'")
