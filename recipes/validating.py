"""Artifacts held against their teacher: checked, measured on the same examples, attributed, timed and gated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..backends.registry import backend_to_run, load_runner
from ..environment import facts
from ..errors import BackendUnavailable, InputError
from ..exporters.artifact import Manifest, open_artifact
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.lineage import read_training_rows
from ..validate.attribution.points import AttributionAsked, Measured, Progressing, attribute
from ..validate.attribution.stages import StageAsked, measure_stages
from ..validate.baseline import Monitoring
from ..validate.checks import examine, subject_of
from ..validate.gates.applying import apply_gates
from ..validate.gates.relative import check_references
from ..validate.generation.greedy import check_prompts, set_generation
from ..validate.generation.harness import HarnessAsked, open_harness
from ..validate.measurement import (
    check_overlap,
    describe_artifact,
    describe_teacher,
    measure_artifact,
    require_same_task,
)
from ..validate.performance.latency import BenchSettings, BenchSubject
from ..validate.performance.token_times import GenerationSettings
from ..validate.predictions import Predictions
from ..validate.records.report import Candidate, Gate, Report, StageResult
from ..validate.slices.choosing import SlicesAsked, check_builtin, with_slices
from ..validate.standard import Standard, set_standard
from .benching import Timed, command_line, now, timed_beside, writing_alone, written_beside
from .bisection import modules_apart
from .inspection import artifact_matrices
from .progress import SILENT, Progress


@dataclass(frozen=True)
class ValidationAsked:
    """What to look at beside quality on the rows as they are."""

    gates: Sequence[Gate] = ()
    latency: BenchSettings | None = None
    """How teacher and artifacts are timed side by side; they are not when not given."""
    texts: GenerationSettings | None = None
    """How text that they write is timed; it is not when not given, nor where latency is not."""
    baselines: Sequence[str] = ()
    """Artifacts that are measured for comparison only: gates do not look at them."""
    slices: SlicesAsked = field(default_factory=SlicesAsked)
    """Parts of the rows, and rows beside them, to measure each on its own as well."""
    generation: int | None = None
    """Prompts whose greedy text is compared, where the task is to write; 20 when not given."""
    harness: HarnessAsked = field(default_factory=HarnessAsked)
    """Tasks of the lm-evaluation-harness to run teacher and artifacts on."""
    stages: Sequence[StageAsked] = ()
    """Checkpoints on the way from the teacher to what was exported: what each cost is measured too."""
    attribution: AttributionAsked | None = field(default_factory=AttributionAsked)
    """Measure the points between teacher and artifacts too: their students, and those exported."""
    modules: bool = False
    """Compare what each module hands on between those points, on a few rows."""


def validate(
    artifacts: Mapping[str, Path],
    teacher: Checkpoint,
    data: Data,
    asked: ValidationAsked | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Hold compiled artifacts against their teacher on the same examples.

    Args:
        artifacts: name in the report to artifact folder.

    Raises:
        InputError: an artifact of another task, data without what the task needs, or a gate that holds nothing.
        IntegrityError: an artifact whose files are not those of its manifest.
        UsageError: slices or prompts that the task cannot have.
    """
    asked = asked or ValidationAsked()
    check_references(asked.gates, previous_given=False)
    check_builtin(asked.slices.builtin, teacher.task.name)
    check_prompts(asked.generation, teacher.task.name)
    opened = {name: open_artifact(folder) for name, folder in artifacts.items()}
    for name, manifest in opened.items():
        backend_to_run(artifacts[name], manifest)  # refused now, and not when the teacher has been measured
    if asked.attribution is not None:
        asked.attribution.check(opened)
    report = _Validation(dict(artifacts), opened, asked, progress).report(teacher, data)
    return report.model_copy(update={"gates": apply_gates(report, asked.gates)}) if asked.gates else report


