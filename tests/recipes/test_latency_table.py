"""The table of measured costs: what it is made of, when it is measured and when it is read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.environment import cache_folder
from limbeck.errors import BackendUnavailable, UsageError
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.embedding import Pooling
from limbeck.models.shapes import LayerShape
from limbeck.models.surgery import Selection, select
from limbeck.prune.budget_settings import Budget
from limbeck.recipes import latency_table as module
from limbeck.recipes.latency_table import LatencyTable, Point, SideBySide, Target, dependencies
from limbeck.recipes.progress import Progress
from limbeck.validate.performance.latency import BenchSettings

TinyCheckpoint = Callable[..., Path]
Measured = tuple[LatencyTable, Path, list[str]]


class Said(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, done: int, total: int) -> None:
        return


def quick(budget: Budget) -> Target:
    """The budget's target with as little timing as there can be."""
    short = {"rounds": 3, "seconds_per_round": 0.01, "warm_up_seconds": 0.1}
    target = Target.of(budget)
    return Target(target.export, BenchSettings(**{**target.bench.model_dump(), **short}))


BUDGET = Budget(latency_ms=1.0, backend="openvino", sequence_length=16, threads=1)


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    """With one layer, so that there is less to compile."""
    whole = load_checkpoint(tiny_checkpoint("llama", "text-generation"))
    return replace(whole, model=select(whole.model, Selection(layers=[0])))


