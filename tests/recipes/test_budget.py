"""Pruning to a budget, from settings to a checkpoint with its record; on OpenVINO itself, and no speed is asserted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.errors import BackendUnavailable, UsageError
from limbeck.exporters.settings import ExportSettings
from limbeck.files import files_below, write_json
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.data import Data
from limbeck.models.importance import Calibration
from limbeck.models.shapes import shapes_of
from limbeck.prune.budget_settings import Budget
from limbeck.prune.costs import counted_flops
from limbeck.prune.settings import PruneSettings
from limbeck.recipes import budget as module
from limbeck.recipes import latency_table
from limbeck.recipes.budget import prune_to_budget, storage_of
from limbeck.recipes.latency_table import LatencyTable, Point, Target, dependencies
from limbeck.recipes.progress import Progress
from limbeck.recipes.steps import export
from limbeck.validate.performance.latency import BenchSettings

TinyCheckpoint = Callable[..., Path]
WriteRows = Callable[[Path, Iterable[dict[str, Any]]], Path]


@pytest.fixture(scope="module")
def rows(texts: list[str], write_jsonl: WriteRows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"text": text} for text in texts[:16]])


def budget_of(**values: Any) -> PruneSettings:
    return PruneSettings(budget=Budget(**values), batch_size=8)


def tiny(tiny_checkpoint: TinyCheckpoint, rows: Path, family: str = "bert") -> tuple[Checkpoint, Data]:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    return checkpoint, checkpoint.read(rows)


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert", "llama", "gpt2"])
def test_a_budget_in_flops_is_kept(family: str, tiny_checkpoint: TinyCheckpoint, rows: Path, tmp_path: Path) -> None:
    checkpoint, data = tiny(tiny_checkpoint, rows, family)
    before = hash_of_model(checkpoint.model)
    result = prune_to_budget(checkpoint, budget_of(flops=0.7, sequence_length=32), data, rationale="small")
    assert counted_flops(result, 32) <= 0.7 * counted_flops(checkpoint, 32)
    assert hash_of_model(checkpoint.model) == before
    result.save(tmp_path / "small")
    loaded = load_checkpoint(tmp_path / "small")
    step = loaded.lineage.steps[-1]
    found = step.settings["found"]
    assert (step.verb, step.method, step.rationale) == ("prune", "budget flops by fisher", "small")
    assert step.data is not None and step.data.rows == 16
    assert step.settings["budget"]["flops"] == 0.7
    sizes = [(each["heads"], each["key_value_heads"], each["ffn"]) for each in found["layers"]]
    assert sizes == [(each.heads, each.key_value_heads, each.ffn) for each in shapes_of(loaded.model).layers]
    assert found["predicted"] == pytest.approx(counted_flops(result, 32) / counted_flops(checkpoint, 32), abs=1e-5)
    assert 0 < found["importance_kept"] < 1
    kept = {each["layer"] for each in found["layers"]}
    after = {int(each.layer.rsplit(".", 1)[1]): each.after for each in step.widths if each.unit == "channels"}
    assert {layer for layer, width in after.items() if width} == kept and set(after) == {0, 1}


def test_the_choice_whose_answers_are_nearest_to_the_whole_models_is_taken(
    tiny_checkpoint: TinyCheckpoint, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, data = tiny(tiny_checkpoint, rows)
    compared: list[list[Checkpoint]] = []

    def the_last_is_nearest(whole: Checkpoint, others: list[Checkpoint], looked_at: Calibration) -> list[float]:
        assert whole is checkpoint and len(looked_at.examples) == 3  # a fifth of 16
        compared.append(others)
        return [float(len(others) - place) for place in range(len(others))]

    monkeypatch.setattr(module, "distances", the_last_is_nearest)
    monkeypatch.setattr(module, "ROUNDS", 1)
    result = prune_to_budget(checkpoint, budget_of(flops=0.7, sequence_length=32), data)
    hashes = [hash_of_model(other.model) for other in compared[-1]]
    assert len(set(hashes)) == len(hashes) > 1 and result.hash == hashes[-1]


@pytest.mark.thorough
def test_a_budget_in_megabytes_is_the_size_of_the_exported_weights(
    tiny_checkpoint: TinyCheckpoint, rows: Path, tmp_path: Path
) -> None:
    checkpoint, data = tiny(tiny_checkpoint, rows)
    limit = 0.8 * checkpoint.parameters * 2 / 1e6
    result = prune_to_budget(checkpoint, budget_of(size_mb=limit, backend="openvino", precision="fp16"), data)
    assert result.parameters < checkpoint.parameters
    export(result, ExportSettings(backend="openvino", precision="fp16"), tmp_path / "artifact")
    weights = (tmp_path / "artifact" / "openvino_model.bin").stat().st_size / 1e6
    assert result.lineage.steps[-1].settings["found"]["predicted"] == pytest.approx(weights, rel=0.02)


def test_bfloat16_lies_on_disk_as_the_backend_writes_it() -> None:
    assert storage_of(Budget(size_mb=1, precision="bf16", backend="openvino")).matrix == 4
    assert storage_of(Budget(size_mb=1, precision="bf16", backend="tensorrt")).matrix == 2
    assert storage_of(Budget(size_mb=1)).matrix == 4
    assert storage_of(Budget(size_mb=1, precision="int8")).vector == 4


def test_protected_layers_are_left_whole(tiny_checkpoint: TinyCheckpoint, rows: Path) -> None:
    checkpoint, data = tiny(tiny_checkpoint, rows)
    result = prune_to_budget(checkpoint, budget_of(flops=0.6, sequence_length=32, protect=[0]), data)
    assert shapes_of(result.model).layers[0] == shapes_of(checkpoint.model).layers[0]
    with pytest.raises(UsageError, match="layer 7 cannot be protected"):
        prune_to_budget(checkpoint, budget_of(flops=0.6, protect=[7]), data)


def test_what_is_within_the_budget_comes_back_whole(tiny_checkpoint: TinyCheckpoint, rows: Path) -> None:
    checkpoint, data = tiny(tiny_checkpoint, rows)
    result = prune_to_budget(checkpoint, budget_of(size_mb=10), data)
    assert result.parameters == checkpoint.parameters
    assert "nothing was cut" in str(result.lineage.steps[-1].note)


def test_what_cannot_be_done_is_said(
    tiny_checkpoint: TinyCheckpoint, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, data = tiny(tiny_checkpoint, rows)
    with pytest.raises(UsageError, match=r"budget of 0.001 cannot be reached: the least that is possible is 0\.\d+"):
        prune_to_budget(checkpoint, budget_of(size_mb=0.001), data)
    with pytest.raises(UsageError, match="looks at examples, and there are none"):
        prune_to_budget(checkpoint, budget_of(size_mb=0.05))
    with pytest.raises(UsageError, match="no method 'magnitude' for a budget; valid are taylor, fisher"):
        PruneSettings(budget=Budget(size_mb=0.05), method="magnitude")
    with pytest.raises(UsageError, match="takes 64 tokens; its FLOPs cannot be counted at 128"):
        prune_to_budget(checkpoint, budget_of(flops=0.5), data)
    with pytest.raises(UsageError, match="no budget in these settings"):
        prune_to_budget(checkpoint, PruneSettings(structure="ffn", keep=0.5), data)
    monkeypatch.setattr("limbeck.backends.tensorrt.gpu_facts", list)
    with pytest.raises(BackendUnavailable, match="tensorrt cannot run here"):
        prune_to_budget(checkpoint, budget_of(latency_ms=1.0, backend="tensorrt"), data)
    with torch.no_grad():
        next(checkpoint.model.parameters()).fill_(float("nan"))
    with pytest.raises(Exception, match="holds NaN"):
        prune_to_budget(checkpoint, budget_of(size_mb=0.05), data)


class Said(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, done: int, total: int) -> None:
        return


def table_of(checkpoint: Checkpoint, target: Target, cache: Path) -> LatencyTable:
    """A table that lies in the cache as if it had been measured: 10 ms, of which the two layers are 2."""
    of = dependencies(checkpoint, target)
    table = LatencyTable(
        key=latency_table.sha256_of_json(of), of=of, dense_ms=10.0, layer_ms=1.0, rest_ms=8.0, measured="2026-01-01",
        heads=[Point(size=1, ms=0.7), Point(size=4, ms=1.0)], ffn=[Point(size=32, ms=0.7), Point(size=64, ms=1.0)],
    )  # fmt: skip
    write_json(cache / f"latency-{table.key[:24]}.json", table.model_dump(mode="json"))
    return table


def test_a_budget_in_latency_is_searched_compiled_timed_and_recorded(
    tiny_checkpoint: TinyCheckpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"rounds": 3, "seconds_per_round": 0.01, "warm_up_seconds": 0.1}  # no speed is looked at
    at_length = Target.of
    monkeypatch.setattr(Target, "of", lambda budget: replace(at_length(budget), bench=BenchSettings(
        **{**at_length(budget).bench.model_dump(), **short})))  # fmt: skip
    monkeypatch.setattr(module, "_ATTEMPTS", 1)
    checkpoint, data = tiny(tiny_checkpoint, rows)
    settings = budget_of(latency_ms=8.5, backend="openvino", sequence_length=16, threads=1)
    assert settings.budget is not None
    table, said = table_of(checkpoint, Target.of(settings.budget), tmp_path), Said()
    result = prune_to_budget(checkpoint, settings, data, cache=tmp_path, progress=said)

    found = result.lineage.steps[-1].settings["found"]
    assert result.parameters < checkpoint.parameters
    assert found["whole"] == 10.0 and found["measured"] > 0
    assert found["latency_table"] == table.key and found["measured_on"]["backend"] == "openvino"
    assert len(found["layers"]) == len(shapes_of(result.model).layers)
    assert "latency table: measured before" in said.lines
    checks = [line for line in said.lines if line.startswith("checking a choice")]
    assert found["attempts"] == len(checks) == 1
    assert said.lines.count("compiling dense") == 1 and said.lines.count("compiling chosen") == len(checks)
    assert "the compiled result was measured" in str(result.lineage.steps[-1].note)
    assert [path.name for path in files_below(tmp_path)] == [f"latency-{table.key[:24]}.json"]


class Clock:
    """Stands in for the bench alone: the table's costs, off by a constant."""

    def __init__(self, table: LatencyTable, off: float) -> None:
        self.table, self.off, self.seen = table, off, list[int]()

    def time(self, timing: Any, others: Iterable[tuple[str, Checkpoint]]) -> tuple[float, dict[str, float]]:
        ((name, cut),) = others
        self.seen.append(cut.parameters)
        shapes = dict(enumerate(shapes_of(cut.model).layers))
        return 20.0, {name: 2 * (self.table.costs(2).of(shapes) + self.off)}  # a machine at half its speed


