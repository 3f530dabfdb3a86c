"""MLPerf's scenarios, one after the other, each in a process of its own; and the highest rate that a server holds.

LoadGen measures one program at a time: ratios of two come from `latency`, whose rounds take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...environment import cpus_to_pin
from ...errors import UsageError
from ..records.performance import Scenario, ScenarioName
from .latency import BenchSettings, BenchSubject, Progress
from .loadgen import Load, Outcome, require_loadgen
from .worker_process import WorkerProcess

_SEARCH_TESTS = 6
"""Tests of a search: each halves what is left between 0 and what back-to-back calls reach, so 2 % of that is left."""
_HOPELESS = 2.0
"""Times what back-to-back calls reach: beyond, the queue would only grow, and LoadGen waits for its end."""


class ScenarioSettings(BaseModel):
    """Which scenarios, and what is asked of each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenario: tuple[ScenarioName, ...] = Field(min_length=1)
    duration: float = Field(default=10.0, gt=0, le=3600)
    """Seconds for which queries are issued, at least; a result of MLPerf's own takes 600."""
    target_qps: float | None = Field(default=None, gt=0)
    """Server: queries a second. Where not given, the highest that holds the bound is searched."""
    latency_bound_ms: float | None = Field(default=None, gt=0)
    """Server: what 99 % of queries must be answered within."""

    @model_validator(mode="after")
    def _server_has_a_bound(self) -> Self:
        if "server" in self.scenario and self.latency_bound_ms is None:
            raise UsageError(
                "The server scenario needs a bound that 99 % of its queries are answered within.",
                "Add --latency-bound-ms 10, say.",
            )
        if "server" not in self.scenario and (self.target_qps or self.latency_bound_ms):
            raise UsageError(
                "A target rate and a latency bound are the server scenario's, which was not asked for.",
                "Add server to --scenario, or leave out --target-qps and --latency-bound-ms.",
            )
        return self


def run_scenarios(
    subject: BenchSubject,
    settings: ScenarioSettings,
    timing: BenchSettings,
    progress: Progress = lambda _: None,
) -> list[Scenario]:
    """Every scenario asked for on one subject, at the batch, sequence and threads of `timing`.

    Raises:
        BackendUnavailable: LoadGen is not installed, or the artifact's runtime.
        UsageError: a target that is beyond what the program can answer at all.
        LoadGenInterrupted: LoadGen ended without a result.
        WorkerDied: the process that measured ended.
    """
    require_loadgen()
    return [_run(subject, name, settings, timing, progress) for name in dict.fromkeys(settings.scenario)]


def _run(
    subject: BenchSubject, name: ScenarioName, settings: ScenarioSettings, timing: BenchSettings, progress: Progress
) -> Scenario:
    longest = timing.timeout_seconds + 2 * _HOPELESS * settings.duration
    progress(f"{name.replace('_', ' ')} on {subject.name}")
    with WorkerProcess(subject.name, timing.threads_used, longest) as worker:
        fields = subject.model_dump(mode="json", exclude={"name"})
        loaded = worker.ask("load", **fields, threads=timing.threads_used, cpus=cpus_to_pin(timing.threads_used))
        prepared = worker.ask(
            "prepare",
            vocabulary=loaded["vocabulary"],
            shape=[timing.batch_size, timing.sequence_length],
            seed=timing.seed,
            warm_up_seconds=timing.warm_up_seconds,
            tolerance=timing.warm_up_tolerance,
        )
        tests = _Tests(worker, Load(
            scenario=name,
            batch_size=timing.batch_size,
            seconds=settings.duration,
            typical_ms=prepared["typical_ms"],
            latency_bound_ms=settings.latency_bound_ms,
            seed=timing.seed,
        ))  # fmt: skip
        if name != "server":
            outcome, target = tests.run(None), None
        elif settings.target_qps is not None:
            outcome, target = tests.run(_within_reach(settings.target_qps, tests.reach)), settings.target_qps
        else:
            outcome, target = search(tests.run, tests.reach, progress)
    server = name == "server"
    return Scenario(
        name=name,
        batch_size=timing.batch_size,
        sequence_length=timing.sequence_length,
        threads=timing.threads_used,
        duration_seconds=settings.duration,
        target_qps=target,
        latency_bound_ms=settings.latency_bound_ms if server else None,
        searched=server and settings.target_qps is None,
        **outcome.model_dump(),
    )


class _Tests:
    """LoadGen tests of one prepared call, in the worker that holds it."""

    def __init__(self, worker: WorkerProcess, load: Load) -> None:
        self._worker = worker
        self._load = load

    @property
    def reach(self) -> float:
        """Samples a second that calls back to back would answer."""
        return self._load.batch_size * 1e3 / self._load.typical_ms

    def run(self, target_qps: float | None) -> Outcome:
        """One test."""
        load: dict[str, Any] = self._load.model_copy(update={"target_qps": target_qps}).model_dump()
        with TemporaryDirectory(prefix="limbeck-loadgen-") as folder:
            return Outcome(**self._worker.ask("scenario", folder=str(Path(folder)), **load))


def _within_reach(target_qps: float, reach: float) -> float:
    if target_qps > _HOPELESS * reach:
        raise UsageError(
            f"--target-qps {target_qps:g} is more than twice the {reach:.4g} a second that this program answers back "
            "to back: its queue would only grow.",
            "Ask for fewer, or leave --target-qps out to search for the most that holds the bound.",
        )
    return target_qps


def search(
    test: Callable[[float], Outcome], reach: float, progress: Progress = lambda _: None
) -> tuple[Outcome, float]:
    """The highest rate (queries a second) that LoadGen calls valid, with its test, by bisection between 0 and `reach`:
    upwards wherever the bound was held as measured.

    Where none is valid, the highest that held the bound with too few queries for LoadGen's verdict; where none did, the
    lowest that was tried.
    """
    low, high = 0.0, reach
    tests: list[tuple[Outcome, float]] = []
    for number in range(1, _SEARCH_TESTS + 1):
        rate = (low + high) / 2
        progress(f"test {number} of {_SEARCH_TESTS}: {rate:.4g} queries a second")
        tests.append((test(rate), rate))
        if tests[-1][0].validity == "invalid":
            high = rate
        else:
            low = rate
    for validity in ("valid", "undecided"):
        if held := [found for found in tests if found[0].validity == validity]:
            return max(held, key=lambda found: found[1])
    return min(tests, key=lambda found: found[1])
