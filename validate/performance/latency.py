"""Latency side by side: every candidate in a process of its own, rounds in turn.

Runtimes that share a process slow each other, because their thread pools spin after a call; and a machine has slow
minutes. So each subject gets a worker (`worker.py`), one worker runs at a time while the others are blocked on a
read, and each round lets every subject run once, in a new random order: what is slow for one is slow for all, and the
ratio of two subjects, taken round by round, stays true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ...environment import available_cpus, cpus_to_pin
from ...errors import UsageError
from ..records.performance import Latency, Noise
from ..statistics.intervals import paired_ratio_interval
from .energy import millijoules_a_call
from .worker_process import WorkerProcess

Samples = NDArray[np.float64]
Progress = Callable[[str], None]

_BINS = 40
_HISTOGRAM_QUANTILE = 0.995
_WIDE_RANGE = 10.0
_FEWEST_ROUNDS_FOR_AN_INTERVAL = 3


class BenchSubject(BaseModel):
    """What is timed: a checkpoint runs in eager torch (float32), an artifact on its own runtime."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    path: Path
    kind: Literal["checkpoint", "artifact"]
    task: str | None = None
    """A checkpoint's task, where its folder does not say."""


class BenchSettings(BaseModel):
    """How subjects are timed; the same for all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(default=1, ge=1)
    sequence_length: int = Field(default=128, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """Threads of each runtime; every available CPU where not given."""
    rounds: int = Field(default=10, ge=1)
    seconds_per_round: float = Field(default=0.5, gt=0)
    """How long a subject is timed in a round, about: its number of calls is fixed after warm-up, so that every round
    counts alike."""
    min_calls_per_round: int = Field(default=10, ge=1)
    max_calls_per_round: int = Field(default=20_000, ge=1)
    warm_up_seconds: float = Field(default=5.0, ge=0)
    """A subject that has not settled by then is timed as it is, and its result says so."""
    warm_up_tolerance: float = Field(default=0.03, gt=0)
    """Share by which the medians of two windows in a row may differ in a subject that is warm."""
    measure_noise: bool = False
    """Time the first subject twice, in two processes, and compare it with itself."""
    seed: int = 0
    timeout_seconds: float = Field(default=600.0, gt=0)
    """A worker that owes an answer for longer is killed."""

    @property
    def threads_used(self) -> int:
        """The number of threads that each runtime is told."""
        return self.threads or available_cpus()


@dataclass(frozen=True)
class Speedup:
    """How many times faster a candidate is than its baseline, by medians; no bounds with fewer than 3 rounds."""

    point: float
    low: float | None
    high: float | None
    by_round: tuple[float, ...]


@dataclass(frozen=True)
class SubjectRun:
    """What was seen of the process that measured one subject. Memory is in MiB and counts the whole process, Python and
    torch included."""

    subject: BenchSubject
    settings: BenchSettings
    properties: Mapping[str, str]
    """Compile properties as read back from the runtime."""
    cold_start_ms: float
    """From being asked to open the folder to the first answer, verification of hashes and the import of the runtime
    included; the start of Python and the import of torch are not."""
    peak_memory_mb: float
    private_memory_mb: float | None
    program_memory_mb: float | None
    """Growth of the private memory from before the load to after the last round: the subject and its runtime."""
    idle_cpu_share: float
    """CPU seconds a second that the worker used while others were timed; anything but about 0 falsifies theirs."""
    busy_cpus: float
    """CPU seconds a second that it used while it was timed itself: how many threads had work, or span."""
    cpus: list[int]
    """The logical CPUs that it was bound to, as read back; empty where the system binds no processes."""
    meter: str | None
    """What energy was read from (see `energy`)."""
    no_meter: str | None
    """Why none was, as the end of a sentence."""


@dataclass(frozen=True)
class BenchResult(SubjectRun):
    """What was measured on one subject."""

    rounds_ms: Samples
    """Milliseconds of every call, [rounds, calls]."""
    warm_up_calls: int
    warm_up_settled: bool
    energy_mj: float | None
    """Millijoules a call, by the meter."""
    noise: Noise | None = None
    """The first subject against itself in a second process, where that was asked for."""

    @property
    def samples_ms(self) -> Samples:
        """Every call of every round, in the order of time."""
        return self.rounds_ms.ravel()

    def latency(self, baseline: BenchResult | None = None) -> Latency:
        """The report's record; with a baseline, how many times faster than it this subject is."""
        samples = self.samples_ms
        p50, p90, p99 = (float(value) for value in np.percentile(samples, [50, 90, 99]))
        edges, counts = histogram(samples)
        ratio = speedup(baseline, self) if baseline is not None else None
        return Latency(
            batch_size=self.settings.batch_size,
            sequence_length=self.settings.sequence_length,
            threads=self.settings.threads_used,
            rounds=len(self.rounds_ms),
            samples=len(samples),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            mean_ms=float(samples.mean()),
            histogram_edges_ms=edges,
            histogram_counts=counts,
            speedup=ratio.point if ratio else None,
            speedup_low=ratio.low if ratio else None,
            speedup_high=ratio.high if ratio else None,
            properties=dict(self.properties),
            settled=self.warm_up_settled,
            cpus=self.cpus,
        )