@pytest.fixture(scope="module")
def measured(llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A table of the tiny Llama on OpenVINO, its cache and what was said on the way."""
    cache, said = tmp_path_factory.mktemp("cache"), Said()
    with SideBySide(llama, quick(BUDGET), progress=said) as timing:
        table = module.latency_table(timing, cache)
    return table, cache, said.lines


@pytest.mark.thorough
def test_a_table_is_measured_on_models_of_each_size(measured: Measured) -> None:
    table, _, said = measured
    compiled = [line.removeprefix("compiling ") for line in said if line.startswith("compiling")]
    assert compiled == ["dense", "2 heads", "32 ffn"]
    assert [point.size for point in table.heads] == [2, 4] and [point.size for point in table.ffn] == [32, 64]
    assert table.heads[-1].ms == table.ffn[-1].ms == table.layer_ms
    assert table.dense_ms > 0
    assert table.layer_ms + table.rest_ms == pytest.approx(table.dense_ms)
    assert table.of["backend"] == "openvino" and table.of["shape"]["ffn"] == 64


@pytest.mark.thorough
def test_what_was_measured_is_read_and_not_measured_again(llama: Checkpoint, measured: Measured) -> None:
    table, cache, _ = measured
    said = Said()
    with SideBySide(llama, quick(BUDGET), progress=said) as timing:
        assert module.latency_table(timing, cache) == table
    assert said.lines == ["latency table: measured before"]


def test_a_broken_table_is_measured_again(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Measuring(Exception):
        pass

    def stop(*_: object) -> None:
        raise Measuring

    monkeypatch.setattr(module, "_measured", stop)
    for file in ("", "{}", '{"schema_version": 1}'):
        key = module.sha256_of_json(dependencies(llama, quick(BUDGET)))
        (tmp_path / f"latency-{key[:24]}.json").write_text(file, encoding="utf-8")
        with SideBySide(llama, quick(BUDGET)) as timing, pytest.raises(Measuring):
            module.latency_table(timing, tmp_path)


def test_a_table_is_of_one_device_version_shape_and_batch(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(checkpoint: Checkpoint = llama, **changes: object) -> str:
        return module.sha256_of_json(dependencies(checkpoint, quick(BUDGET.model_copy(update=changes))))

    cut = select(llama.model, Selection(ffn=[torch.arange(32)]))
    keys = [
        key(),
        key(backend="onnx"),
        key(precision="bf16"),
        key(batch_size=2),
        key(sequence_length=8),
        key(threads=2),
        key(replace(llama, model=cut)),
        key(replace(llama, pooling=Pooling(normalize=False))),
    ]
    newer = {**module.versions(), "openvino": "9999.1"}
    with monkeypatch.context() as patched:
        patched.setattr(module, "versions", lambda: newer)
        keys.append(key())
    with monkeypatch.context() as patched:
        patched.setattr(module, "cpu_facts", lambda: {"name": "another", "memory_bytes": 1})
        keys.append(key())
    assert len(set(keys)) == len(keys)
    with torch.no_grad():
        other = select(llama.model, Selection())
        other.get_input_embeddings().weight.add_(1.0)
    assert key(replace(llama, model=other)) == key()  # weights change nothing


@given(
    ms=st.lists(st.integers(0, 100).map(lambda tenths: tenths / 10), min_size=2, max_size=6),
    sizes=st.lists(st.integers(1, 512), min_size=6, max_size=6, unique=True).map(sorted),
)
def test_costs_rise_with_size_and_pass_through_what_was_measured(ms: list[float], sizes: list[int]) -> None:
    points = [Point(size=size, ms=value) for size, value in zip(sizes, ms, strict=False)]
    rising = [Point(size=size, ms=value) for size, value in zip(sizes, sorted(ms), strict=False)]
    for measured in (points, rising):
        whole = measured[-1]
        table = LatencyTable(
            key="", of={}, dense_ms=50, layer_ms=whole.ms, rest_ms=1, measured="", ffn=measured,
            heads=[Point(size=4, ms=whole.ms)],
        )  # fmt: skip
        layer = table.costs(depth=3).layers[0]
        found = [layer.ffn(size) for size in range(measured[0].size, whole.size + 1)]
        assert all(after >= before - 1e-9 for before, after in itertools.pairwise(found))
    for point in rising:
        shape = LayerShape(heads=4, key_value_heads=4, ffn=point.size)
        assert layer.of(shape) == pytest.approx(point.ms, abs=1e-6)


def test_whole_models_cost_what_was_measured() -> None:
    table = LatencyTable(
        key="", of={}, dense_ms=10.0, layer_ms=1.5, rest_ms=1.0, measured="",
        heads=[Point(size=1, ms=1.1), Point(size=4, ms=1.5)],
        ffn=[Point(size=32, ms=0.9), Point(size=64, ms=1.5)],
    )  # fmt: skip
    costs = table.costs(depth=6)
    whole, few = LayerShape(heads=4, key_value_heads=4, ffn=64), LayerShape(heads=1, key_value_heads=1, ffn=32)
    assert costs.of(dict.fromkeys(range(6), whole)) == pytest.approx(10.0)
    assert costs.of(dict.fromkeys(range(3), whole)) == pytest.approx(5.5)
    assert costs.of({0: few}) == pytest.approx(1.0 + 1.5 - 0.4 - 0.6)


def test_a_longer_sequence_than_the_model_has_positions_for_is_refused(llama: Checkpoint, tmp_path: Path) -> None:
    target = quick(BUDGET.model_copy(update={"sequence_length": 65}))
    with (
        SideBySide(llama, target) as timing,
        pytest.raises(UsageError, match="takes 64 tokens; it cannot be timed at 65"),
    ):
        module.latency_table(timing, tmp_path)


def test_layers_of_different_sizes_have_no_table(
    llama: Checkpoint, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    whole = load_checkpoint(tiny_checkpoint("bert")).model
    uneven = select(whole, Selection(ffn=[torch.arange(64), torch.arange(32)]))
    with (
        SideBySide(replace(llama, model=uneven), quick(BUDGET)) as timing,
        pytest.raises(UsageError, match="differ in size"),
    ):
        module.latency_table(timing, tmp_path)


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.backends.tensorrt.gpu_facts", list)
    with pytest.raises(BackendUnavailable, match=r"the backend tensorrt cannot run here: .*there is no NVIDIA GPU"):
        Target.of(Budget(latency_ms=1.0, backend="tensorrt"))
    with pytest.raises(UsageError, match="no backend 'openvin'"):
        Target.of(Budget(latency_ms=1.0, backend="openvin"))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LIMBECK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "limbeck"
