"""MLPerf's scenarios, one after the other, each in a process of its own; and the highest rate that a server holds.

LoadGen measures one program at a time: ratios of two come from `latency`, whose rounds take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...errors import UsageError
from ..records.performance import Scenario, ScenarioName
from .latency import BenchSettings, BenchSubject, Progress, common_vocabulary, load_all, prepare_call
from .loadgen import require_loadgen
from .loadgen_log import Load, Outcome, Texts
from .token_times import open_writer, prepare_texts
from .worker_process import WorkerProcess
from .writing import TextShape

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
    ttft_bound_ms: float | None = Field(default=None, gt=0)
    """Server that writes text: what 99 % of texts must have their first token within, waiting included."""
    tpot_bound_ms: float | None = Field(default=None, gt=0)
    """Server that writes text: what a token after the first may take, on average of a text, in 99 % of texts."""

    @model_validator(mode="after")
    def _bounds_are_the_servers(self) -> Self:
        bounds = (self.target_qps, self.latency_bound_ms, self.ttft_bound_ms, self.tpot_bound_ms)
        if "server" not in self.scenario and any(bounds):
            raise UsageError(
                "A target rate and a bound are the server scenario's, which was not asked for.",
                "Add server to --scenario, or leave out --target-qps and the bounds.",
            )
        return self

    def check(self, writes: bool) -> None:
        """Refuse what the scenarios of a program cannot have, which is called for its answers or `writes` text.

        Raises:
            UsageError: a server without its bounds, bounds of another kind, or MultiStream of texts.
        """
        if writes and "multi_stream" in self.scenario:
            raise UsageError(
                "MultiStream is for queries that are answered at once, and not for texts.",
                "Take single-stream, offline or server with --generate.",
            )
        tokens, given = (self.ttft_bound_ms, self.tpot_bound_ms), "--ttft-bound-ms or --tpot-bound-ms"
        if writes and self.latency_bound_ms is not None:
            raise UsageError("--latency-bound-ms is for single calls; texts have a bound for their tokens.",
                             "Give --ttft-bound-ms, --tpot-bound-ms or both.")  # fmt: skip
        if not writes and any(tokens):
            raise UsageError(f"{given} is for texts that are written.", "Add --generate.")
        if "server" not in self.scenario:
            return
        if writes and not any(tokens):
            raise UsageError(
                "A server that writes text needs a bound on its first tokens, on those after them, or on both.",
                "Add --ttft-bound-ms 200 --tpot-bound-ms 20, say.",
            )
        if not writes and self.latency_bound_ms is None:
            raise UsageError(
                "The server scenario needs a bound that 99 % of its queries are answered within.",
                "Add --latency-bound-ms 10, say.",
            )


def run_scenarios(
    subject: BenchSubject,
    settings: ScenarioSettings,
    timing: BenchSettings,
    progress: Progress = lambda _: None,
    texts: TextShape | None = None,
) -> list[Scenario]:
    """Every scenario asked for on one subject, with the threads of `timing`, and at its batch and sequence where a
    sample is not a text.

    Raises:
        BackendUnavailable: LoadGen is not installed, or the artifact's runtime.
        UsageError: a target that is beyond what the program can answer at all.
        LoadGenInterrupted: LoadGen ended without a result.
        WorkerDied: the process that measured ended.
    """
    require_loadgen()
    settings.check(writes=texts is not None)
    asked = _Asked(subject, settings, timing, texts, progress)
    return [_run(name, asked) for name in dict.fromkeys(settings.scenario)]


@dataclass(frozen=True)
class _Asked:
    """What all scenarios of a subject have in common."""

    subject: BenchSubject
    settings: ScenarioSettings
    timing: BenchSettings
    texts: TextShape | None
    progress: Progress

    @property
    def shape(self) -> tuple[int, int]:
        """Batch and sequence; of texts their prompts'."""
        if self.texts is not None:
            return self.texts.batch_size, self.texts.prompt_tokens
        return self.timing.batch_size, self.timing.sequence_length

    def prepare(self, worker: WorkerProcess) -> float:
        """Load and warm up; about how many milliseconds a call takes."""
        loaded = load_all([self.subject], [worker], self.timing, lambda _: None)
        vocabulary = common_vocabulary(loaded)
        if self.texts is None:
            return float(prepare_call(worker, vocabulary, self.timing)["typical_ms"])
        open_writer(self.subject, worker, [self.texts])
        return float(prepare_texts(worker, vocabulary, self.texts, self.timing)["typical_ms"])

    def load(self, name: ScenarioName, typical_ms: float) -> Load:
        """What LoadGen is asked, but for the rate."""
        settings, bounds = self.settings, {}
        if name == "server":
            bounds = {"ttft_bound_ms": settings.ttft_bound_ms, "tpot_bound_ms": settings.tpot_bound_ms}
        return Load(
            scenario=name,
            batch_size=self.shape[0],
            seconds=settings.duration,
            typical_ms=typical_ms,
            latency_bound_ms=settings.latency_bound_ms,
            seed=self.timing.seed,
            texts=Texts(new_tokens=self.texts.new_tokens, **bounds) if self.texts else None,
        )


def _run(name: ScenarioName, asked: _Asked) -> Scenario:
    subject, settings, timing, progress = asked.subject, asked.settings, asked.timing, asked.progress
    longest = timing.timeout_seconds + 2 * _HOPELESS * settings.duration
    progress(f"{name.replace('_', ' ')} on {subject.name}")
    with WorkerProcess(subject.name, timing.threads_used, longest) as worker:
        tests = _Tests(worker, asked.load(name, asked.prepare(worker)))
        if name != "server":
            outcome, target = tests.run(None), None
        elif settings.target_qps is not None:
            outcome, target = tests.run(_within_reach(settings.target_qps, tests.reach)), settings.target_qps
        else:
            outcome, target = search(tests.run, tests.reach, progress)
    server = name == "server"
    return Scenario(
        name=name,
        batch_size=asked.shape[0],
        sequence_length=asked.shape[1],
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
