"""The bench with real workers on real tiny models. What is asserted is behaviour, never speed."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.environment import cpus_to_pin
from limbeck.errors import InputError, IntegrityError, UsageError
from limbeck.exporters.inputs import random_batch
from limbeck.validate.performance.latency import (
    BenchResult,
    BenchSettings,
    BenchSubject,
    bench,
    histogram,
    speedup,
)
from limbeck.validate.performance.worker import peak_memory_mb, timed, warm_up
from limbeck.validate.performance.worker_process import WorkerDied

Children = Callable[[], set[int]]

MODULE = "limbeck.validate.performance.worker"
QUICK = BenchSettings(batch_size=2, sequence_length=8, threads=1, rounds=4, seconds_per_round=0.01, warm_up_seconds=0.5)


@pytest.fixture(autouse=True)
def no_process_is_left_behind(children: Children) -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


@pytest.fixture(scope="module")
def measured(bert: Path, artifact: Path) -> tuple[list[BenchResult], list[str]]:
    """A checkpoint and its artifact, timed once; and what was said meanwhile."""
    said: list[str] = []
    subjects = [
        BenchSubject(name="teacher", path=bert, kind="checkpoint"),
        BenchSubject(name="compiled", path=artifact, kind="artifact"),
    ]
    return bench(subjects, QUICK.model_copy(update={"measure_noise": True}), said.append), said


@pytest.fixture(scope="module")
def results(measured: tuple[list[BenchResult], list[str]]) -> list[BenchResult]:
    return measured[0]


def test_every_subject_is_timed_in_every_round(results: list[BenchResult]) -> None:
    assert [result.subject.name for result in results] == ["teacher", "compiled"]
    for result in results:
        assert result.rounds_ms.shape[0] == 4
        assert result.rounds_ms.shape[1] >= QUICK.min_calls_per_round
        assert (result.rounds_ms > 0).all()
        assert result.properties["threads"] == "1"
    assert "eager" in results[0].properties["runtime"]
    assert results[1].properties["runtime"].startswith("onnxruntime")


def test_progress_says_what_is_being_done(measured: tuple[list[BenchResult], list[str]]) -> None:
    said = measured[1]
    assert said[0] == "loading teacher"
    assert "warming up compiled" in said
    assert said[-1] == "round 4 of 4"


def test_the_first_answer_and_the_memory_come_back(results: list[BenchResult]) -> None:
    for result in results:
        assert result.cold_start_ms > np.median(result.samples_ms)
        assert result.private_memory_mb is not None and result.program_memory_mb is not None
        assert 0 < result.program_memory_mb < result.private_memory_mb < result.peak_memory_mb
        assert result.warm_up_calls >= 5


def test_a_worker_that_waits_does_not_spin(results: list[BenchResult]) -> None:
    assert max(result.idle_cpu_share for result in results) < 0.5


def test_the_first_subject_is_compared_with_itself_for_noise(results: list[BenchResult]) -> None:
    first, second = results
    assert first.noise is not None and second.noise is None
    assert first.noise.low is not None and first.noise.high is not None
    assert first.noise.low <= first.noise.ratio <= first.noise.high
    assert (first.noise.subject, first.noise.rounds) == ("teacher", 4)


def test_every_subject_is_bound_to_the_same_cpus(results: list[BenchResult]) -> None:
    """With one thread to one CPU, as the workers' system reads it back; and that CPU was busy."""
    assert [result.cpus for result in results] == [cpus_to_pin(1)] * 2
    assert len(results[0].cpus) == 1
    assert results[0].latency().cpus == results[0].cpus
    assert all(0 < result.busy_cpus <= 1.2 for result in results)


def test_energy_is_measured_or_the_reason_is_told(results: list[BenchResult]) -> None:
    for result in results:
        assert (result.energy_mj is None) == (result.meter is None) == (result.no_meter is not None)


