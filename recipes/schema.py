"""The recipe: a YAML file that says what to make of a teacher, what it must reach, and how that is measured."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from ..errors import InputError, UsageError
from ..exporters.settings import ExportSettings, Precision, ShapeRange
from ..files import read_yaml
from ..models.tasks.language_modeling import TextGeneration
from ..validate.metrics.headline import higher_is_better
from ..validate.records.report import Gate, describe_problems
from ..validate.rows.pairs import PairKind
from ..validate.rows.perturbations import BuiltinSlice
from .stages import RecipePart, Stage

_Size = Annotated[int, Field(ge=1)]
_RESERVED = ("plan", "measurement")
_WHY_DEVELOPMENT = "choosing on data.validation would fit the result to the rows that gates judge it by"


class DataSources(RecipePart):
    """Files relative to the recipe (`${NAME}` in a path is an environment variable), Hugging Face ids, or
    `builtin:train` and `builtin:validation`."""

    train: str
    validation: str
    """What gates judge on; nothing is chosen by it."""
    development: str | None = None
    """What weights and rounds are chosen on: early stopping, the best checkpoint, a cycle's floor."""
    calibration: str | None = None
    """What int8 is calibrated on; the training text when not given."""
    columns: dict[str, str] = Field(default_factory=dict)


class Export(RecipePart):
    """One artifact. A baseline (`start: teacher`) is measured beside the candidates and never gated."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    start: str
    backend: str
    precision: Precision | Literal["auto"] = "fp32"
    """`auto`: the fastest here that keeps `floor` (0.99 where not given) of the checkpoint's quality on
    `data.development`."""
    floor: float | None = Field(None, gt=0, le=1)
    """Share of the checkpoint's own quality on `data.development` that the program keeps."""
    sparsity: Literal["2:4"] | None = None
    shapes: ShapeRange = ShapeRange()
    calibration_samples: int = Field(300, ge=1)
    tokenizer_graph: bool = False
    """Whether the tokenizer is written as a graph too (openvino-tokenizers, onnxruntime-extensions)."""
    kv_cache: bool = True
    """Whether a language model's program keeps keys and values of what it has read, and so writes text."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The backend's own (`limbeck backends NAME` lists them)."""
    baseline: bool = False

    def settings(self) -> ExportSettings:
        """What the exporter is asked for; float32 stands for a precision that is yet to be found."""
        values = self.model_dump(exclude={"name", "start", "baseline"})
        return ExportSettings(**{**values, "precision": "fp32" if self.precision == "auto" else self.precision})

    @property
    def measures_quality(self) -> bool:
        """Whether it is chosen or refused by its quality."""
        return self.precision == "auto" or self.floor is not None


class Constraints(RecipePart):
    """What the result must reach, stated before anything is trained."""

    artifact: str = "*"
    """Which artifacts are meant (a glob on their names)."""
    latency_p50_ms: float | None = Field(None, gt=0)
    latency_p90_ms: float | None = Field(None, gt=0)
    latency_p99_ms: float | None = Field(None, gt=0)
    speedup_p50: float | None = Field(None, gt=0)
    """At least so many times faster than the eager teacher."""
    size_mb: float | None = Field(None, gt=0)
    peak_memory_mb: float | None = Field(None, gt=0)
    energy_mj: float | None = Field(None, gt=0)
    """Millijoules a call. Refused before training on a machine whose meter cannot be read."""
    quality: dict[str, float] = Field(default_factory=dict)
    """Metric to its worst tolerable value: the least (`spearman_kept: 0.97`), or of what is better lower the most
    (`perplexity_ratio: 1.2`)."""

    def limits(self) -> dict[str, float]:
        """The limits on cost that were stated, by metric."""
        stated = self.model_dump(exclude={"artifact", "quality"}, exclude_none=True)
        return {name: float(value) for name, value in stated.items()}

    def gates(self) -> list[Gate]:
        """The same as gates on the measured result."""
        why = "a constraint of the recipe"
        cost = [
            Gate(metric=name, candidate=self.artifact, why=why, **{"min" if name == "speedup_p50" else "max": limit})
            for name, limit in self.limits().items()
        ]
        return cost + [
            Gate(metric=name, candidate=self.artifact, why=why, **{"min" if higher_is_better(name) else "max": worst})
            for name, worst in self.quality.items()
        ]

    def means(self, artifact: str) -> bool:
        """Whether an artifact of this name is meant."""
        return fnmatchcase(artifact, self.artifact)


