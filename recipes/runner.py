"""Runs a recipe stage by stage. A stage's folder is named after the hash of its inputs and is complete or absent, so a
second run does only what is missing, and a changed setting runs again just what follows from it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.registry import backend_for
from ..errors import InputError, UsageError
from ..files import files_below, mend_half_done_swap, read_document, staged_folder, write_json, write_text
from ..validate.gates.applying import apply_gates
from ..validate.records.profile import load_baseline
from ..validate.records.report import Report, load_report
from .cycle import CYCLE_FILE, CycleRecord, KeptRounds, run_cycle, unknown_floor, with_note
from .keys import Keys, folder_of
from .progress import Progress
from .schema import Export, Recipe, Slices
from .sources import Sources
from .stages import Cycle, Stage

if TYPE_CHECKING:
    from ..distill.distillation import Surroundings
    from ..distill.teacher import TeacherCall
    from ..distill.trainer import Evaluation
    from ..models.checkpoint import Checkpoint
    from ..models.data import Data
    from ..validate.slices.choosing import SlicesAsked
    from ..validate.standard import Standard

_MOST_SHARED = 0.01
"""Share of the development rows that may be validation rows too."""
_TEACHER_OUTPUTS = "teacher-outputs"


@dataclass
class StageRecord:
    """What happened to one stage in this run."""

    name: str
    folder: str
    resumed: bool
    seconds: float


@dataclass
class RecipeRun:
    """One execution of a recipe in a folder; `run()` is the whole of it."""

    recipe: Recipe
    recipe_folder: Path
    out: Path
    progress: Progress
    records: list[StageRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sources = Sources(self.recipe_folder)
        self._teacher_path = self._sources.model(self.recipe.teacher)
        self._loaded: dict[str, Any] = {}
        self._open = ExitStack()

    def run(self) -> Report:
        """Every stage, export and measurement, then the gates and the report.

        Raises:
            UsageError: a constraint that cannot be met, found before anything is trained.
            LimbeckError: whatever stops a stage; the stages before it stay.
        """
        with self._open:
            return self._run()

    def _run(self) -> Report:
        self._keys = Keys(self.recipe, self._sources, self._teacher_path)
        self._key_of = self._keys.everything()
        folders = {name: folder_of(self.out, name, key) for name, key in self._key_of.items()}
        self._refuse_early(folders)
        if self.recipe.constraints:
            self._stage("plan", folders, self._plan)
        for stage in self.recipe.stages:
            self._stage(stage.name, folders, lambda folder, s=stage: self._change(s, folders, folder))  # type: ignore[misc]
        for export in self.recipe.exports:
            self._stage(export.name, folders, lambda folder, e=export: self._export(e, folders, folder))  # type: ignore[misc]
        self._stage("measurement", folders, lambda folder: self._measure(folders, folder))
        return self._conclude(folders)

    def _refuse_early(self, folders: Mapping[str, Path]) -> None:
        """What cannot work is said before anything is trained: a backend that is not here, data without its columns, an
        objective that does not exist, a metric that nothing gives."""
        from .plan import refuse_long_texts
        from .precision_choice import refuse_untimed

        if not folders["measurement"].exists() and self.recipe.slices != Slices():
            self._slices()
        for export in self.recipe.exports:
            if not folders[export.name].exists():
                backend_for(export.settings())
                if export.precision == "auto":
                    refuse_untimed(export.backend)
                if export.measures_quality:
                    self._refuse_shared_rows()
        to_do = [stage for stage in self.recipe.stages if not folders[stage.name].exists()]
        if not to_do:
            return
        data = self.recipe.data
        named = (data.train, data.validation, data.development, data.calibration, *self.recipe.slices.files.values())
        for source in (*named, *(stage.data for stage in to_do)):
            if source is not None:
                self._data(source)
        refuse_long_texts(self.recipe, self._checkpoint("teacher", folders))
        for stage in to_do:
            self._refuse_training(stage)

    def _slices(self) -> SlicesAsked:
        from .slicing import slices_of

        return slices_of(self.recipe, self._checkpoint("teacher", {}), self._sources, self._data)

    def _refuse_training(self, stage: Stage) -> None:
        from ..distill.objectives import build_objectives

        if stage.training is not None and stage.training.objectives is not None:
            task = self._checkpoint("teacher", {}).task
            build_objectives(stage.training.objectives, task, has_labels=True)
        if stage.needs_development is None:
            return
        self._refuse_shared_rows()
        if stage.training is not None and stage.chooses_weights:
            self._evaluation(stage.training.metric)
        if stage.cycle is not None:
            _refuse_untimed(stage, self.recipe)
            known = _scores_of(self._standard())
            for metric in stage.cycle.floor.keys() - known.keys():
                raise UsageError(unknown_floor(metric, known))

    def _refuse_shared_rows(self) -> None:
        development, validation = (
            self._data(name) for name in (self.recipe.data.development or "", self.recipe.data.validation)
        )
        shared = len(set(development.row_hashes) & set(validation.row_hashes))
        if shared > _MOST_SHARED * len(validation):
            raise InputError(
                f"{shared} of the {len(validation)} validation rows are development rows too: what is chosen on them "
                "would be judged by them.",
                "Take other rows for data.development.",
            )

    def _stage(self, name: str, folders: Mapping[str, Path], work: Callable[[Path], None]) -> None:
        """Run one stage into its folder, unless it is there."""
        folder = folders[name]
        mend_half_done_swap(folder)
        started = time.monotonic()
        resumed = folder.is_dir() and any(files_below(folder))
        if resumed:
            self.progress.say(f"{name}: done already")
        else:
            self.progress.begin(name)
            work(folder)
        self.records.append(StageRecord(name, folder.name, resumed, round(time.monotonic() - started, 1)))

    def _plan(self, folder: Path) -> None:
        from .plan import make_plan

        with staged_folder(folder) as staging:
            data = self._data(self.recipe.data.train)
            plan = make_plan(self.recipe, self._checkpoint("teacher", {}), data, self.progress)
            write_text(staging / "plan.json", plan.model_dump_json(indent=2) + "\n")

    def _change(self, stage: Stage, folders: Mapping[str, Path], folder: Path) -> None:
        from ..distill.student import draw_student
        from .steps import prune

        start, data = self.recipe.start_of(stage), self._training_data(stage)
        if stage.cycle is not None:
            self._cycle(stage, stage.cycle, folders, folder)
        elif stage.distill is not None:
            if stage.distill.student is not None:
                self.progress.say("drawing the student")
                source, settings = self._checkpoint(start, folders), stage.distill
                student = draw_student(source, stage.distill.student, data, settings.seed)
            else:
                student = self._checkpoint(start, folders, fresh=True)
            self._train(stage, folders, student, folder.with_name(f"{folder.name}.training")).save(folder)
        else:
            assert stage.prune is not None  # the schema allows exactly one of the three
            before = self._checkpoint(start, folders)
            prune(before, stage.prune, data, rationale=stage.rationale, progress=self.progress).save(folder)

    def _train(self, stage: Stage, folders: Mapping[str, Path], student: Checkpoint, work: Path) -> Checkpoint:
        """Train a student in place as a stage says; killed, it goes on from its last checkpoint in `work`."""
        from ..distill.distillation import distill

        assert stage.training is not None
        self.progress.say("distilling")
        teacher = self._checkpoint(stage.teacher or "teacher", folders)
        return distill(student, teacher, stage.training, self._training_data(stage), self._surroundings(stage, work))

    @contextmanager
    def _runtime(self, recorded: Checkpoint) -> Iterator[TeacherCall]:
        """The teacher in the recipe's runtime, compiled once for all stages that read the same of it."""
        from .teachers import teacher_runtime

        key = f"{recorded.hash} {recorded.recorded}"
        if key not in self._loaded:
            runtime = teacher_runtime(recorded, self.recipe.teacher_runtime, self.progress)
            self._loaded[key] = self._open.enter_context(runtime)
        yield self._loaded[key]

    def _surroundings(self, stage: Stage, work: Path) -> Surroundings:
        from ..distill.distillation import Surroundings
        from .steps import sparsification

        assert stage.training is not None
        cache = None
        if self.recipe.teacher_cache:
            cache = self.out / _TEACHER_OUTPUTS / self._keys.teacher_outputs(stage, self._key_of)[:12]
        return Surroundings(
            teacher_runtime=self._runtime,
            teacher_cache=cache,
            evaluation=self._evaluation(stage.training.metric) if stage.chooses_weights else None,
            work=work,
            modification=sparsification(stage.sparsify) if stage.sparsify is not None else None,
            rationale=stage.rationale,
            progress=self.progress.advance,
        )

    def _cycle(self, stage: Stage, cycle: Cycle, folders: Mapping[str, Path], folder: Path) -> None:
        from .steps import prune

        data, progress = self._training_data(stage), self.progress
        rounds = KeptRounds(
            folder=self.out / f"{stage.name}.rounds",
            key=lambda number: self._keys.round(stage, number, self._key_of),
            measured_with=self._keys.figures(stage, self._key_of),
            prune=lambda model: prune(model, cycle.prune, data, rationale=stage.rationale, progress=progress),
            train=lambda student, work: self._train(stage, folders, student, work),
            costs=functools.partial(self._costs, cycle),
            standard=self._standard(),
            load=self._load,
            progress=progress,
        )
        start = self._checkpoint(self.recipe.start_of(stage), folders)
        kept, record = run_cycle(cycle, start, rounds, progress.say)
        progress.say(record.summary())
        with staged_folder(folder) as staging:
            with_note(kept, stage.name, record).save(staging)
            write_json(staging / CYCLE_FILE, record.model_dump(mode="json"))

    def _costs(self, cycle: Cycle, model: Checkpoint) -> dict[str, float]:
        from .plan import Subject, measured_costs

        if cycle.until is None or cycle.until.export is None:
            return {}
        wanted, data = self.recipe.export_named(cycle.until.export), self.recipe.data
        subject = Subject(model, self._checkpoint("teacher", {}), self._data(data.calibration or data.train))
        found = measured_costs(self.recipe, wanted, subject, cycle.until.limits(), self.progress)
        return {name: value for name, value in found.items() if name in cycle.until.limits()}

    def _export(self, export: Export, folders: Mapping[str, Path], folder: Path) -> None:
        from .precision_choice import export_fastest
        from .steps import export_for_device

        checkpoint, data = self._checkpoint(export.start, folders), self.recipe.data
        development = self._data(data.development) if export.measures_quality and data.development else None
        verb = export_fastest if export.precision == "auto" else export_for_device
        verb(
            checkpoint,
            export.settings(),
            folder,
            calibration=self._data(data.calibration or data.train),
            validation=development,
            progress=self.progress,
        )

    def _measure(self, folders: Mapping[str, Path], folder: Path) -> None:
        from ..validate.attribution.stages import StageAsked
        from ..validate.performance.latency import BenchSettings
        from ..validate.performance.token_times import GenerationSettings
        from ..validate.records.report import save_report
        from .steps import ValidationAsked, validate

        bench = self.recipe.bench
        report = validate(
            {export.name: folders[export.name] for export in self.recipe.exports},
            self._checkpoint("teacher", folders),
            self._data(self.recipe.data.validation),
            ValidationAsked(
                latency=BenchSettings(**bench.of_calls()),
                texts=GenerationSettings(**bench.generate.model_dump()) if bench.generate is not None else None,
                baselines=[export.name for export in self.recipe.exports if export.baseline],
                slices=self._slices(),
                stages=[
                    StageAsked(stage.name, self.recipe.start_of(stage), folders[stage.name])
                    for stage in self.recipe.stages
                ],
            ),
            self.progress,
        )
        with staged_folder(folder) as staging:
            save_report(report, staging)

    def _conclude(self, folders: Mapping[str, Path]) -> Report:
        """Gates are applied anew at every run: a changed gate needs no new measurement."""
        from ..validate.rendering import write_report

        report = load_report(folders["measurement"])
        stated = [gate for limits in self.recipe.constraints for gate in limits.gates()]
        constraints = [f"{gate.metric} of {gate.candidate}: {gate.limits}" for gate in stated]
        report = report.model_copy(
            update={
                "kind": "run",
                "title": f"{self.recipe.name}: {report.title.partition(' against ')[2]} made small",
                "constraints": constraints,
                "gates": apply_gates(report, self.recipe.all_gates()),
                "notes": [*report.notes, *self._notes(folders)],
                "monitoring": load_baseline(folders["measurement"]),
            }
        )
        write_report(report, self.out)
        return report

    def _notes(self, folders: Mapping[str, Path]) -> list[str]:
        """How each cycle ended."""
        cycles = [stage.name for stage in self.recipe.stages if stage.cycle is not None]
        records = {name: read_document(folders[name] / CYCLE_FILE, CycleRecord, 1) for name in cycles}
        return [f"The cycle {name}: {record.summary()}." for name, record in records.items()]

    def _checkpoint(self, name: str, folders: Mapping[str, Path], fresh: bool = False) -> Checkpoint:
        """A stage's result. Training changes its student in place, so it asks for a copy of its own (`fresh`)."""
        path = self._teacher_path if name == "teacher" else str(folders[name])
        if fresh:
            return self._load(path)
        if name not in self._loaded:
            self._loaded[name] = self._load(path)
        return self._loaded[name]  # type: ignore[no-any-return]

    def _load(self, path: str | Path) -> Checkpoint:
        from ..models.checkpoint import load_checkpoint

        return load_checkpoint(path, self.recipe.task)

    def _training_data(self, stage: Stage) -> Data:
        return self._data(stage.data or self.recipe.data.train)

    def _data(self, source: str) -> Data:
        """The rows of a file, read once; under the name that the recipe gives it."""
        if f"data {source}" not in self._loaded:
            path, recipe = self._sources.data(source), self.recipe
            keep = recipe.slices.by if source == recipe.data.validation else ()
            self._loaded[f"data {source}"] = self._checkpoint("teacher", {}).read(path, recipe.data.columns, keep)
        return self._loaded[f"data {source}"]  # type: ignore[no-any-return]

    def _standard(self) -> Standard:
        """The teacher's answers on the development rows, asked once."""
        from ..validate.standard import set_standard

        if "standard" not in self._loaded:
            self.progress.say("the teacher on the development rows")
            rows = self._data(self.recipe.data.development or "")
            self._loaded["standard"] = set_standard(self._checkpoint("teacher", {}), rows)
        return self._loaded["standard"]  # type: ignore[no-any-return]

    def _evaluation(self, metric: str | None) -> Evaluation:
        from .steps import evaluation_on

        name = f"evaluation {metric}"
        if name not in self._loaded:
            rows = self._data(self.recipe.data.development or "")
            self._loaded[name] = evaluation_on(rows, self._checkpoint("teacher", {}), metric)
        return self._loaded[name]  # type: ignore[no-any-return]


def _scores_of(standard: Standard) -> dict[str, float]:
    """The teacher's own metrics: what the development rows give."""
    from ..validate.metrics.quality import score

    return score(
        standard.teacher.task.name,
        standard.predictions,
        standard.predictions,
        standard.references,
        label_names=standard.label_names,
        pairs=standard.pairs,
    )


def _refuse_untimed(stage: Stage, recipe: Recipe) -> None:
    """A kit is compiled on the device it is for: elsewhere nothing could be timed."""
    until = stage.cycle.until if stage.cycle is not None else None
    if until is None or until.export is None or not until.limits().keys() - {"parameters", "size_mb"}:
        return
    backend = backend_for(recipe.export_named(until.export).settings())
    if backend.built_format and not backend.probe().can_run:
        raise UsageError(
            f"The cycle {stage.name} cannot be timed on {until.export}: its device is elsewhere.",
            "Name an export that runs on this machine, or state parameters or size_mb.",
        )
