"""Floors of quality, what is said of a slow int8, and `--precision auto`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.backends.onnx import OnnxBackend
from limbeck.backends.openvino import OpenVINORunner
from limbeck.backends.registry import load_runner
from limbeck.errors import ExportMismatch, InputError, UsageError
from limbeck.exporters.artifact import open_artifact
from limbeck.exporters.inputs import probe_batch
from limbeck.exporters.onnx import GRAPH_FILE
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.recipes import exporting, precision_choice
from limbeck.recipes.exporting import export
from limbeck.recipes.precision_choice import export_fastest
from limbeck.recipes.schema import Recipe
from limbeck.validate.performance.speed import medians_in_turn

SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=32, opt_sequence=16)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert", task="text-classification"))


@pytest.fixture(scope="module")
def rows(
    checkpoint: Checkpoint, texts: list[str], write_jsonl: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Data:
    """Texts with the labels that the model itself gives them, so that its accuracy is 1."""
    unlabelled = [{"text": text, "label": 0} for text in texts]
    folder = tmp_path_factory.mktemp("rows")
    data = checkpoint.read(str(write_jsonl(folder / "texts.jsonl", unlabelled)))
    batches = exporting.calibration_batches(checkpoint, data, settings_for("onnx"))
    labels = [int(checkpoint.run(batch)["logits"].argmax()) for batch in batches]
    labelled = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return checkpoint.read(str(write_jsonl(folder / "labelled.jsonl", labelled)))


def settings_for(backend: str, precision: str = "fp32", **more: Any) -> ExportSettings:
    return ExportSettings.model_validate({"backend": backend, "precision": precision, "shapes": SMALL, **more})


def test_what_takes_longer_has_the_larger_median() -> None:
    """The first, before exports leave objects behind: garbage is collected before every round."""

    def work(turns: int) -> Callable[[], object]:
        return lambda: sum(range(turns))

    quick, slow = medians_in_turn([work(2_000), work(200_000)])
    assert slow > 5 * quick


def test_a_program_that_holds_its_floor_says_so(checkpoint: Checkpoint, rows: Data, tmp_path: Path) -> None:
    manifest = export(checkpoint, settings_for("onnx", floor=1.0), tmp_path / "out", validation=rows)
    floor = manifest.checks[-1]
    assert floor.name == "floor" and floor.passed and floor.detail == "accuracy 1 where the floor is 1"
    assert open_artifact(tmp_path / "out").settings.floor == 1.0


def test_a_program_below_its_floor_is_not_written(
    checkpoint: Checkpoint, rows: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flipped = OpenVINORunner.__call__

    def wrong(runner: OpenVINORunner, batch: Any) -> dict[str, np.ndarray]:
        return {name: -values for name, values in flipped(runner, batch).items()}

    monkeypatch.setattr(exporting, "check_parity", lambda *_: exporting.CheckRecord(name="p", passed=True, detail=""))
    monkeypatch.setattr(OpenVINORunner, "__call__", wrong)
    with pytest.raises(ExportMismatch, match=r"openvino fp32 program does not hold the floor: accuracy 0\.?\d* where"):
        export(checkpoint, settings_for("openvino", floor=0.9), tmp_path / "out", validation=rows)
    assert list(tmp_path.iterdir()) == []


def test_a_floor_needs_rows_to_be_measured_on(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="floor of quality") as caught:
        export(checkpoint, settings_for("onnx", floor=0.9), tmp_path / "out")
    assert caught.value.hint == "Add --validation FILE."


def test_a_perplexity_may_rise_to_the_floor(
    tiny_checkpoint: Callable[..., Path], texts: list[str], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_checkpoint(tiny_checkpoint("gpt2", task="text-generation"))
    data = model.read(str(write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])))
    floor = exporting.measure_floor(model, data, settings_for("onnx", floor=0.5))
    assert floor is not None and floor.metric == "perplexity"
    assert floor.measure(model.run) == pytest.approx(floor.least / 2) and floor.least < 0


def test_real_rows_are_cut_and_padded_to_what_the_program_takes(
    checkpoint: Checkpoint, rows: Data, tmp_path: Path
) -> None:
    shapes = {"min_batch": 2, "max_batch": 2, "min_sequence": 9, "max_sequence": 9}
    settings = ExportSettings.model_validate(
        {"backend": "openvino", "precision": "int8", "shapes": shapes, "floor": 0.4}
    )
    manifest = export(checkpoint, settings, tmp_path / "out", calibration=rows, validation=rows, beside_float=False)
    assert [check.name for check in manifest.checks] == ["parity", "weight audit", "floor"]
    assert manifest.evidence["accuracy control"]["metric"] == "accuracy"
    runner, _ = load_runner(tmp_path / "out", threads=1)
    with pytest.raises(InputError, match="cannot be timed at 1 x 9 tokens: it takes batches of 2 to 2"):
        runner.prepare(probe_batch(checkpoint, 1, 9))
    assert callable(runner.prepare(probe_batch(checkpoint, 2, 9)))


@pytest.mark.thorough
def test_a_quantised_program_that_is_slower_than_float_says_so(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "medians_in_turn", lambda calls: [3.0, 2.0])
    manifest = export(checkpoint, settings_for("onnx", "int8-weight-only"), tmp_path / "slow")
    assert manifest.caveats == [
        "int8-weight-only takes 1.5 times as long as fp32 on this machine (3 ms for 2 ms at 2 x 16 tokens)"
    ]
    assert "takes 1.5 times as long as fp32" in (tmp_path / "slow" / "README.md").read_text()


@pytest.mark.thorough
def test_an_int8_that_was_calibrated_on_next_to_nothing_says_that_alone(
    checkpoint: Checkpoint, rows: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "medians_in_turn", lambda calls: [2.0, 2.0])
    few = settings_for("onnx", "int8", calibration_samples=3)
    manifest = export(checkpoint, few, tmp_path / "out", calibration=rows)
    assert manifest.caveats == ["int8 was calibrated on 3 rows; a few hundred are usual"]


def test_the_fastest_that_holds_is_kept(
    checkpoint: Checkpoint, rows: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxBackend, "precisions", ("fp32", "bf16", "int8"))
    manifest = export_fastest(
        checkpoint, settings_for("onnx", floor=0.5), tmp_path / "out", calibration=rows, validation=rows
    )
    tried = {attempt["precision"]: attempt for attempt in manifest.evidence["precision auto"]}
    assert {*tried} == {"fp32", "bf16", "int8"}
    assert tried["bf16"]["outcome"] == "not what runs here: its float32 twin does" and "p50_ms" not in tried["bf16"]
    chosen = [name for name, attempt in tried.items() if attempt["outcome"] == "chosen"]
    assert chosen == [manifest.settings.precision]
    assert tried["fp32"]["speedup"] == 1.0
    if chosen != ["fp32"]:
        assert tried[chosen[0]]["speedup_low"] > 1.0
    assert open_artifact(tmp_path / "out") == manifest  # sealed anew, and whole
    runner, _ = load_runner(tmp_path / "out", threads=1)
    batch = probe_batch(checkpoint, 3, 9)
    assert runner(batch)["logits"].shape == (3, 3)


def test_what_auto_needs_is_said_before_any_work(checkpoint: Checkpoint, rows: Data, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="measure quality"):
        export_fastest(checkpoint, settings_for("onnx"), tmp_path / "out")
    with pytest.raises(UsageError, match="those of tensorrt are built elsewhere"):
        export_fastest(checkpoint, settings_for("tensorrt"), tmp_path / "out", validation=rows)


def test_no_precision_that_holds_leaves_nothing(
    checkpoint: Checkpoint, rows: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InputError("it cannot be")

    monkeypatch.setattr(precision_choice, "export_checked", refuse)
    with pytest.raises(ExportMismatch, match=r"fp32: it cannot be; .*int8: no --calibration was given"):
        export_fastest(checkpoint, settings_for("onnx"), tmp_path / "out", validation=rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_a_compile_cache_is_kept_for_each_artifact(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    batch = probe_batch(checkpoint, 2, 7)
    manifest = export(checkpoint, settings_for("openvino", options={"compile_cache": True}), tmp_path / "out")
    assert not (tmp_path / "cache").exists()  # what is checked is compiled from what was written
    for _ in range(2):
        runner, _ = load_runner(tmp_path / "out", threads=1)
        np.testing.assert_allclose(runner(batch)["logits"], checkpoint.run(batch)["logits"], atol=1e-4)
    (kept,) = (tmp_path / "cache" / "openvino").iterdir()
    assert kept.name == manifest.artifact_id and list(kept.iterdir())


def test_the_opset_is_what_was_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import onnx

    export(checkpoint, settings_for("onnx", options={"opset": 18}), tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / GRAPH_FILE, load_external_data=False)
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 18


def test_a_recipe_that_chooses_by_quality_needs_rows_of_its_own() -> None:
    recipe = {
        "name": "one", "teacher": "t", "task": "text-classification", "data": {"train": "a", "validation": "b"},
        "stages": [{"name": "s", "prune": {"structure": "ffn", "keep": 0.5}}],
        "exports": [{"name": "e", "start": "s", "backend": "onnx", "precision": "auto"}],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"the export e is held to a floor, so it needs data\.development"):
        Recipe.model_validate(recipe)
    recipe["data"]["development"] = "c"  # type: ignore[index]
    assert Recipe.model_validate(recipe).exports[0].settings().precision == "fp32"
