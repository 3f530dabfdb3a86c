"""One function a verb: what the command line and recipes call, and what a Python user imports."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ..backends.base import ExportJob
from ..backends.registry import backend_for, backend_of_format, get_backend, load_runner
from ..distill.callbacks import Modification
from ..distill.distillation import Surroundings
from ..distill.distillation import distill as train_student
from ..distill.settings import DistillSettings
from ..distill.student import draw_student
from ..distill.trainer import Evaluation
from ..environment import facts
from ..errors import ExportMismatch, UsageError, did_you_mean
from ..exporters.artifact import CheckRecord, Manifest, open_artifact, read_manifest, seal
from ..exporters.inputs import probe_batches, token_stream
from ..exporters.program import ExportedProgram
from ..exporters.settings import QUANTISED, ExportSettings
from ..files import check_output_folder, files_below, staged_folder, write_json
from ..models.batching import Batch, Examples, pad
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.lineage import TRAINING_ROWS_FILE, read_training_rows
from ..prune.gradual import SparsityInTraining
from ..prune.pruning import prune as prune_checkpoint
from ..prune.settings import PruneSettings
from ..prune.sparsify_settings import SparsifySettings
from ..validate.gates import apply_gates
from ..validate.latency import BenchResult, BenchSettings, BenchSubject
from ..validate.latency import bench as time_side_by_side
from ..validate.measurement import (
    check_overlap,
    describe_teacher,
    measure_artifact,
    score_checkpoint,
    set_standard,
    with_latency,
)
from ..validate.parity import check_parity
from ..validate.quality import headline_metric, higher_is_better, score
from ..validate.report import Candidate, Gate, Report
from ..validate.weight_audit import audit_weights
from .progress import SILENT, Progress

_NOT_AUDITED = "its weights were not compared with the checkpoint's, for the backend cannot read them back"


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


def calibration_batches(checkpoint: Checkpoint, data: Data | None, samples: int) -> list[Batch]:
    """Real inputs, one row a batch (so that no padding distorts what an int8 range is set by)."""
    if data is None:
        return []
    examples: Examples = checkpoint.task.examples(
        data.head(samples), checkpoint.tokenizer, checkpoint.max_length, checkpoint.model.config
    )
    batches = (pad([feature], checkpoint.tokenizer) for feature in examples.features[:samples])
    return [checkpoint.model_inputs(batch) for batch in batches]


def export(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    out: Path,
    *,
    calibration: Data | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Manifest:
    """Export a checkpoint to an artifact folder, checked before it appears: outputs at several shapes against torch,
    and every weight against the checkpoint's.

    Raises:
        ExportMismatch: the program does not compute what the checkpoint computes; nothing is left at `out`.
        UsageError: a precision or sparsity that the backend does not have, or an `out` that holds something.
        BackendUnavailable: a package that the export needs is missing.
    """
    backend = backend_for(settings)
    settings = _for_model(settings, checkpoint)
    check_output_folder(out, overwrite)
    batches = calibration_batches(checkpoint, calibration, settings.calibration_samples)
    with staged_folder(out, overwrite) as folder:
        program = backend.export(ExportJob(checkpoint, settings, batches, progress.say), folder)
        # transformers' exporters write the configuration too; it goes with the model, not with the program.
        program_files = [path.as_posix() for path in files_below(folder) if path.as_posix() != "config.json"]
        checkpoint.model.config.save_pretrained(folder)
        checkpoint.tokenizer.save_pretrained(folder)
        if checkpoint.task.name == "sentence-similarity":
            checkpoint.save_pooling(folder)
        if checkpoint.training_rows:
            write_json(folder / TRAINING_ROWS_FILE, dict(checkpoint.training_rows))
        manifest = _manifest(checkpoint, settings, program)
        checks = _check(checkpoint, settings, program, folder, manifest, batches, progress)
        return seal(manifest.model_copy(update={"checks": checks, "program_files": program_files}), folder)


def _for_model(settings: ExportSettings, checkpoint: Checkpoint) -> ExportSettings:
    """The settings with sizes that the model has positions for."""
    try:
        return settings.model_copy(update={"shapes": settings.shapes.within(checkpoint.max_length)})
    except ValueError as error:
        raise UsageError(
            f"The smallest sequence {settings.shapes.min_sequence} is longer than the {checkpoint.max_length} tokens "
            f"that {checkpoint.source} has positions for."
        ) from error


def _manifest(checkpoint: Checkpoint, settings: ExportSettings, program: ExportedProgram) -> Manifest:
    return Manifest(
        format=program.format,
        task=checkpoint.task.name,
        settings=settings,
        parent_hash=checkpoint.hash,
        parent=checkpoint.source,
        parameters=checkpoint.parameters,
        inputs=program.inputs,
        outputs=program.outputs,
        max_length=checkpoint.max_length,
        compile_properties=dict(program.compile_properties),
        sparse_layers=program.sparse_layers,
        evidence=dict(program.evidence),
        unverified=program.unverified or (_NOT_AUDITED if program.weights is None else None),
        is_kit=program.is_kit,
        lineage=checkpoint.lineage,
    )


def _check(
    checkpoint: Checkpoint,
    settings: ExportSettings,
    program: ExportedProgram,
    folder: Path,
    manifest: Manifest,
    batches: Sequence[Batch],
    progress: Progress,
) -> list[CheckRecord]:
    checks = []
    if program.weights is not None:
        progress.say("auditing the weights")
        checks.append(audit_weights(checkpoint.module, program.weights, quantised=settings.precision in QUANTISED))
    progress.say("comparing outputs with torch")
    runner = get_backend(settings.backend).load(folder, manifest)
    for name, wanted in program.compile_properties.items():
        if (found := runner.properties.get(name, wanted)) != wanted:
            progress.say(f"this machine's runtime compiles {name}={found} where {wanted} was asked for")
    try:
        probes = probe_batches(checkpoint, settings.shapes, token_stream(batches))
        checks.insert(0, check_parity(runner, checkpoint.run, probes, settings.precision))
    finally:
        runner.close()
    for check in checks:
        if not check.passed:
            raise ExportMismatch(
                f"The exported {settings.backend} {settings.precision} program is not the model: "
                f"{check.name}: {check.detail}.",
                "Nothing was written. Try another --precision; if float32 fails too, please report it.",
            )
    return checks


def build(kit: Path, out: Path, *, overwrite: bool = False, progress: Progress = SILENT) -> Manifest:
    """Turn a kit into the program for this machine's device.

    Raises:
        BackendUnavailable: the compiler or the device is not here.
        IntegrityError: the kit is not as it was exported.
    """
    manifest = open_artifact(kit)
    check_output_folder(out, overwrite)
    backend = backend_of_format(manifest.format)
    with staged_folder(out, overwrite) as folder:
        for name in set(manifest.files) - set(manifest.program_files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kit / name, folder / name)
        evidence = backend.build(kit, manifest, folder, progress.say)
        changes = {"format": backend.built_format, "is_kit": False, "unverified": None, "program_files": []}
        return seal(manifest.model_copy(update={**changes, "evidence": {**manifest.evidence, **evidence}}), folder)


def validate(
    artifacts: dict[str, Path],
    teacher: Checkpoint,
    data: Data,
    *,
    gates: Sequence[Gate] = (),
    latency: BenchSettings | None = None,
    baselines: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Report:
    """Hold compiled artifacts against their teacher on the same examples, and time them side by side.

    Args:
        artifacts: name in the report to artifact folder.
        latency: how to time teacher and artifacts; not timed when not given.
        baselines: names of artifacts that are measured for comparison only: gates do not look at them.
    """
    opened = {name: open_artifact(folder) for name, folder in artifacts.items()}
    progress.say("teacher")
    standard = set_standard(teacher, data, progress=progress.advance)
    candidates = []
    for name, folder in artifacts.items():
        progress.say(name)
        runner, manifest = load_runner(folder)
        try:
            candidate = measure_artifact(name, folder, manifest, runner, standard, progress.advance)
        finally:
            runner.close()
        overlap = check_overlap(data, _training_rows(folder))
        more = {"checks": [*candidate.checks, overlap], "baseline": name in baselines}
        candidates.append(candidate.model_copy(update=more))
    described = describe_teacher(teacher)
    if latency is not None:
        described, candidates = _timed(teacher, described, candidates, artifacts, opened, latency, progress)
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
        data=[f"{Path(data.source).name}: {len(data)} rows, fingerprint {data.fingerprint[:16]}"],
        notes=_notes(opened),
    )
    return report.model_copy(update={"gates": apply_gates(report, gates)}) if gates else report


def command_line() -> str:
    """What was typed, for the record."""
    return " ".join(["limbeck", *(shlex.quote(word) for word in sys.argv[1:])])


def _training_rows(folder: Path) -> set[str]:
    return {row for rows in read_training_rows(folder).values() for row in rows}


def _notes(opened: dict[str, Manifest]) -> list[str]:
    return [f"{name}: {manifest.unverified}." for name, manifest in opened.items() if manifest.unverified]


def _timed(
    teacher: Checkpoint,
    described: Candidate,
    candidates: list[Candidate],
    artifacts: dict[str, Path],
    opened: dict[str, Manifest],
    settings: BenchSettings,
    progress: Progress,
) -> tuple[Candidate, list[Candidate]]:
    """Teacher and artifacts timed in turn. A kit is left out: its device is elsewhere, and its graph's time here would
    say nothing."""
    names = [name for name in artifacts if not opened[name].is_kit]
    subjects = [BenchSubject(name="teacher", path=Path(teacher.source), kind="checkpoint", task=teacher.task.name)]
    subjects += [BenchSubject(name=name, path=artifacts[name], kind="artifact") for name in names]
    results = {result.subject.name: result for result in time_side_by_side(subjects, settings, progress.say)}
    baseline = results["teacher"]
    return with_latency(described, baseline, None), [
        with_latency(candidate, results[candidate.name], baseline) if candidate.name in results else candidate
        for candidate in candidates
    ]


def bench(
    subjects: dict[str, Path], settings: BenchSettings, *, task: str | None = None, progress: Progress = SILENT
) -> Report:
    """Time checkpoints (eager torch) and artifacts side by side; ratios are to the first.

    Raises:
        InputError: a path that is neither.
    """
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
    return Report(
        kind="benchmark",
        title=" against ".join(subjects),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command_line(),
        candidates=candidates,
        environment=facts(),
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