def test_the_reports_record_holds_what_was_measured(results: list[BenchResult]) -> None:
    teacher, compiled = results
    record = compiled.latency(baseline=teacher)
    assert (record.batch_size, record.sequence_length, record.threads, record.rounds) == (2, 8, 1, 4)
    assert record.samples == compiled.samples_ms.size
    assert record.p50_ms <= record.p90_ms <= record.p99_ms <= compiled.samples_ms.max()
    assert record.speedup == pytest.approx(np.median(teacher.samples_ms) / np.median(compiled.samples_ms))
    assert record.speedup_low is not None and record.speedup_high is not None
    assert record.speedup_low <= record.speedup <= record.speedup_high
    assert teacher.latency().speedup is None
    assert json.loads(record.model_dump_json())["properties"]["threads"] == "1"


def test_a_result_against_itself_is_exactly_one(results: list[BenchResult]) -> None:
    ratio = speedup(results[0], results[0])
    assert (ratio.low, ratio.point, ratio.high) == (1.0, 1.0, 1.0)


def test_two_rounds_are_too_few_for_an_interval(results: list[BenchResult]) -> None:
    teacher, compiled = (replace(result, rounds_ms=result.rounds_ms[:2]) for result in results)
    ratio = speedup(teacher, compiled)
    assert ratio.point > 0 and len(ratio.by_round) == 2
    assert (ratio.low, ratio.high) == (None, None)


