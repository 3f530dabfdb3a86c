"""One function a verb: what the command line and recipes call, and what a Python user imports."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..backends.registry import load_runner
from ..distill.callbacks import Modification
from ..distill.distillation import Surroundings
from ..distill.distillation import distill as train_student
from ..distill.settings import DistillSettings
from ..distill.student import draw_student
from ..distill.trainer import Evaluation
from ..environment import facts
from ..errors import InputError, UsageError, did_you_mean
from ..exporters.artifact import Manifest, open_artifact, read_manifest
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.lineage import read_training_rows
from ..prune.gradual import SparsityInTraining
from ..prune.pruning import prune as prune_checkpoint
from ..prune.settings import PruneSettings
from ..prune.sparsify_settings import SparsifySettings
from ..validate.attribution import AttributionAsked, Measured, Progressing, attribute
from ..validate.baseline import Monitoring
from ..validate.checks import examine, subject_of
from ..validate.gates import apply_gates
from ..validate.generation import check_prompts, set_generation
from ..validate.harness import HarnessAsked, open_harness
from ..validate.latency import BenchResult, BenchSettings, BenchSubject
from ..validate.latency import bench as time_side_by_side
from ..validate.loadgen import require_loadgen
from ..validate.measurement import (
    Standard,
    check_overlap,
    describe_artifact,
    describe_teacher,
    measure_artifact,
    require_same_task,
    score_checkpoint,
    set_standard,
)
from ..validate.performance_metrics import with_latency, with_scenarios
from ..validate.quality import headline_metric, higher_is_better, score
from ..validate.relative import check_references
from ..validate.report import Candidate, Gate, Report
from ..validate.scenarios import ScenarioSettings, run_scenarios
from ..validate.slices import SlicesAsked, check_builtin, with_slices
from .building import build, export_for_device
from .exporting import export
from .progress import SILENT, Progress
from .verifying import verify

__all__ = [
    "bench", "build", "command_line", "distill", "evaluation_on", "export", "export_for_device", "prune",
    "sparsification", "validate", "verify",
]  # fmt: skip

_ATTRIBUTED = AttributionAsked()


def distill(
    teacher: Checkpoint,
    settings: DistillSettings,
    data: Data,
    *,
    student: Checkpoint | None = None,
    around: Surroundings | None = None,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Draw a student from the teacher (or go on with the one given) and train it.

    Args:
        around: where the teacher's outputs come from, what is measured while training, where it can be resumed from.
    """
    if student is None:
        if settings.student is None:
            raise UsageError("A student has to be drawn from the teacher.", "Say how many layers it has: --layers N.")
        progress.say("drawing the student")
        student = draw_student(teacher, settings.student, data, settings.seed)
    elif settings.student is not None:
        raise UsageError("A student that is at hand already cannot be drawn again: leave its sizes out.")
    progress.say("distilling")
    return train_student(student, teacher, settings, data, replace(around or Surroundings(), progress=progress.advance))


def evaluation_on(data: Data, teacher: Checkpoint, metric: str | None = None) -> Evaluation:
    """Measure a student on these rows while it trains, against the references where there are any and against the
    teacher's own answers.

    Args:
        metric: what decides; the task's own when not given.

    Raises:
        UsageError: a metric that these rows do not give.
    """
    standard = set_standard(teacher, data)
    own = score(
        teacher.task.name,
        standard.predictions,
        standard.predictions,
        standard.references,
        label_names=standard.label_names,
        pairs=standard.pairs,
    )
    if metric is not None and metric not in own:
        raise UsageError(
            f"There is no metric {metric!r} to watch; on {data.source} there are {', '.join(own)}."
            f"{did_you_mean(metric, own)}"
        )
    chosen = metric or headline_metric(teacher.task.name, own)
    return Evaluation(lambda student: score_checkpoint(student, standard), chosen, higher_is_better(chosen))


def sparsification(settings: SparsifySettings) -> Modification:
    """Sparsity that is reached while a distillation trains, for `Surroundings(modification=...)`."""
    return Modification(
        "sparsify",
        settings.summary,
        settings.model_dump(mode="json"),
        start=lambda student: SparsityInTraining(student, settings),
    )


