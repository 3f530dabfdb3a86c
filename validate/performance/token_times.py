"""Generation side by side: time to first token, time per output token and tokens a second, over batch sizes and prompt
lengths; a process a subject, rounds in turn, as for single calls (`latency.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ...errors import InputError
from ..records.performance import Generation, Noise, TokenTimes
from .latency import (
    BenchSettings,
    BenchSubject,
    Progress,
    Samples,
    Speedup,
    SubjectRun,
    common_vocabulary,
    cpu_shares,
    load_all,
    noise_of,
    paired_speedup,
    rounds_in_turn,
    samples_of,
    workers_of,
)
from .worker_process import WorkerProcess
from .writing import TextShape

_Size = Annotated[int, Field(ge=1)]


class GenerationSettings(BaseModel):
    """Which texts are written: every batch size with every prompt length."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: tuple[_Size, ...] = Field((1,), min_length=1)
    prompt_length: tuple[_Size, ...] = Field((128,), min_length=1)
    """In tokens."""
    new_tokens: int = Field(32, ge=2)
    """Written after each prompt, whatever they are."""

    @property
    def shapes(self) -> list[TextShape]:
        """Batch sizes in turn, each with every prompt length; the first is the one that metrics are named after."""
        return [
            TextShape(batch_size=batch, prompt_tokens=prompt, new_tokens=self.new_tokens)
            for batch in dict.fromkeys(self.batch_size)
            for prompt in dict.fromkeys(self.prompt_length)
        ]


@dataclass(frozen=True)
class ShapeTimes:
    """What one subject took for texts of one shape, in milliseconds."""

    shape: TextShape
    first_ms: Samples
    """From the prompts to their first token, [rounds, batches]."""
    steps_ms: Samples
    """Of every further token of a batch, [rounds, tokens]."""
    cache_bytes: int
    settled: bool

    @property
    def tokens_per_second(self) -> float:
        """Of all texts of a batch together, after the first token."""
        return self.shape.batch_size * 1e3 / float(self.steps_ms.mean())


@dataclass(frozen=True)
class GenerationResult(SubjectRun):
    """What was measured on one subject that writes text."""

    times: tuple[ShapeTimes, ...]
    noise: Noise | None = None
    """The first subject's time per token against itself in a second process, at the first shape, where that was asked
    for."""

    def generations(self, baseline: GenerationResult | None = None) -> list[Generation]:
        """The report's records; with a baseline, how many times faster than it this subject is."""
        others = baseline.times if baseline is not None else [None] * len(self.times)
        return [self._record(found, other) for found, other in zip(self.times, others, strict=True)]

    def _record(self, found: ShapeTimes, other: ShapeTimes | None) -> Generation:
        return Generation(
            **found.shape.model_dump(),
            threads=self.settings.threads_used,
            rounds=len(found.first_ms),
            ttft=_token_times(found.first_ms, paired_speedup(other.first_ms, found.first_ms) if other else None),
            tpot=_token_times(found.steps_ms, paired_speedup(other.steps_ms, found.steps_ms) if other else None),
            tokens_per_second=found.tokens_per_second,
            cache_bytes=found.cache_bytes,
            properties=dict(self.properties),
            settled=found.settled,
            cpus=self.cpus,
        )


def _token_times(samples: Samples, ratio: Speedup | None) -> TokenTimes:
    p50, p90, p99 = (float(value) for value in np.percentile(samples, [50, 90, 99]))
    ends = {"speedup": ratio.point, "speedup_low": ratio.low, "speedup_high": ratio.high} if ratio else {}
    return TokenTimes(samples=samples.size, p50_ms=p50, p90_ms=p90, p99_ms=p99, **ends)