def test_an_artifact_with_a_changed_byte_is_not_timed(artifact: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(artifact, changed)
    (changed / "config.json").write_text((changed / "config.json").read_text() + " ")
    subjects = [
        BenchSubject(name=name, path=path, kind="artifact") for name, path in (("good", artifact), ("bad", changed))
    ]
    with pytest.raises(IntegrityError, match=r"^bad: .*config\.json is not the file that was exported") as caught:
        bench(subjects, QUICK)
    assert caught.value.hint is not None
    assert caught.value.exit_code == 4


# --- what cannot be measured ---------------------------------------------------------------------------------------


def test_a_sequence_longer_than_the_model_is_refused_with_the_length_it_takes(bert: Path) -> None:
    settings = QUICK.model_copy(update={"sequence_length": 65})
    with pytest.raises(InputError, match="long: The model has positions for 64 tokens") as caught:
        bench([BenchSubject(name="long", path=bert, kind="checkpoint")], settings)
    assert "--sequence-length 64" in str(caught.value.hint)


def test_nothing_and_the_same_name_twice_are_refused(bert: Path) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        bench([])
    with pytest.raises(UsageError, match="same name"):
        bench([BenchSubject(name="a", path=bert, kind="checkpoint")] * 2)


def test_results_of_two_benches_are_not_compared(results: list[BenchResult]) -> None:
    teacher = results[0]
    shorter = replace(teacher, rounds_ms=teacher.rounds_ms[:3])
    with pytest.raises(UsageError, match="not measured in the same rounds"):
        speedup(teacher, shorter)


def test_a_worker_that_dies_is_named_and_takes_the_others_with_it(artifact: Path, children: Children) -> None:
    def kill_the_second(said: str) -> None:
        if said.startswith("round 2"):
            os.kill(sorted(children() - before)[1], signal.SIGKILL)

    before = children()
    subjects = [BenchSubject(name=name, path=artifact, kind="artifact") for name in ("first", "second")]
    with pytest.raises(WorkerDied, match=r"measures 'second' was ended by SIGKILL \(out of memory\?\)"):
        bench(subjects, QUICK, kill_the_second)


def test_a_worker_that_gives_no_answer_in_time_is_ended(artifact: Path) -> None:
    settings = QUICK.model_copy(update={"timeout_seconds": 0.05})
    with pytest.raises(WorkerDied, match=r"measures 'late' gave no answer within 0\.05 seconds while asked to load"):
        bench([BenchSubject(name="late", path=artifact, kind="artifact")], settings)


def test_an_interruption_ends_the_workers(artifact: Path, children: Children) -> None:
    def interrupt(said: str) -> None:
        if said.startswith("round 1"):
            assert len(children() - before) == 1
            raise KeyboardInterrupt

    before = children()
    with pytest.raises(KeyboardInterrupt):
        bench([BenchSubject(name="only", path=artifact, kind="artifact")], QUICK, interrupt)
    assert children() == before


# --- the worker ----------------------------------------------------------------------------------------------------


def test_a_worker_outlives_ctrl_c_but_not_its_parent() -> None:
    worker = subprocess.Popen([sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write('{"do": "end"}\n')
    worker.stdin.flush()
    assert json.loads(worker.stdout.readline())["peak_memory_mb"] > 0
    worker.send_signal(signal.SIGINT)
    time.sleep(0.05)
    assert worker.poll() is None
    worker.stdin.close()
    assert worker.wait(timeout=10) == 0
    worker.stdout.close()


def test_the_peak_memory_is_the_workers_own_and_not_its_parents() -> None:
    """Linux's `ru_maxrss` survives `exec`: a worker started by a large process would report that process's peak."""
    ballast = np.ones(60_000_000)  # 458 MiB, far above what a worker that only answers `end` takes
    command = [sys.executable, "-c", f"from {MODULE} import peak_memory_mb; print(peak_memory_mb())"]
    child = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak_memory_mb() > ballast.nbytes / 2**20
    assert child < peak_memory_mb()


def test_every_subject_gets_the_same_ids() -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    one, two = (
        random_batch(names, 300, (2, 8), seed=3),
        random_batch(["attention_mask", "input_ids"], 300, (2, 8), seed=3),
    )
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert one["input_ids"].dtype == torch.int64
    assert one["input_ids"].min() >= 5 and one["input_ids"].max() < 300
    assert one["attention_mask"].all() and not one["token_type_ids"].any()
    assert list(two) == ["attention_mask", "input_ids"]
    assert not torch.equal(one["input_ids"], random_batch(names, 300, (2, 8), seed=4)["input_ids"])


def test_every_call_is_timed_and_garbage_is_left_alone_meanwhile() -> None:
    collecting: list[bool] = []
    samples = timed(lambda: collecting.append(gc.isenabled()), 7)
    assert len(samples) == 7 and min(samples) >= 0
    assert collecting == [False] * 7
    assert gc.isenabled()


def test_warm_up_goes_on_until_calls_have_settled() -> None:
    """A call that takes 12, 11, 10, ... ms: what settles is its floor, not its first window."""
    pauses = iter([0.012 - 0.0005 * step for step in range(20)])
    calls, settled, typical_ms = warm_up(lambda: time.sleep(next(pauses, 0.002)), 20.0, tolerance=0.2)
    assert settled
    assert calls >= 20
    assert 2.0 <= typical_ms < 6.0


def test_warm_up_gives_up_on_what_never_settles() -> None:
    growing = iter(range(1, 1000))
    _, settled, _ = warm_up(lambda: time.sleep(0.001 * next(growing)), 0.1, tolerance=0.001)
    assert not settled


# --- histogram -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
def test_a_histogram_holds_all_but_the_slowest_calls(wide: bool) -> None:
    random = np.random.default_rng(0)
    samples = np.exp(random.normal(scale=1.5 if wide else 0.1, size=2_000))
    edges, counts = histogram(samples)
    assert len(edges) == 41 and len(counts) == 40
    assert edges == sorted(edges) and edges[0] == samples.min()
    assert sum(counts) == np.sum(samples <= edges[-1]) == 1_990
    steps = np.diff(np.log(edges) if wide else edges)
    assert steps == pytest.approx(np.full(40, steps[0]))


def test_a_histogram_of_equal_calls_has_rising_edges() -> None:
    edges, counts = histogram(np.full(10, 3.0))
    assert (np.diff(edges) > 0).all()
    assert sum(counts) == 10