def histogram(samples_ms: Samples) -> tuple[list[float], list[int]]:
    """Edges (milliseconds) and counts of 40 bins from the fastest call to the 99.5th percentile; the few calls above
    it are left out, so that one hiccup does not flatten the rest. Bins are equal on a log scale where the range is
    wide (tenfold), else equal in width."""
    low, high = float(samples_ms.min()), float(np.quantile(samples_ms, _HISTOGRAM_QUANTILE))
    if high <= low:  # all alike: one bin's worth of room, so that edges rise
        high = low * 1.01 + 1e-6
    spread = np.geomspace if low > 0.0 and high / low > _WIDE_RANGE else np.linspace
    edges = spread(low, high, _BINS + 1)
    edges[0], edges[-1] = low, high  # geomspace rounds its ends, and would lose the fastest call
    counts, _ = np.histogram(samples_ms, edges)
    return [float(edge) for edge in edges], [int(count) for count in counts]


def speedup(baseline: BenchResult, candidate: BenchResult, seed: int = 0) -> Speedup:
    """The baseline's median time over the candidate's, with a 95 % interval from a paired bootstrap over rounds.

    Raises:
        UsageError: the two were not measured in the same rounds.
    """
    if len(baseline.rounds_ms) != len(candidate.rounds_ms) or baseline.settings != candidate.settings:
        raise UsageError(
            f"{baseline.subject.name!r} and {candidate.subject.name!r} were not measured in the same rounds.",
            "Give both to one `bench`.",
        )
    return paired_speedup(baseline.rounds_ms, candidate.rounds_ms, seed)


def paired_speedup(baseline: Samples, candidate: Samples, seed: int = 0) -> Speedup:
    """The same of times, [rounds, calls] each."""
    by_round = tuple(float(ratio) for ratio in np.median(baseline, axis=1) / np.median(candidate, axis=1))
    if len(by_round) < _FEWEST_ROUNDS_FOR_AN_INTERVAL:
        return Speedup(float(np.median(baseline) / np.median(candidate)), None, None, by_round)
    interval = paired_ratio_interval(baseline, candidate, seed=seed)
    return Speedup(interval.point, interval.low, interval.high, by_round)


def bench(
    subjects: Sequence[BenchSubject], settings: BenchSettings | None = None, progress: Progress = lambda _: None
) -> list[BenchResult]:
    """Time the subjects side by side; results in the order of the subjects. Every worker is gone on return, on an
    error and on Ctrl-C alike.

    Raises:
        UsageError: no subjects, or two of one name.
        InputError: a folder that is neither, or a shape that a subject does not take.
        IntegrityError, BackendUnavailable: an artifact that cannot be opened here.
        WorkerDied: a runtime that crashed, ran out of memory or hung.
    """
    settings = settings or BenchSettings()
    with workers_of(subjects, settings) as (timed, workers):
        results = _measure(timed, workers, settings, progress)
    if settings.measure_noise:
        *results, twin = results
        noise = noise_of(results[0].subject, speedup(results[0], twin))
        results[0] = replace(results[0], noise=noise)
    return results


@contextmanager
def workers_of(
    subjects: Sequence[BenchSubject], settings: BenchSettings
) -> Iterator[tuple[list[BenchSubject], list[WorkerProcess]]]:
    """A process for every subject, and a second one for the first where noise is measured; with who is in each.

    Raises:
        UsageError: no subjects, or two of one name.
    """
    names = [subject.name for subject in subjects]
    if not names:
        raise UsageError("There is nothing to measure.", "Name at least one checkpoint or artifact.")
    if len(set(names)) < len(names):
        raise UsageError(f"Two subjects of a bench have the same name: {', '.join(names)}.")
    timed = [*subjects, subjects[0]] if settings.measure_noise else list(subjects)
    with ExitStack() as stack:
        yield (
            timed,
            [
                stack.enter_context(WorkerProcess(subject.name, settings.threads_used, settings.timeout_seconds))
                for subject in timed
            ],
        )