@dataclass(frozen=True)
class _Validation:
    """One validation of opened artifacts."""

    artifacts: dict[str, Path]
    opened: dict[str, Manifest]
    asked: ValidationAsked
    progress: Progress

    def report(self, teacher: Checkpoint, data: Data) -> Report:
        standard, monitoring = self._standard(teacher, data)
        stages, known = measure_stages(self.asked.stages, standard, self._told)
        measured = [self._measured(name, folder, standard) for name, folder in self.artifacts.items()]
        candidates = self._attributed(measured, standard, known)
        candidates, hidden = self._looked_into(candidates, data)
        timed = self._timed(teacher, describe_teacher(teacher), candidates, measured)
        newest = max(self.opened.values(), key=lambda manifest: len(manifest.lineage.steps))
        return Report(
            kind="validation",
            title=f"{', '.join(self.artifacts)} against {teacher.lineage.origin}",
            created=now(),
            command=command_line(),
            teacher=timed.teacher,
            candidates=timed.candidates,
            stages=[self._written(stage) for stage in stages],
            steps=newest.lineage.steps,
            environment=facts(),
            data=[
                f"{Path(rows.source).name}{where}: {len(rows)} rows, fingerprint {rows.fingerprint[:16]}"
                for where, rows in self._rows(data).items()
            ],
            notes=[*_notes(self.opened), *_unchecked(measured), *_temperatures(candidates), *hidden],
            monitoring=monitoring.baseline({name: manifest.artifact_id for name, manifest in self.opened.items()}),
            noise=timed.noise,
            energy=timed.energy,
        )

    def _standard(self, teacher: Checkpoint, data: Data) -> tuple[Standard, Monitoring]:
        """The teacher's own answers to everything that candidates will be asked."""
        asked, progress, tasks = self.asked, self.progress, None
        if asked.harness.tasks:
            progress.say("teacher, on the harness's tasks")
            tasks = open_harness(asked.harness, teacher, progress.advance)
        progress.say("teacher")
        limit = min([teacher.max_length, *(manifest.max_length for manifest in self.opened.values())])
        same_windows = limit if teacher.task.name == "text-generation" else None
        standard = set_standard(teacher, data, max_length=same_windows, progress=progress.advance)
        standard = with_slices(standard, asked.slices, limit, progress.advance)
        texts, monitoring = set_generation(standard, asked.generation, limit), Monitoring(standard)
        return replace(standard, observers=tuple(filter(None, (monitoring, texts, tasks)))), monitoring

    def _measured(self, name: str, folder: Path, standard: Standard) -> Measured:
        """One artifact, loaded, checked, measured and freed; without answers where a check says why it gives none."""
        runner, manifest = load_runner(folder)
        require_same_task(folder, manifest, standard.teacher)
        given = self.asked.attribution.student if self.asked.attribution is not None else None
        with closing(runner):
            self.progress.say(f"checking {name}")
            examined = examine(subject_of(folder, manifest, runner, standard, at_hand=given))
            self.progress.say(name)
            try:
                candidate, answers = measure_artifact(name, folder, manifest, runner, standard, self.progress.advance)
                candidate = candidate.model_copy(update={"matrices": artifact_matrices(folder, manifest)})
            except InputError:
                if examined.passed:
                    raise
                candidate, answers = describe_artifact(name, folder, manifest), {}
        seen = {row for rows in read_training_rows(folder).values() for row in rows}
        unseen = [check_overlap(rows, seen, where) for where, rows in self._rows(standard.data).items()]
        checks = [*examined.beside(candidate.checks), *unseen]
        candidate = candidate.model_copy(update={"checks": checks, "baseline": name in self.asked.baselines})
        runtime = runner.properties.get("runtime", manifest.format)
        return Measured(candidate, folder, manifest, answers, runtime, examined.notes)

    def _rows(self, data: Data) -> dict[str, Data]:
        """The rows of the whole, then those of slices that have their own, by what is said after their file's name."""
        slices = self.asked.slices
        own = {**slices.files, **{name: pairs.data for name, pairs in slices.pairs.items()}}
        return {"": data, **{f", slice {name}": rows for name, rows in own.items()}}

    @property
    def _told(self) -> Progressing:
        return Progressing(self.progress.say, self.progress.advance)

    def _attributed(
        self, measured: Sequence[Measured], standard: Standard, known: Mapping[str, Predictions]
    ) -> list[Candidate]:
        candidates = [item.candidate for item in measured]
        if self.asked.attribution is None:
            return candidates
        runnable = [item for item in measured if item.answers]
        attributed = attribute(runnable, standard, self.asked.attribution, self._told, known)
        found = {item.name: item for item in attributed}
        return [found.get(candidate.name, candidate) for candidate in candidates]

    def _looked_into(self, candidates: list[Candidate], data: Data) -> tuple[list[Candidate], list[str]]:
        """With what each module hands on, where that was asked for; and of which it cannot be seen, in words."""
        if not self.asked.modules:
            return candidates, []
        given = self.asked.attribution.student if self.asked.attribution is not None else None
        found, hidden = [], []
        for item in candidates:
            folder, manifest = self.artifacts[item.name], self.opened[item.name]
            # one of several artifacts' students may be given; the others' are looked for
            student = given.source if given is not None and given.hash == manifest.parent_hash else None
            self.progress.say(f"looking into {item.name}")
            try:
                apart = modules_apart(folder, manifest, data, student=student, progress=self.progress)
            except (BackendUnavailable, InputError) as error:
                apart = []
                hidden.append(f"{item.name}: its modules were not compared. {error.message}")
            found.append(item.model_copy(update={"modules": apart}))
        return found, hidden

    def _timed(
        self, teacher: Checkpoint, described: Candidate, candidates: list[Candidate], measured: Sequence[Measured]
    ) -> Timed:
        """A kit is left out: its device is elsewhere, and its graph's time here would say nothing."""
        if self.asked.latency is None:
            return Timed(described, candidates)
        runnable = {item.candidate.name for item in measured if item.answers}
        timeable = {
            name: self.artifacts[name]
            for name, manifest in self.opened.items()
            if name in runnable and not (manifest.is_kit or manifest.stand_in)
        }
        timed = timed_beside(teacher, Timed(described, candidates), timeable, self.asked.latency, self.progress)
        if self.asked.texts is None:
            return timed
        writing = {name: folder for name, folder in timeable.items() if self.opened[name].cache is not None}
        return written_beside(teacher, timed, writing, self.asked.texts, self.asked.latency, self.progress)

    def _written(self, stage: StageResult) -> StageResult:
        """With the speed at which it writes text, by itself: stages of a large model have no room beside each other."""
        if self.asked.texts is None or self.asked.latency is None:
            return stage
        folder = next(each.folder for each in self.asked.stages if each.name == stage.name)
        subject = BenchSubject(name=stage.name, path=folder, kind="checkpoint")
        speed = writing_alone(subject, self.asked.texts, self.asked.latency, self.progress)
        return stage.model_copy(update={"metrics": [*stage.metrics, *speed]})


def _notes(opened: Mapping[str, Manifest]) -> list[str]:
    unverified = [f"{name}: {manifest.unverified}." for name, manifest in opened.items() if manifest.unverified]
    return unverified + [f"{name}: {said}." for name, manifest in opened.items() for said in manifest.caveats]


def _unchecked(measured: Sequence[Measured]) -> list[str]:
    return [f"{item.candidate.name}: {said}" for item in measured for said in item.unchecked]


def _temperatures(candidates: Sequence[Candidate]) -> list[str]:
    return [f"{item.name}: {item.temperature.in_words}" for item in candidates if item.temperature]
