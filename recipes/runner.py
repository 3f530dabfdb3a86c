"""Runs a recipe stage by stage. A stage's folder is named after the hash of its inputs and is complete or absent, so a
second run does only what is missing, and a changed setting runs again just what follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..backends.registry import backend_for
from ..files import files_below, mend_half_done_swap, sha256_of_json, staged_folder, write_text
from ..validate.gates import apply_gates
from ..validate.report import Report, load_report
from .progress import Progress
from .schema import Export, Recipe, Stage
from .sources import Sources, fingerprint_of

if TYPE_CHECKING:
    from ..distill.trainer import TeacherCall
    from ..models.checkpoint import Checkpoint
    from ..models.data import Data

RUN_FILE = "run.json"


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
        keys = self._keys()
        folders = {name: self.out / f"{name}-{key[:12]}" for name, key in keys.items()}
        self._refuse_early(folders)
        if self.recipe.constraints:
            self._stage("plan", folders, self._plan)
        for stage in self.recipe.stages:
            self._stage(stage.name, folders, lambda folder, s=stage: self._change(s, folders, folder))  # type: ignore[misc]
        for export in self.recipe.exports:
            self._stage(export.name, folders, lambda folder, e=export: self._export(e, folders, folder))  # type: ignore[misc]
        self._stage("measurement", folders, lambda folder: self._measure(folders, folder))
        return self._conclude(folders["measurement"])

    def _refuse_early(self, folders: Mapping[str, Path]) -> None:
        """What cannot work is said before anything is trained: a backend that is not here, data without its columns."""
        for export in self.recipe.exports:
            if not folders[export.name].exists():
                backend_for(export.settings())
        if not all(folders[stage.name].exists() for stage in self.recipe.stages):
            for which in ("train", "validation", "calibration"):
                self._data(which)

    def _keys(self) -> dict[str, str]:
        """The hash of everything that each stage depends on."""
        recipe, sources = self.recipe, self._sources
        data = recipe.data
        train = fingerprint_of(sources.data(data.train))
        calibration = fingerprint_of(sources.data(data.calibration)) if data.calibration else train
        keys = {"teacher": sha256_of_json([fingerprint_of(self._teacher_path), recipe.task, __version__])}
        limits = [constraint.model_dump() for constraint in recipe.constraints]
        shapes = [[stage.model_dump() for stage in recipe.stages], [export.model_dump() for export in recipe.exports]]
        keys["plan"] = sha256_of_json([keys["teacher"], limits, shapes, recipe.bench.model_dump()])
        for stage in recipe.stages:
            settings = stage.model_dump(exclude={"name", "start"})
            how = recipe.compiled_teacher and stage.distill is not None
            parts = [keys[recipe.start_of(stage)], keys["teacher"], settings, train, data.columns, how]
            keys[stage.name] = sha256_of_json(parts)
        for export in recipe.exports:
            settings = export.model_dump(exclude={"name", "start", "baseline"})
            keys[export.name] = sha256_of_json([keys[export.start], settings, calibration, data.columns])
        artifacts = {export.name: keys[export.name] for export in recipe.exports}
        validation = fingerprint_of(sources.data(data.validation))
        keys["measurement"] = sha256_of_json([artifacts, validation, recipe.bench.model_dump(), data.columns])
        return keys

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
            plan = make_plan(self.recipe, self._checkpoint("teacher", {}), self._data("train"), self.progress)
            write_text(staging / "plan.json", plan.model_dump_json(indent=2) + "\n")

    def _change(self, stage: Stage, folders: Mapping[str, Path], folder: Path) -> None:
        from .steps import distill, prune

        start = self.recipe.start_of(stage)
        data = self._data("train")
        if stage.distill is not None:
            teacher = self._checkpoint("teacher", folders)
            drawn = stage.distill.layers is not None
            changed = distill(
                self._checkpoint(start, folders) if drawn else teacher,
                stage.distill,
                data,
                student=None if drawn else self._checkpoint(start, folders, fresh=True),
                teacher_call=self._compiled_teacher() if self.recipe.compiled_teacher else None,
                rationale=stage.rationale,
                progress=self.progress,
            )
        else:
            assert stage.prune is not None  # the schema allows exactly one of the two
            before = self._checkpoint(start, folders)
            changed = prune(before, stage.prune, data, rationale=stage.rationale, progress=self.progress)
        changed.save(folder)

    def _export(self, export: Export, folders: Mapping[str, Path], folder: Path) -> None:
        from .steps import export as export_checkpoint

        checkpoint = self._checkpoint(export.start, folders)
        export_checkpoint(
            checkpoint, export.settings(), folder, calibration=self._data("calibration"), progress=self.progress
        )

    def _measure(self, folders: Mapping[str, Path], folder: Path) -> None:
        from ..validate.latency import BenchSettings
        from ..validate.report import save_report
        from .steps import validate

        bench = self.recipe.bench
        report = validate(
            {export.name: folders[export.name] for export in self.recipe.exports},
            self._checkpoint("teacher", folders),
            self._data("validation"),
            latency=BenchSettings(**bench.model_dump()),
            baselines=[export.name for export in self.recipe.exports if export.baseline],
            progress=self.progress,
        )
        with staged_folder(folder) as staging:
            save_report(report, staging)

    def _conclude(self, measurement: Path) -> Report:
        """Gates are applied anew at every run: a changed gate needs no new measurement."""
        from ..validate.rendering import write_report

        report = load_report(measurement)
        stated = [gate for limits in self.recipe.constraints for gate in limits.gates()]
        constraints = [f"{gate.metric} of {gate.candidate}: {gate.limits}" for gate in stated]
        report = report.model_copy(
            update={
                "kind": "run",
                "title": f"{self.recipe.name}: {report.title.partition(' against ')[2]} made small",
                "constraints": constraints,
                "gates": apply_gates(report, self.recipe.all_gates()),
            }
        )
        write_report(report, self.out)
        return report

    def _checkpoint(self, name: str, folders: Mapping[str, Path], fresh: bool = False) -> Checkpoint:
        """A stage's result. Training changes its student in place, so it asks for a copy of its own (`fresh`)."""
        from ..models.checkpoint import load_checkpoint

        path = self._teacher_path if name == "teacher" else str(folders[name])
        if fresh:
            return load_checkpoint(path, self.recipe.task)
        if name not in self._loaded:
            self._loaded[name] = load_checkpoint(path, self.recipe.task)
        return self._loaded[name]  # type: ignore[no-any-return]

    def _compiled_teacher(self) -> TeacherCall:
        """The teacher through OpenVINO, compiled once for all stages of the run."""
        from .steps import openvino_teacher

        if "teacher call" not in self._loaded:
            teacher = self._checkpoint("teacher", {})
            self._loaded["teacher call"] = self._open.enter_context(openvino_teacher(teacher, self.progress))
        return self._loaded["teacher call"]  # type: ignore[no-any-return]

    def _data(self, which: str) -> Data:
        if which not in self._loaded:
            data = self.recipe.data
            source = {"train": data.train, "validation": data.validation, "calibration": data.calibration or data.train}
            teacher = self._checkpoint("teacher", {})
            self._loaded[which] = teacher.read(self._sources.data(source[which]), data.columns)
        return self._loaded[which]  # type: ignore[no-any-return]