class PairsFile(RecipePart):
    """A file whose rows belong together (see docs/validation.md)."""

    kind: PairKind
    file: str
    columns: dict[str, str] = Field(default_factory=dict)
    """Field (first, second, group, side, or one of the task's) to column, where it cannot be guessed."""


class Slices(RecipePart):
    """What is measured beside the whole of `data.validation`, each on its own, so that its mean hides none of it.

    ```yaml
    slices:
      files: {long: long-reviews.jsonl}
      by: [topic]
      builtin: [length, typos]
      pairs:
        edited: {kind: counterfactual, file: edited.jsonl, columns: {group: pair_id}}
    ```
    """

    files: dict[str, str] = Field(default_factory=dict)
    """Other rows, by the name of their slice."""
    by: list[str] = Field(default_factory=list)
    """Columns of `data.validation`: one slice a value."""
    builtin: list[BuiltinSlice] = Field(default_factory=list)
    pairs: dict[str, PairsFile] = Field(default_factory=dict)
    """Other rows, of which some belong together, by the name of their slice."""


class Texts(RecipePart):
    """Text that is written under a stopwatch: every batch size with every prompt length (in tokens), the first of which
    metrics are named after."""

    batch_size: list[_Size] = Field([1], min_length=1)
    prompt_length: list[_Size] = Field([128], min_length=1)
    new_tokens: int = Field(32, ge=2)
    """Written after each prompt, whatever they are."""

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.prompt_length) + self.new_tokens


class Bench(RecipePart):
    """How latency is measured."""

    batch_size: int = Field(1, ge=1)
    sequence_length: int = Field(128, ge=1)
    threads: int | None = Field(None, ge=1)
    rounds: int = Field(5, ge=1)
    generate: Texts | None = None
    """Of language models, how fast text is written as well: by the teacher and each stage (in eager torch), and by each
    program with a cache."""

    def of_calls(self) -> dict[str, Any]:
        """How single calls are timed."""
        return self.model_dump(exclude={"generate"})