@pytest.mark.parametrize("off", [0.0, 0.8, -0.8, 5.0])
def test_what_was_measured_corrects_the_next_choice(
    off: float, tiny_checkpoint: TinyCheckpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, data = tiny(tiny_checkpoint, rows)
    settings = budget_of(latency_ms=9.2, backend="openvino", sequence_length=16, threads=1)
    assert settings.budget is not None
    clock = Clock(table_of(checkpoint, Target.of(settings.budget), tmp_path), off)
    monkeypatch.setattr(latency_table.SideBySide, "time", lambda self, others: clock.time(self, others))
    result = prune_to_budget(checkpoint, settings, data, cache=tmp_path)
    found, note = result.lineage.steps[-1].settings["found"], str(result.lineage.steps[-1].note)
    assert "the whole model took 20 ms this time" in note
    shapes = dict(enumerate(shapes_of(result.model).layers))
    assert found["measured"] == pytest.approx(clock.table.costs(2).of(shapes) + off, abs=1e-5)
    if off == 0.0:
        assert found["attempts"] == 1 and found["measured"] <= 9.2
    if off == 0.8:
        assert found["attempts"] > 1 and found["measured"] <= 9.2 * 1.05 and clock.seen[1] < clock.seen[0]
    if off == 5.0:
        assert "NOT reached" in note and found["measured"] > 9.2 and result.parameters == min(clock.seen)