def prune(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    data: Data | None = None,
    *,
    rationale: str | None = None,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Remove what matters least; see `PruneSettings`."""
    if settings.budget is not None:
        from .budget import prune_to_budget  # which compiles and times what it cuts, by the steps of this file

        return prune_to_budget(checkpoint, settings, data, rationale=rationale, progress=progress)
    return prune_checkpoint(checkpoint, settings, data, rationale, progress.advance)


def validate(
    artifacts: dict[str, Path],
    teacher: Checkpoint,
    data: Data,
    *,
    gates: Sequence[Gate] = (),
    latency: BenchSettings | None = None,
    baselines: Sequence[str] = (),
    slices: SlicesAsked | None = None,
    generation: int | None = None,
    harness: HarnessAsked | None = None,
    attribution: AttributionAsked | None = _ATTRIBUTED,
    progress: Progress = SILENT,
) -> Report:
    """Hold compiled artifacts against their teacher on the same examples, and time them side by side.

    Args:
        artifacts: name in the report to artifact folder.
        latency: how to time teacher and artifacts; not timed when not given.
        baselines: names of artifacts that are measured for comparison only: gates do not look at them.
        slices: parts of the rows, and rows beside them, to measure each on its own as well.
        generation: prompts whose greedy text is compared, where the task is to write; 20 when not given.
        harness: tasks of the lm-evaluation-harness to run teacher and artifacts on.
        attribution: measure the points between teacher and artifacts too: their students, and those exported.
    """
    check_references(gates, previous_given=False)
    slices = slices or SlicesAsked()
    check_builtin(slices.builtin, teacher.task.name)
    check_prompts(generation, teacher.task.name)
    opened = {name: open_artifact(folder) for name, folder in artifacts.items()}
    if attribution is not None:
        attribution.check(opened)
    tasks = None
    if harness and harness.tasks:
        progress.say("teacher, on the harness's tasks")
        tasks = open_harness(harness, teacher, progress.advance)
    progress.say("teacher")
    limit = min([teacher.max_length, *(manifest.max_length for manifest in opened.values())])
    same_windows = limit if teacher.task.name == "text-generation" else None
    standard = set_standard(teacher, data, max_length=same_windows, progress=progress.advance)
    standard = with_slices(standard, slices, limit, progress.advance)
    texts = set_generation(standard, generation, limit)
    monitoring = Monitoring(standard)
    standard = replace(standard, observers=tuple(filter(None, (monitoring, texts, tasks))))
    measured = [
        _measured(name, folder, standard, slices, attribution, name in baselines, progress)
        for name, folder in artifacts.items()
    ]
    runnable = {item.candidate.name: item for item in measured if item.answers}
    candidates = [item.candidate for item in measured]
    if attribution is not None:
        told = Progressing(progress.say, progress.advance)
        attributed = attribute(list(runnable.values()), standard, attribution, told)
        found = {candidate.name: candidate for candidate in attributed}
        candidates = [found.get(candidate.name, candidate) for candidate in candidates]
    described, timed = describe_teacher(teacher), None
    if latency is not None:
        timeable = {name: folder for name, folder in artifacts.items() if name in runnable}
        described, candidates, timed = _timed(teacher, described, candidates, timeable, opened, latency, progress)
    newest = max(opened.values(), key=lambda manifest: len(manifest.lineage.steps))
    report = Report(
        kind="validation",
        title=f"{', '.join(artifacts)} against {teacher.lineage.origin}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command_line(),
        teacher=described,
        candidates=candidates,
        steps=newest.lineage.steps,
        environment=facts(),
        data=[
            f"{Path(rows.source).name}{where}: {len(rows)} rows, fingerprint {rows.fingerprint[:16]}"
            for where, rows in _measured_rows(data, slices).items()
        ],
        notes=[*_notes(opened), *_unchecked(measured), *_temperatures(candidates)],
        monitoring=monitoring.baseline({name: manifest.artifact_id for name, manifest in opened.items()}),
        **(_of_the_bench(timed) if timed else {}),
    )
    return report.model_copy(update={"gates": apply_gates(report, gates)}) if gates else report


def command_line() -> str:
    """What was typed, for the record."""
    return " ".join(["limbeck", *(shlex.quote(word) for word in sys.argv[1:])])


def _measured(
    name: str, folder: Path, standard: Standard, slices: SlicesAsked, attribution: AttributionAsked | None,
    baseline: bool, progress: Progress,
) -> Measured:  # fmt: skip
    """One artifact, loaded, checked, measured and freed; without answers where a check says why it gives none."""
    runner, manifest = load_runner(folder)
    require_same_task(folder, manifest, standard.teacher)
    given = attribution.student if attribution is not None else None
    with closing(runner):
        progress.say(f"checking {name}")
        examined = examine(subject_of(folder, manifest, runner, standard, at_hand=given))
        progress.say(name)
        try:
            candidate, answers = measure_artifact(name, folder, manifest, runner, standard, progress.advance)
        except InputError:
            if examined.passed:
                raise
            candidate, answers = describe_artifact(name, folder, manifest), {}
    seen = _training_rows(folder)
    unseen = [check_overlap(rows, seen, where) for where, rows in _measured_rows(standard.data, slices).items()]
    more = {"checks": [*examined.beside(candidate.checks), *unseen], "baseline": baseline}
    runtime = runner.properties.get("runtime", manifest.format)
    return Measured(candidate.model_copy(update=more), folder, manifest, answers, runtime, examined.notes)


def _measured_rows(data: Data, slices: SlicesAsked) -> dict[str, Data]:
    """The rows of the whole, then those of slices that have their own, by what is said after their file's name."""
    own = {**slices.files, **{name: pairs.data for name, pairs in slices.pairs.items()}}
    return {"": data, **{f", slice {name}": rows for name, rows in own.items()}}


def _training_rows(folder: Path) -> set[str]:
    return {row for rows in read_training_rows(folder).values() for row in rows}


def _notes(opened: dict[str, Manifest]) -> list[str]:
    unverified = [f"{name}: {manifest.unverified}." for name, manifest in opened.items() if manifest.unverified]
    return unverified + [f"{name}: {said}." for name, manifest in opened.items() for said in manifest.caveats]


def _unchecked(measured: Sequence[Measured]) -> list[str]:
    return [f"{item.candidate.name}: {said}" for item in measured for said in item.unchecked]


def _temperatures(candidates: Sequence[Candidate]) -> list[str]:
    return [f"{item.name}: {item.temperature.in_words}" for item in candidates if item.temperature]


def _timed(
    teacher: Checkpoint,
    described: Candidate,
    candidates: list[Candidate],
    artifacts: dict[str, Path],
    opened: dict[str, Manifest],
    settings: BenchSettings,
    progress: Progress,
) -> tuple[Candidate, list[Candidate], BenchResult]:
    """Teacher and artifacts timed in turn, and the teacher's result. A kit is left out: its device is elsewhere, and
    its graph's time here would say nothing."""
    names = [name for name in artifacts if not (opened[name].is_kit or opened[name].stand_in)]
    subjects = [BenchSubject(name="teacher", path=Path(teacher.source), kind="checkpoint", task=teacher.task.name)]
    subjects += [BenchSubject(name=name, path=artifacts[name], kind="artifact") for name in names]
    results = {result.subject.name: result for result in time_side_by_side(subjects, settings, progress.say)}
    baseline = results["teacher"]
    measured = [
        with_latency(candidate, results[candidate.name], baseline) if candidate.name in results else candidate
        for candidate in candidates
    ]
    return with_latency(described, baseline, None), measured, baseline


def _of_the_bench(first: BenchResult) -> dict[str, Any]:
    """What a bench says once, of its first subject: the noise, and energy or why there is none."""
    energy = (
        f"Energy was measured by {first.meter}." if first.meter else f"Energy is not measurable here: {first.no_meter}."
    )
    return {"noise": first.noise, "energy": energy}


def bench(
    subjects: dict[str, Path],
    settings: BenchSettings,
    *,
    scenarios: ScenarioSettings | None = None,
    task: str | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Time checkpoints (eager torch) and artifacts side by side, ratios to the first; then, one after the other, in the
    scenarios of MLPerf that are asked for.

    Raises:
        InputError: a path that is neither.
        BackendUnavailable: scenarios without LoadGen.
    """
    if scenarios is not None:
        require_loadgen()  # before anything is timed
    listed = [
        BenchSubject(name=name, path=path, kind="artifact" if (path / "manifest.json").exists() else "checkpoint",
                     task=task if not (path / "manifest.json").exists() else None)
        for name, path in subjects.items()
    ]  # fmt: skip
    results = time_side_by_side(listed, settings, progress.say)
    candidates = [
        with_latency(_bare_candidate(result), result, results[0] if result is not results[0] else None)
        for result in results
    ]
    if scenarios is not None:
        candidates = [
            with_scenarios(candidate, run_scenarios(subject, scenarios, settings, progress.say))
            for candidate, subject in zip(candidates, listed, strict=True)
        ]
    return Report(
        kind="benchmark",
        title=" against ".join(subjects),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command_line(),
        candidates=candidates,
        environment=facts(),
        **_of_the_bench(results[0]),
    )


def _bare_candidate(result: BenchResult) -> Candidate:
    subject = result.subject
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
