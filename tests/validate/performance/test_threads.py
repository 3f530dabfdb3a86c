"""Runtimes that do not use the threads that they were told, found on real ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from limbeck.environment import available_cpus, cpus_to_pin
from limbeck.exporters.artifact import read_manifest, seal
from limbeck.validate.performance.latency import BenchResult, BenchSettings, BenchSubject, bench
from limbeck.validate.performance.threads import check_threads

QUICK = BenchSettings(
    batch_size=1, sequence_length=8, rounds=1, seconds_per_round=0.01, warm_up_seconds=0.0, min_calls_per_round=1
)


def timed(folder: Path, settings: BenchSettings) -> BenchResult:
    return bench([BenchSubject(name="tiny", path=folder, kind="artifact")], settings)[0]


@pytest.fixture(scope="module")
def result(artifact: Path) -> BenchResult:
    return timed(artifact, QUICK)


def test_a_runtime_that_does_as_it_was_told_passes_and_says_so(result: BenchResult) -> None:
    check = check_threads(result)
    assert check is not None and check.passed
    assert check.detail.startswith(f"the runtime says {available_cpus()} thread")
    assert "one for each CPU available" in check.detail and "CPUs were busy" in check.detail


def test_a_runtime_without_a_number_of_threads_is_not_judged(result: BenchResult) -> None:
    assert check_threads(replace(result, properties={"runtime": "tensorrt 11", "device": "a GPU"})) is None


@pytest.mark.thorough
def test_a_runtime_that_uses_fewer_threads_than_there_are_cpus_is_named(openvino_artifact: Path) -> None:
    """OpenVINO takes no more threads than there are CPUs, whatever it is told."""
    asked = 4 * available_cpus()
    check = check_threads(timed(openvino_artifact, QUICK.model_copy(update={"threads": asked})))
    assert check is not None and not check.passed
    assert f"and {asked} were asked for: only {available_cpus()} CPU" in check.detail


def test_a_graph_that_sets_its_own_threads_is_named(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted before the manifest is written; ONNX Runtime reads it where the environment lets it."""
    slow = tmp_path / "slow"
    shutil.copytree(artifact, slow)
    graph = onnx.load(slow / "model.onnx", load_external_data=False)
    onnx.helper.set_model_props(graph, {"ort_config": json.dumps({"session_options": {"intra_op_num_threads": 1}})})
    onnx.save(graph, slow / "model.onnx")
    seal(read_manifest(slow), slow)
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    check = check_threads(timed(slow, QUICK.model_copy(update={"threads": 2})))
    assert check is not None and not check.passed
    assert check.detail.startswith("the runtime says 1 thread and 2 were asked for: the graph sets it")


def test_more_threads_than_cpus_are_named(result: BenchResult) -> None:
    """ONNX Runtime takes as many as it is told, and they take turns."""
    asked = available_cpus() + 1
    settings = result.settings.model_copy(update={"threads": asked})
    check = check_threads(replace(result, settings=settings, properties={**result.properties, "threads": str(asked)}))
    assert check is not None and not check.passed
    assert f"{asked} threads take turns on {available_cpus()} CPU" in check.detail


def test_one_thread_a_core_is_enough(result: BenchResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenVINO has it on CPUs that share cores: 8 threads on 8 cores of 16 CPUs."""
    monkeypatch.setattr("limbeck.validate.performance.threads.available_cpus", lambda: 16)
    monkeypatch.setattr("limbeck.validate.performance.threads.available_cores", lambda: 8)
    settings = result.settings.model_copy(update={"threads": 16})
    for told, passed in ((8, True), (7, False)):
        found = {**result.properties, "threads": str(told)}
        check = check_threads(replace(result, settings=settings, properties=found))
        assert check is not None and check.passed is passed


def test_an_unknown_setting_is_said_to_be_in_the_program(result: BenchResult) -> None:
    told = {**result.properties, "threads": "0"}
    check = check_threads(replace(result, properties=told))
    assert check is not None and not check.passed
    assert "a setting in the program or its backend overrules" in check.detail


def test_pinned_cpus_are_as_many_as_threads_as_far_as_there_are() -> None:
    assert len(cpus_to_pin(1)) == 1
    assert len(cpus_to_pin(10_000)) == available_cpus()
    assert set(cpus_to_pin(1)) <= set(cpus_to_pin(10_000))
