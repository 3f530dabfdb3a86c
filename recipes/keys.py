"""What each part of a run depends on, as hashes: they name its folders, so that what is there already is what would be
made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..distill.objectives import DEFAULT_OBJECTIVES, OBJECTIVES, Objective
from ..distill.settings import DistillSettings
from ..files import sha256_of_json
from .schema import Recipe
from .sources import Sources, fingerprint_of
from .stages import Stage

_NAMES = {"name", "start", "teacher", "data"}
"""Of a stage: what they stand for is in the key, so renaming runs nothing again."""


@dataclass(frozen=True)
class Keys:
    """The hashes of one recipe on the data and models that are here now."""

    recipe: Recipe
    sources: Sources
    teacher_path: str
    _files: dict[str, str] = field(default_factory=dict)

    def data(self, name: str) -> str:
        """The hash of a data file; read once."""
        if name not in self._files:
            self._files[name] = fingerprint_of(self.sources.data(name))
        return self._files[name]

    def everything(self) -> dict[str, str]:
        """The key of `teacher`, `plan`, `measurement`, and of every stage and export by its name."""
        recipe, data = self.recipe, self.recipe.data
        keys = {"teacher": sha256_of_json([fingerprint_of(self.teacher_path), recipe.task, __version__])}
        keys["plan"] = self._plan(keys["teacher"])
        for stage in recipe.stages:
            keys[stage.name] = self._stage(stage, keys)
        calibration = self.data(data.calibration or data.train)
        for export in recipe.exports:
            settings = export.model_dump(exclude={"name", "start", "baseline"})
            parts = [keys[export.start], settings, calibration, data.columns]
            chosen_on = [self.data(data.development or "")] if export.measures_quality else []
            keys[export.name] = sha256_of_json([*parts, *chosen_on])
        artifacts = {export.name: keys[export.name] for export in recipe.exports}
        stages = {stage.name: [keys[stage.name], recipe.start_of(stage)] for stage in recipe.stages}
        measured: list[Any] = [artifacts, self.data(data.validation), recipe.bench.model_dump(), data.columns, stages]
        others = {name: self.data(file) for name, file in recipe.slices.files.items()}
        measured.append([others, recipe.slices.by, recipe.slices.builtin])
        measured.append(
            {name: [pairs.model_dump(), self.data(pairs.file)] for name, pairs in recipe.slices.pairs.items()}
        )
        keys["measurement"] = sha256_of_json(measured)
        return keys

    def _plan(self, teacher: str) -> str:
        recipe = self.recipe
        limits = [constraint.model_dump() for constraint in recipe.constraints]
        shapes = [[stage.model_dump() for stage in recipe.stages], [export.model_dump() for export in recipe.exports]]
        return sha256_of_json([teacher, limits, shapes, recipe.bench.of_calls()])

    def _stage(self, stage: Stage, keys: Mapping[str, str]) -> str:
        settings = stage.model_dump(exclude=_NAMES | {"cycle"})
        parts = [self._start(stage, keys), settings]
        if stage.cycle is not None:
            parts += [stage.cycle.model_dump(exclude={"until": {"export"}}), self.figures(stage, keys)]
        return sha256_of_json(parts)

    def _start(self, stage: Stage, keys: Mapping[str, str]) -> list[Any]:
        """What a stage finds when it begins: models, data, and how the teacher's outputs come about."""
        recipe = self.recipe
        text = self.data(stage.data or recipe.data.train)
        parts: list[Any] = [keys[recipe.start_of(stage)], text, recipe.data.columns]
        if stage.training is not None:
            parts += [keys[stage.teacher or "teacher"], recipe.teacher_runtime, recipe.teacher_cache]
        if stage.chooses_weights:
            parts += [keys["teacher"], self.data(recipe.data.development or "")]
        return parts

    def round(self, stage: Stage, number: int, keys: Mapping[str, str]) -> str:
        """The key of a cycle's round. How many there may be, and when they stop, is no part of it: a longer cycle goes
        on from the rounds of a shorter one."""
        assert stage.cycle is not None
        done = stage.cycle.model_dump(include={"prune", "distill"})
        return sha256_of_json([self._start(stage, keys), done, stage.rationale, number])

    def figures(self, stage: Stage, keys: Mapping[str, str]) -> str:
        """The key of what the figures of a cycle's rounds depend on beside the model."""
        recipe, until = self.recipe, stage.cycle.until if stage.cycle is not None else None
        parts: list[Any] = [keys["teacher"], self.data(recipe.data.development or ""), recipe.data.columns]
        if until is not None and until.export is not None:
            calibration = self.data(recipe.data.calibration or recipe.data.train)
            export = recipe.export_named(until.export).settings().model_dump()
            parts += [export, calibration, sorted(until.limits()), recipe.bench.of_calls()]
        return sha256_of_json(parts)

    def teacher_outputs(self, stage: Stage, keys: Mapping[str, str]) -> str:
        """The key of what a stage reads of its teacher: stages with the same one may share a cache."""
        assert stage.training is not None
        # What a map of layers reads depends on how deep the student is, hence on every drawing that led to it.
        drawn = [above.distill.student for above in self.recipe.path_to(stage.name) if above.distill is not None]
        student: list[Any] = [settings.model_dump() for settings in drawn if settings is not None]
        text = [self.data(stage.data or self.recipe.data.train), self.recipe.data.columns, stage.training.max_length]
        read = outputs_read(stage.training, self.recipe.task)
        if "'similar'" in repr(read):
            student.append(keys[self.recipe.start_of(stage)])
        return sha256_of_json([keys[stage.teacher or "teacher"], self.recipe.teacher_runtime, text, student, read])


def outputs_read(settings: DistillSettings, task: str) -> Sequence[Any]:
    """What objectives read of the teacher, each thing once: the plain output, or an objective's own view of it with the
    settings that may shape that view. Weights are no part of it."""
    read: list[Any] = []
    for name, value in (settings.objectives or DEFAULT_OBJECTIVES[task]).items():
        kind = OBJECTIVES.get(name)
        if kind is not None and not kind.needs_teacher:
            continue
        own = {key: part for key, part in value.items() if key != "weight"} if isinstance(value, Mapping) else {}
        plain = kind is not None and kind.teacher_view is Objective.teacher_view and kind.pairs is Objective.pairs
        view = "output" if plain else [name, own]
        if view not in read:
            read.append(view)
    return read


def folder_of(out: Path, name: str, key: str) -> Path:
    """Where the part of a run with this key lies."""
    return out / f"{name}-{key[:12]}"
