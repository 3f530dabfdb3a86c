"""What goes with a program, and around it: tokenizer, labels, lengths, files, rows, threads, the teacher itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from limbeck.environment import available_cpus
from limbeck.models.checkpoint import load_checkpoint

Bench = Any


def edited(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A JSON file of the artifact, changed."""

    def plant(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return plant


def test_the_tokenizer_of_another_model(bench: Bench, tiny_checkpoint: Any) -> None:
    def plant(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_checkpoint("roberta") / name, folder / name)

    bench.assert_caught(bench.planted("onnx", "fp32", plant), "tokenizer", "it has another vocabulary")


def test_lower_casing_that_is_lost(bench: Bench) -> None:
    plant = edited("tokenizer.json", lambda value: value["normalizer"].update(lowercase=False))
    bench.assert_caught(bench.planted("onnx", "fp32", plant), "tokenizer", "lower-casing is lost", "texts are split")


def test_swapped_label_names(bench: Bench) -> None:
    def change(value: dict[str, Any]) -> None:
        names = value["id2label"]
        names["0"], names["2"] = names["2"], names["0"]

    folder = bench.planted("onnx", "fp32", edited("config.json", change))
    bench.assert_caught(folder, "label names", "the order of the labels is swapped", "0 is 'long' instead of 'short'")


def test_texts_cut_too_early(bench: Bench) -> None:
    folder = bench.planted("onnx", "fp32", max_length=16)
    bench.assert_caught(folder, "truncation", "manifest.json cuts texts at 16 tokens, where the program takes 48")


def test_a_tokenizer_that_cuts_too_early(bench: Bench) -> None:
    plant = edited("tokenizer_config.json", lambda value: value.update(model_max_length=16))
    folder = bench.planted("onnx", "fp32", plant)
    bench.assert_caught(folder, "truncation", "its tokenizer cuts texts at 16 tokens, where the program takes 48")


def test_a_file_that_was_changed(bench: Bench) -> None:
    folder = bench.planted("onnx", "fp32")
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    bench.assert_refused(folder, r"model\.onnx is not the file that was exported")


def test_a_file_that_is_missing(bench: Bench) -> None:
    folder = bench.planted("onnx", "fp32")
    (folder / "model.onnx.data").unlink()
    bench.assert_refused(folder, r"lacks model\.onnx\.data")


def test_rows_that_were_trained_on(bench: Bench) -> None:
    rows = {"data": bench.home.data.row_hashes[:20]}
    folder = bench.planted("onnx", "fp32", lambda folder: (folder / "training_rows.json").write_text(json.dumps(rows)))
    bench.assert_caught(folder, "unseen data", "validation rows were also trained on")


@pytest.mark.parametrize(
    ("backend", "threads"), [("onnx", available_cpus() + 3), pytest.param("openvino", 1, marks=pytest.mark.thorough)]
)
def test_a_slow_thread_setting(
    backend: str, threads: int, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """ONNX Runtime takes more threads than there are CPUs; OpenVINO takes fewer only."""
    if threads == min(available_cpus(), psutil.cpu_count(logical=False) or 1):
        pytest.skip("there is one core only")
    folder = bench.good(backend, "fp32")
    monkeypatch.setattr(f"limbeck.backends.{backend}.available_cpus", lambda: threads)
    bench.assert_caught(folder, "threads", f"a slow thread setting: the runtime has {threads} threads")


def test_a_teacher_that_is_wrong_for_the_task(bench: Bench) -> None:
    wrong = load_checkpoint(bench.home.folder / "untrained")
    folder = bench.good("onnx", "fp32")
    bench.assert_caught(folder, "teacher", "the teacher is no better than chance", teacher=wrong)