class Recipe(RecipePart):
    """A whole run, from teacher to report."""

    version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    teacher: str
    """A local folder (relative to the recipe; `${NAME}` in it is an environment variable), a hub id, or
    `package:NAME/FOLDER` for a model in a pip package."""
    task: str
    data: DataSources
    constraints: list[Constraints] = Field(default_factory=list)
    teacher_runtime: Literal["eager", "openvino", "onnx", "torch-compile"] = "eager"
    """What computes the teacher's outputs while distilling; a compiled teacher is checked against eager torch first."""
    teacher_cache: bool = False
    """Keep the teacher's outputs in the run's folder, for stages that read the same of it on the same text."""
    stages: list[Stage] = Field(min_length=1)
    exports: list[Export] = Field(min_length=1)
    bench: Bench = Bench()
    slices: Slices = Slices()
    gates: list[Gate] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        known = {"teacher"}
        for stage in self.stages:
            if stage.start is not None and stage.start not in known:
                raise ValueError(f"the stage {stage.name} starts from {stage.start}, which no stage above it makes")
            if stage.teacher is not None and stage.teacher not in known:
                raise ValueError(f"the stage {stage.name} is taught by {stage.teacher}, which no stage above it makes")
            if stage.name in known:
                raise ValueError(f"the name {stage.name} is given twice")
            known.add(stage.name)
        names = [export.name for export in self.exports]
        for name in _RESERVED:
            if name in known or name in names:
                raise ValueError(f"the name {name} is taken: a run writes a folder of that name itself")
        for export in self.exports:
            if export.start not in known:
                raise ValueError(f"the export {export.name} starts from {export.start}, which no stage makes")
            if export.name in known or names.count(export.name) > 1:
                raise ValueError(f"the name {export.name} is given twice")
        return self

    @model_validator(mode="after")
    def _limits_are_on_exports(self) -> Self:
        names = [export.name for export in self.exports]
        for limits in self.constraints:
            if not any(limits.means(name) for name in names):
                raise ValueError(f"a constraint names {limits.artifact}, which no export makes ({', '.join(names)})")
        gated = [export.name for export in self.exports if not export.baseline]
        for gate in self.gates:
            if not any(name == gate.candidate or fnmatchcase(name, gate.candidate) for name in gated):
                raise ValueError(f"the gate on {gate.metric} names {gate.candidate}, but gated are {', '.join(gated)}")
            if gate.relative_to == "previous":
                raise ValueError(
                    f"the gate on {gate.metric} is relative to the previous release, which a run knows nothing of: "
                    "ask it of the run's report, with limbeck gate --previous"
                )
            if gate.slice is not None and self.slices == Slices():
                raise ValueError(
                    f"the gate on {gate.metric} names the slice {gate.slice}, but the recipe has no slices"
                )
        return self

    @model_validator(mode="after")
    def _rows_to_choose_on(self) -> Self:
        for stage in self.stages:
            if (what := stage.needs_development) and self.data.development is None:
                raise ValueError(
                    f"the stage {stage.name} {what}, so it needs data.development, rows of its own: {_WHY_DEVELOPMENT}"
                )
        for export in self.exports:
            if export.measures_quality and self.data.development is None:
                raise ValueError(
                    f"the export {export.name} is held to a floor, so it needs data.development, rows of its own: "
                    f"{_WHY_DEVELOPMENT}"
                )
        if self.data.development is not None and self.data.development == self.data.validation:
            raise ValueError(f"data.development is data.validation: {_WHY_DEVELOPMENT}")
        return self

    @model_validator(mode="after")
    def _cycles_are_weighed_on_exports(self) -> Self:
        names = [export.name for export in self.exports]
        for stage in self.stages:
            until = stage.cycle.until if stage.cycle is not None else None
            if until is not None and until.export is not None and until.export not in names:
                raise ValueError(
                    f"the cycle {stage.name} names the export {until.export}; there are {', '.join(names)}"
                )
        return self

    @model_validator(mode="after")
    def _texts_can_be_written(self) -> Self:
        texts = self.bench.generate
        if texts is None:
            return self
        if self.task != TextGeneration.name:
            raise ValueError(f"bench.generate times text that is written, and {self.task} writes none")
        for export in self.exports:
            if export.kv_cache and export.shapes.max_sequence < texts.longest:
                raise ValueError(
                    f"bench.generate writes texts of {texts.longest} tokens, and the export {export.name} holds "
                    f"{export.shapes.max_sequence} (shapes.max_sequence)"
                )
        return self

    @model_validator(mode="after")
    def _cache_can_answer(self) -> Self:
        for stage in self.stages:
            if self.teacher_cache and stage.training is not None and stage.training.on_policy is not None:
                raise ValueError(
                    f"the stage {stage.name} trains on text that the student is yet to write (on_policy), which no "
                    "teacher_cache can answer for"
                )
        return self

    def start_of(self, stage: Stage) -> str:
        """The name of what a stage starts from."""
        above = self.stages.index(stage) - 1
        return stage.start or (self.stages[above].name if above >= 0 else "teacher")

    def path_to(self, name: str) -> list[Stage]:
        """The stages that lead from the teacher to what this one makes, the first one first."""
        stages = {stage.name: stage for stage in self.stages}
        path: list[Stage] = []
        while name != "teacher":
            path.insert(0, stages[name])
            name = self.start_of(stages[name])
        return path

    def export_named(self, name: str) -> Export:
        """The export of that name."""
        return next(export for export in self.exports if export.name == name)

    def all_gates(self) -> list[Gate]:
        """Gates and constraints together."""
        return [*(gate for limits in self.constraints for gate in limits.gates()), *self.gates]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        InputError: the file is missing, is not YAML, or says something that is not valid; the message names the key.
    """
    value = read_yaml(path, "recipe")
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        said = _unknown_key(error) or describe_problems(error)
        raise InputError(f"{path} is not a valid recipe: {said}.") from error
    except UsageError as error:  # what settings that contradict each other raise
        raise InputError(f"{path} is not a valid recipe: {error.message}", error.hint) from error


def _unknown_key(error: ValidationError) -> str | None:
    """The first key that recipes do not have, with the nearest and all those that are valid in its place."""
    places = [problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"]
    if not places:
        return None
    *where, key = places[0]
    valid = _keys_at(where)
    near = difflib.get_close_matches(str(key), valid, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    place = ".".join(map(str, where)) or "a recipe"
    return f"{place} has no key {key!r}{meant}; valid keys are {', '.join(valid)}"


def _keys_at(where: Sequence[str | int]) -> list[str]:
    part: Any = Recipe
    for step in where:
        if isinstance(step, str):
            part = _model_in(part.model_fields[step].annotation)
    return list(part.model_fields)


def _model_in(annotation: Any) -> Any:
    """The settings class in an annotation such as `list[Stage]` or `PruneSettings | None`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)