def load_all(
    subjects: Sequence[BenchSubject], workers: Sequence[WorkerProcess], settings: BenchSettings, progress: Progress
) -> list[dict[str, Any]]:
    """Let every worker open its subject; their answers, the properties of the runtimes among them."""
    loaded, cpus = [], cpus_to_pin(settings.threads_used)
    for subject, worker in zip(subjects, workers, strict=True):
        progress(f"loading {subject.name}")
        fields = subject.model_dump(mode="json", exclude={"name"})
        loaded.append(worker.ask("load", **fields, threads=settings.threads_used, cpus=cpus))
    return loaded


def common_vocabulary(loaded: Sequence[Mapping[str, Any]]) -> int:
    """Ids below it are known to every subject."""
    return min(int(answer["vocabulary"]) for answer in loaded)


def prepare_call(worker: WorkerProcess, vocabulary: int, settings: BenchSettings) -> dict[str, Any]:
    """Let a worker bind a batch and call until it is warm."""
    return worker.ask(
        "prepare",
        vocabulary=vocabulary,
        shape=[settings.batch_size, settings.sequence_length],
        seed=settings.seed,
        warm_up_seconds=settings.warm_up_seconds,
        tolerance=settings.warm_up_tolerance,
    )


def noise_of(subject: BenchSubject, ratio: Speedup) -> Noise:
    """The record of a subject that was held against itself."""
    return Noise(subject=subject.name, ratio=ratio.point, low=ratio.low, high=ratio.high, rounds=len(ratio.by_round))


def _measure(
    subjects: Sequence[BenchSubject], workers: Sequence[WorkerProcess], settings: BenchSettings, progress: Progress
) -> list[BenchResult]:
    loaded = load_all(subjects, workers, settings, progress)
    vocabulary = common_vocabulary(loaded)
    prepared = []
    for subject, worker in zip(subjects, workers, strict=True):
        progress(f"warming up {subject.name}")
        prepared.append(prepare_call(worker, vocabulary, settings))
    calls = [_calls_per_round(answer["typical_ms"], settings) for answer in prepared]
    rounds = rounds_in_turn(workers, [{"do": "round", "calls": number} for number in calls], settings, progress)
    ends = [worker.ask("end") for worker in workers]
    return [
        BenchResult(
            subject=subject,
            settings=settings,
            properties=loaded[index]["properties"],
            cold_start_ms=prepared[index]["cold_start_ms"],
            **cpu_shares(rounds[index], alone=len(workers) == 1),
            rounds_ms=samples_of(rounds[index], "samples_ms"),
            warm_up_calls=prepared[index]["warm_up_calls"],
            warm_up_settled=prepared[index]["warm_up_settled"],
            energy_mj=millijoules_a_call(
                [answer["joules"] for answer in rounds[index]], calls[index] * settings.rounds
            ),
            **ends[index],
        )
        for index, subject in enumerate(subjects)
    ]


def rounds_in_turn(
    workers: Sequence[WorkerProcess],
    commands: Sequence[Mapping[str, Any]],
    settings: BenchSettings,
    progress: Progress,
) -> list[list[dict[str, Any]]]:
    """Each worker's answers to its command, one a round; who runs when is drawn anew for each round."""
    random = np.random.default_rng(settings.seed)
    rounds: list[list[dict[str, Any]]] = [[] for _ in workers]
    for number in range(1, settings.rounds + 1):
        progress(f"round {number} of {settings.rounds}")
        for index in random.permutation(len(workers)):
            rounds[index].append(workers[index].ask(**commands[index]))
    return rounds


def samples_of(rounds: Sequence[Mapping[str, Any]], name: str) -> Samples:
    """[rounds, calls]."""
    return np.array([answer[name] for answer in rounds], dtype=np.float64)


def cpu_shares(rounds: Sequence[Mapping[str, Any]], alone: bool) -> dict[str, Any]:
    """How busy a worker was while others were timed, and while it was timed itself."""
    idle = 0.0 if alone else _total(rounds, "waited_cpu_seconds") / max(_total(rounds, "waited_seconds"), 1e-9)
    busy = _total(rounds, "cpu_seconds") / max(_total(rounds, "seconds"), 1e-9)
    return {"idle_cpu_share": idle, "busy_cpus": busy}


def _calls_per_round(typical_ms: float, settings: BenchSettings) -> int:
    wanted = round(settings.seconds_per_round * 1e3 / max(typical_ms, 1e-6))
    return min(max(wanted, settings.min_calls_per_round), settings.max_calls_per_round)


def _total(rounds: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(answer[name] for answer in rounds))