def bench_generation(
    subjects: Sequence[BenchSubject],
    asked: GenerationSettings,
    settings: BenchSettings | None = None,
    progress: Progress = lambda _: None,
) -> list[GenerationResult]:
    """Time subjects that write text side by side; results in the order of the subjects. Batch size and sequence length
    of `settings` are not heeded.

    Raises:
        UsageError: no subjects, two of one name, or one that keeps no cache.
        InputError: a subject that is not there to write text, or that holds no texts so long.
        IntegrityError, BackendUnavailable: an artifact that cannot be opened or timed here.
        WorkerDied: a runtime that crashed, ran out of memory or hung.
    """
    settings = settings or BenchSettings()
    with workers_of(subjects, settings) as (timed, workers):
        loaded = load_all(timed, workers, settings, progress)
        for subject, worker in zip(timed, workers, strict=True):  # all of them, before the first is timed
            open_writer(subject, worker, asked.shapes)
        found = [_Measured.of(workers, loaded, shape, settings, progress) for shape in asked.shapes]
        ends = [worker.ask("end") for worker in workers]
    results = [
        GenerationResult(
            subject=subject,
            settings=settings,
            properties=loaded[index]["properties"],
            cold_start_ms=found[0].prepared[index]["cold_start_ms"],
            **cpu_shares([answer for each in found for answer in each.rounds[index]], alone=len(workers) == 1),
            times=tuple(each.times(index) for each in found),
            **ends[index],
        )
        for index, subject in enumerate(timed)
    ]
    if settings.measure_noise:
        *results, twin = results
        ratio = paired_speedup(results[0].times[0].steps_ms, twin.times[0].steps_ms)
        results[0] = replace(results[0], noise=noise_of(results[0].subject, ratio))
    return results


def open_writer(subject: BenchSubject, worker: WorkerProcess, shapes: Sequence[TextShape]) -> None:
    """Let a worker get ready to write what it has loaded.

    Raises:
        UsageError: it keeps no cache.
        InputError: it is not there to write text, or holds no texts so long.
    """
    longest = max(shapes, key=lambda shape: shape.length)
    room = int(worker.ask("open_writer")["max_length"])
    if longest.length > room:
        raise InputError(
            f"{subject.name}: a prompt of {longest.prompt_tokens} tokens and {longest.new_tokens} new ones are more "
            f"than the {room} that a text of it may have.",
            "Ask for a shorter --prompt-length or fewer --new-tokens, or export the model with a longer --sequence.",
        )


def prepare_texts(worker: WorkerProcess, vocabulary: int, shape: TextShape, settings: BenchSettings) -> dict[str, Any]:
    """Let a worker write texts of this shape until it is warm."""
    return worker.ask(
        "prepare_texts",
        vocabulary=vocabulary,
        shape=shape.model_dump(),
        seed=settings.seed,
        warm_up_seconds=settings.warm_up_seconds,
        tolerance=settings.warm_up_tolerance,
    )


@dataclass(frozen=True)
class _Measured:
    """Every worker's answers about one shape."""

    shape: TextShape
    prepared: list[dict[str, Any]]
    rounds: list[list[dict[str, Any]]]

    @classmethod
    def of(
        cls,
        workers: Sequence[WorkerProcess],
        loaded: Sequence[Mapping[str, Any]],
        shape: TextShape,
        settings: BenchSettings,
        progress: Progress,
    ) -> _Measured:
        progress(f"warming up: {shape.words}")
        vocabulary = common_vocabulary(loaded)
        prepared = [prepare_texts(worker, vocabulary, shape, settings) for worker in workers]
        batches = [max(1, round(settings.seconds_per_round * 1e3 / answer["typical_ms"])) for answer in prepared]
        commands = [{"do": "write_round", "texts": number} for number in batches]

        def said(words: str) -> None:
            progress(f"{shape.words}: {words}")

        return cls(shape, prepared, rounds_in_turn(workers, commands, settings, said))

    def times(self, index: int) -> ShapeTimes:
        answers, prepared = self.rounds[index], self.prepared[index]
        return ShapeTimes(
            shape=self.shape,
            first_ms=samples_of(answers, "first_ms"),
            steps_ms=samples_of(answers, "steps_ms"),
            cache_bytes=prepared["cache_bytes"],
            settled=prepared["settled"],
        )
