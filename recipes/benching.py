"""Checkpoints and artifacts timed side by side, on their own or beside what a validation has measured."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ..environment import facts
from ..exporters.artifact import read_manifest
from ..models.checkpoint import Checkpoint
from ..validate.performance.latency import BenchResult, BenchSettings, BenchSubject
from ..validate.performance.latency import bench as time_side_by_side
from ..validate.performance.loadgen import require_loadgen
from ..validate.performance.metrics import with_generation, with_latency, with_scenarios
from ..validate.performance.scenarios import ScenarioSettings, run_scenarios
from ..validate.performance.token_times import GenerationSettings, bench_generation
from ..validate.records.performance import Noise
from ..validate.records.report import Candidate, Metric, Report
from .progress import SILENT, Progress


@dataclass(frozen=True)
class Timed:
    """A teacher and candidates, with their times where they were taken, and what a bench says once: how noisy it was,
    and by what energy was measured or why not."""

    teacher: Candidate
    candidates: list[Candidate]
    noise: Noise | None = None
    energy: str | None = None


def timed_beside(
    teacher: Checkpoint,
    untimed: Timed,
    artifacts: Mapping[str, Path],
    settings: BenchSettings,
    progress: Progress = SILENT,
) -> Timed:
    """The same with the times of the teacher (eager torch) and of these artifacts, taken in turn."""
    subjects = [BenchSubject(name="teacher", path=Path(teacher.source), kind="checkpoint", task=teacher.task.name)]
    subjects += [BenchSubject(name=name, path=folder, kind="artifact") for name, folder in artifacts.items()]
    results = {result.subject.name: result for result in time_side_by_side(subjects, settings, progress.say)}
    first = results["teacher"]
    candidates = [
        with_latency(candidate, results[candidate.name], first) if candidate.name in results else candidate
        for candidate in untimed.candidates
    ]
    return Timed(with_latency(untimed.teacher, first, None), candidates, first.noise, _energy(first))


def written_beside(
    teacher: Checkpoint,
    timed: Timed,
    artifacts: Mapping[str, Path],
    texts: GenerationSettings,
    settings: BenchSettings,
    progress: Progress = SILENT,
) -> Timed:
    """The same with the times of text that the teacher (eager torch) and these artifacts write, in turn.

    Raises:
        UsageError: an artifact that keeps no cache.
    """
    subjects = [BenchSubject(name="teacher", path=Path(teacher.source), kind="checkpoint", task=teacher.task.name)]
    subjects += [BenchSubject(name=name, path=folder, kind="artifact") for name, folder in artifacts.items()]
    results = {found.subject.name: found for found in bench_generation(subjects, texts, settings, progress.say)}
    first = results["teacher"]
    candidates = [
        with_generation(candidate, results[candidate.name], first) if candidate.name in results else candidate
        for candidate in timed.candidates
    ]
    return replace(timed, teacher=with_generation(timed.teacher, first, None), candidates=candidates)


def writing_alone(
    subject: BenchSubject, texts: GenerationSettings, settings: BenchSettings, progress: Progress = SILENT
) -> list[Metric]:
    """How fast one checkpoint or artifact writes text, as metrics; no other program is in memory meanwhile."""
    result = bench_generation([subject], texts, settings, progress.say)[0]
    return with_generation(_bare_candidate(subject), result, None).metrics


def bench(
    subjects: dict[str, Path],
    settings: BenchSettings,
    *,
    generation: GenerationSettings | None = None,
    scenarios: ScenarioSettings | None = None,
    task: str | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Time checkpoints (eager torch) and artifacts side by side, ratios to the first; then, one after the other, in the
    scenarios of MLPerf that are asked for.

    Args:
        generation: time texts that are written, and not single calls; scenarios are of the first of its shapes then.

    Raises:
        InputError: a path that is neither.
        UsageError: scenarios that cannot be had, or text of a program that keeps no cache.
        BackendUnavailable: scenarios without LoadGen.
    """
    if scenarios is not None:  # before anything is timed
        scenarios.check(writes=generation is not None)
        require_loadgen()
    listed = [
        BenchSubject(name=name, path=path, kind="artifact" if (path / "manifest.json").exists() else "checkpoint",
                     task=task if not (path / "manifest.json").exists() else None)
        for name, path in subjects.items()
    ]  # fmt: skip
    candidates, noise, energy = _timed(listed, settings, generation, progress)
    if scenarios is not None:
        texts = generation.shapes[0] if generation is not None else None
        candidates = [
            with_scenarios(candidate, run_scenarios(subject, scenarios, settings, progress.say, texts))
            for candidate, subject in zip(candidates, listed, strict=True)
        ]
    return Report(
        kind="benchmark",
        title=" against ".join(subjects),
        created=now(),
        command=command_line(),
        candidates=candidates,
        environment=facts(),
        noise=noise,
        energy=energy,
    )


def _timed(
    subjects: Sequence[BenchSubject], settings: BenchSettings, generation: GenerationSettings | None, progress: Progress
) -> tuple[list[Candidate], Noise | None, str | None]:
    """Candidates with their times, the noise where it was measured, and what is to be said of energy, which is measured
    of single calls only."""
    if generation is not None:
        written = bench_generation(subjects, generation, settings, progress.say)
        candidates = [
            with_generation(_bare_candidate(result.subject), result, written[0] if number else None)
            for number, result in enumerate(written)
        ]
        return candidates, written[0].noise, None
    results = time_side_by_side(subjects, settings, progress.say)
    candidates = [
        with_latency(_bare_candidate(result.subject), result, results[0] if number else None)
        for number, result in enumerate(results)
    ]
    return candidates, results[0].noise, _energy(results[0])


def _energy(first: BenchResult) -> str:
    if first.meter:
        return f"Energy was measured by {first.meter}."
    return f"Energy is not measurable here: {first.no_meter}."


def _bare_candidate(subject: BenchSubject) -> Candidate:
    if subject.kind == "checkpoint":
        return Candidate(
            name=subject.name, kind="checkpoint", backend="torch", precision="fp32", path=subject.path.name
        )
    manifest = read_manifest(subject.path)
    return Candidate(
        name=subject.name,
        kind="artifact",
        backend=manifest.format,
        precision=manifest.settings.precision,
        path=subject.path.name,
        artifact_id=manifest.artifact_id,
        parameters=manifest.parameters,
    )


def command_line() -> str:
    """What was typed, for the record."""
    return " ".join(["limbeck", *(shlex.quote(word) for word in sys.argv[1:])])


def now() -> str:
    """This second, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
