"""MLPerf's scenarios on a real artifact, in processes of their own; and the search for the highest rate."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.errors import UsageError
from limbeck.validate.gates.applying import Gate, apply_gates
from limbeck.validate.performance.latency import BenchSettings, BenchSubject
from limbeck.validate.performance.loadgen_log import Outcome
from limbeck.validate.performance.metrics import with_scenarios
from limbeck.validate.performance.scenarios import ScenarioSettings, run_scenarios, search
from limbeck.validate.performance.worker_process import WorkerDied
from limbeck.validate.performance.writing import TextShape
from limbeck.validate.records.performance import Scenario
from limbeck.validate.records.report import Candidate, Report

Children = Callable[[], set[int]]
TIMING = BenchSettings(batch_size=2, sequence_length=8, threads=1, warm_up_seconds=0.2)
ALL = ScenarioSettings(
    scenario=("single_stream", "multi_stream", "offline", "server"), duration=0.3, target_qps=20, latency_bound_ms=5_000
)


@pytest.fixture(scope="module")
def scenarios(artifact: Path) -> tuple[list[Scenario], list[str]]:
    """Every scenario once, and what was said meanwhile."""
    said: list[str] = []
    subject = BenchSubject(name="tiny", path=artifact, kind="artifact")
    return run_scenarios(subject, ALL, TIMING, said.append), said


@pytest.mark.thorough
def test_every_scenario_comes_with_what_was_asked(scenarios: tuple[list[Scenario], list[str]]) -> None:
    found, said = scenarios
    assert [each.name for each in found] == list(ALL.scenario)
    assert said == ["single stream on tiny", "multi stream on tiny", "offline on tiny", "server on tiny"]
    for each in found:
        assert (each.batch_size, each.sequence_length, each.threads, each.duration_seconds) == (2, 8, 1, 0.3)
        assert each.samples_per_second > 0 and each.queries > 0
        assert (each.target_qps, each.latency_bound_ms) == ((20, 5_000) if each.name == "server" else (None, None))
        assert not each.searched


@pytest.mark.thorough
def test_their_figures_are_metrics(scenarios: tuple[list[Scenario], list[str]]) -> None:
    bare = Candidate(name="tiny", kind="artifact", backend="onnx", precision="fp32", path="tiny")
    candidate = with_scenarios(bare, scenarios[0])
    assert [metric.name for metric in candidate.metrics] == [
        "single_stream_p90_ms", "multi_stream_p99_ms", "offline_samples_per_second", "server_p99_ms",
        "server_queries_per_second",
    ]  # fmt: skip
    single, offline = scenarios[0][0], scenarios[0][2]
    assert candidate.metrics[0].value == (single.early_stopping_ms or single.percentiles_ms["90"])
    assert candidate.metrics[2].value == offline.samples_per_second
    assert "20 queries a second" in candidate.metrics[3].description


def test_a_target_beyond_reach_is_refused_with_what_is_reached(artifact: Path) -> None:
    subject = BenchSubject(name="tiny", path=artifact, kind="artifact")
    settings = ScenarioSettings(scenario=("server",), duration=0.3, target_qps=1e7, latency_bound_ms=5)
    with pytest.raises(UsageError, match=r"--target-qps 1e\+07 is more than twice the .* a second"):
        run_scenarios(subject, settings, TIMING)


def test_a_loadgen_that_is_interrupted_is_told_and_leaves_nothing(
    artifact: Path, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once its log has begun."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = children()

    def kill() -> None:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("limbeck-loadgen-*/mlperf_log_detail.txt")) and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(max(children() - before), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    settings = ScenarioSettings(scenario=("offline",), duration=60)
    with pytest.raises(WorkerDied, match=r"measures 'tiny' was ended by SIGKILL.* while asked to scenario"):
        run_scenarios(BenchSubject(name="tiny", path=artifact, kind="artifact"), settings, TIMING)
    killer.join()
    assert list(tmp_path.glob("limbeck-loadgen-*")) == []
    assert children() == before


# --- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_scenarios_of_texts_have_times_of_tokens(tiny_checkpoint: Callable[..., Path]) -> None:
    model = tiny_checkpoint("llama", "text-generation")
    subject = BenchSubject(name="writer", path=model, kind="checkpoint", task="text-generation")
    settings = ScenarioSettings(
        scenario=("single_stream", "offline", "server"), duration=0.3, target_qps=5, ttft_bound_ms=5_000
    )
    texts = TextShape(batch_size=2, prompt_tokens=6, new_tokens=4)
    single, offline, server = run_scenarios(subject, settings, TIMING, texts=texts)
    for each in (single, offline, server):
        assert (each.batch_size, each.sequence_length) == (2, 6)
        assert each.tokens is not None and each.tokens.new_tokens == 4 and each.tokens.per_second > 0
    assert server.tokens is not None and server.tokens.ttft_bound_ms == 5_000 and server.latency_bound_ms is None
    assert single.tokens is not None and single.tokens.ttft_bound_ms is None
    bare = Candidate(name="writer", kind="checkpoint", backend="torch", precision="fp32", path="writer")
    metrics = {metric.name: metric for metric in with_scenarios(bare, [single, offline, server]).metrics}
    assert list(metrics) == [
        "single_stream_ttft_p90_ms", "single_stream_tpot_p90_ms", "single_stream_tokens_per_second",
        "offline_tokens_per_second", "server_ttft_p99_ms", "server_tpot_p99_ms", "server_queries_per_second",
        "server_tokens_per_second",
    ]  # fmt: skip
    assert metrics["server_tpot_p99_ms"].value == server.tokens.tpot_ms["99"]
    assert "at 5 queries a second, batch 2, 4 tokens after prompts of 6" in metrics["server_ttft_p99_ms"].description


# --- settings ------------------------------------------------------------------------------------------------------


def test_a_server_needs_a_bound_and_nothing_else_takes_one() -> None:
    with pytest.raises(UsageError, match="server scenario needs a bound"):
        ScenarioSettings(scenario=("server",), target_qps=5).check(writes=False)
    with pytest.raises(UsageError, match="the server scenario's, which was not asked for"):
        ScenarioSettings(scenario=("offline",), latency_bound_ms=5)


@pytest.mark.parametrize(
    ("fields", "writes", "said"),
    [
        ({"scenario": ("server",)}, True, "needs a bound on its first tokens"),
        ({"scenario": ("server",), "latency_bound_ms": 5}, True, "--latency-bound-ms is for single calls"),
        ({"scenario": ("server",), "latency_bound_ms": 5, "tpot_bound_ms": 5}, False, "is for texts that are written"),
        ({"scenario": ("multi_stream",)}, True, "MultiStream is for queries that are answered at once"),
    ],
)
def test_bounds_and_scenarios_that_are_of_the_other_kind(fields: dict[str, Any], writes: bool, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ScenarioSettings(**fields).check(writes)


def test_a_server_of_texts_needs_one_bound_and_may_have_both() -> None:
    for bounds in ({"ttft_bound_ms": 200}, {"tpot_bound_ms": 20}, {"ttft_bound_ms": 200, "tpot_bound_ms": 20}):
        ScenarioSettings(scenario=("server", "offline"), **bounds).check(writes=True)


# --- search --------------------------------------------------------------------------------------------------------


def outcome(validity: str) -> Outcome:
    fields = {"queries": 500, "samples_per_second": 1.0, "reason": "", "percentiles_ms": {}, "loadgen": "6"}
    return Outcome.model_validate({**fields, "validity": validity, "early_stopping_ms": None})


def test_the_search_closes_in_on_the_highest_valid_rate() -> None:
    said: list[str] = []
    found, rate = search(lambda rate: outcome("valid" if rate <= 70 else "invalid"), 100, said.append)
    assert found.validity == "valid"
    assert 70 - 100 / 2**6 <= rate <= 70
    assert len(said) == 6 and said[0] == "test 1 of 6: 50 queries a second"


def test_a_valid_rate_goes_before_a_higher_one_with_too_few_queries() -> None:
    def test(rate: float) -> Outcome:
        return outcome("invalid" if rate > 70 else "undecided" if rate > 55 else "valid")

    found, rate = search(test, 100)
    assert (found.validity, rate) == ("valid", 50)


def test_where_nothing_is_valid_the_search_says_what_came_nearest() -> None:
    found, rate = search(lambda rate: outcome("invalid" if rate > 70 else "undecided"), 100)
    assert found.validity == "undecided" and 68 < rate <= 70
    found, rate = search(lambda _: outcome("invalid"), 64)
    assert (found.validity, rate) == ("invalid", 1)


# --- gates ---------------------------------------------------------------------------------------------------------


def server(validity: str, **fields: object) -> Report:
    """A report of one server test: p99 of 12 ms against a bound of 10, 200 queries a second."""
    given = {
        "name": "server", "batch_size": 1, "sequence_length": 8, "threads": 1, "duration_seconds": 10, "queries": 2_000,
        "samples_per_second": 200.0, "validity": validity, "reason": "so it is", "percentiles_ms": {"99": 12.0},
        "target_qps": 200, "latency_bound_ms": 10,
    }  # fmt: skip
    bare = Candidate(name="tiny", kind="artifact", backend="onnx", precision="fp32", path="tiny")
    candidate = with_scenarios(bare, [Scenario.model_validate({**given, **fields})])
    return Report(kind="benchmark", title="tiny", created="2026-01-01", command="limbeck", candidates=[candidate])


@pytest.mark.parametrize(
    ("validity", "rate", "latency"),
    [("valid", "pass", "pass"), ("invalid", "fail", "pass"), ("undecided", "inconclusive", "inconclusive")],
)
def test_a_gate_heeds_what_loadgen_says(validity: str, rate: str, latency: str) -> None:
    gates = [Gate(metric="server_queries_per_second", min=100), Gate(metric="server_p99_ms", max=20)]
    results = apply_gates(server(validity), gates)
    assert [result.verdict for result in results] == [rate, latency]
    if validity != "valid":
        assert "so it is" in results[0].reason
    too_much = apply_gates(server(validity), [Gate(metric="server_queries_per_second", min=300)])
    assert too_much[0].verdict == "fail"


def test_two_loads_are_not_compared() -> None:
    gate = Gate(metric="server_p99_ms", relative_to="previous", max=2)
    now = server("valid")
    assert apply_gates(now, [gate], previous=server("valid"))[0].verdict == "pass"
    assert apply_gates(now, [gate], previous=server("valid", target_qps=100))[0].verdict == "inconclusive"
    found = {"searched": True, "target_qps": 150.0}
    assert apply_gates(server("valid", searched=True), [gate], previous=server("valid", **found))[0].verdict == "pass"
