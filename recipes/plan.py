"""Constraints first: what the wanted artifact would cost, measured on an untrained student of its final shape, before
any time goes into training it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel, ConfigDict, Field

from ..distill.distillation import student_of
from ..errors import UsageError
from ..exporters.artifact import artifact_size
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..prune.settings import PruneSettings
from ..validate.latency import BenchResult, BenchSettings, BenchSubject, bench, speedup
from .progress import Progress
from .schema import Constraints, Export, Recipe
from .steps import export, prune

_SLACK = 1.25
"""A prediction may be off by this factor before a limit is called impossible: the machine is noisy, and gates measure
again at the end."""
_CALIBRATION_ROWS = 16
_ROUNDS = 3


class Prediction(BaseModel):
    """What one artifact will cost, as measured on its untrained twin."""

    model_config = ConfigDict(extra="forbid")

    artifact: str
    parameters: int
    costs: dict[str, float]
    """Metric to value: latencies, speed-up, memory, size."""


class Plan(BaseModel):
    """Predictions for the artifacts that constraints name."""

    model_config = ConfigDict(extra="forbid")

    predictions: list[Prediction] = Field(default_factory=list)


def make_plan(recipe: Recipe, teacher: Checkpoint, data: Data, progress: Progress) -> Plan:
    """Compile and time an untrained student of each constrained artifact's final shape, and compare with the limits.

    Raises:
        UsageError: a limit that this recipe cannot meet on this machine, or that cannot be measured here.
    """
    _refuse_unmeasurable(recipe)
    concerned = [
        export
        for export in recipe.exports
        if not export.baseline and any(limits.means(export.name) and limits.limits() for limits in recipe.constraints)
    ]
    plan = Plan()
    with TemporaryDirectory(prefix="limbeck-plan-") as folder:
        for wanted in concerned:
            progress.say(f"drawing and compiling an untrained {wanted.name}")
            untrained = _untrained(recipe, wanted, teacher, progress)
            target = Path(folder) / wanted.name
            settings = wanted.settings().model_copy(update={"calibration_samples": _CALIBRATION_ROWS})
            manifest = export(untrained, settings, target, calibration=data, progress=progress)
            costs = {"size_mb": artifact_size(target) / 1e6}
            if not manifest.is_kit and _needs_timing(recipe, wanted):
                costs |= _timed(recipe, teacher, wanted.name, target, progress)
            plan.predictions.append(Prediction(artifact=wanted.name, parameters=untrained.parameters, costs=costs))
    for limits in recipe.constraints:
        for prediction in plan.predictions:
            if limits.means(prediction.artifact):
                _refuse_impossible(limits, prediction)
    return plan


def _needs_timing(recipe: Recipe, wanted: Export) -> bool:
    return any(limits.means(wanted.name) and limits.limits().keys() - {"size_mb"} for limits in recipe.constraints)


def _untrained(recipe: Recipe, wanted: Export, teacher: Checkpoint, progress: Progress) -> Checkpoint:
    """The recipe's changes of shape without its training: layers drawn, channels cut by magnitude, which needs no
    data. Which channels are cut changes nothing about the cost."""
    stages = {stage.name: stage for stage in recipe.stages}
    path = []
    name = wanted.start
    while name != "teacher":
        path.append(stages[name])
        name = recipe.start_of(stages[name])
    checkpoint = teacher
    for stage in reversed(path):
        if stage.distill is not None and stage.distill.layers is not None:
            checkpoint = student_of(checkpoint, stage.distill.layers)
        elif stage.prune is not None:
            by_magnitude = PruneSettings(**{**stage.prune.model_dump(), "method": "magnitude"})
            checkpoint = prune(checkpoint, by_magnitude, progress=progress)
    return checkpoint


def _timed(recipe: Recipe, teacher: Checkpoint, name: str, folder: Path, progress: Progress) -> Mapping[str, float]:
    subjects = [
        BenchSubject(name="teacher", path=Path(teacher.source), kind="checkpoint", task=teacher.task.name),
        BenchSubject(name=name, path=folder, kind="artifact"),
    ]
    settings = BenchSettings(**{**recipe.bench.model_dump(), "rounds": _ROUNDS})
    baseline, result = bench(subjects, settings, progress.say)
    return _costs(baseline, result)


def _costs(baseline: BenchResult, result: BenchResult) -> dict[str, float]:
    latency = result.latency()
    return {
        "latency_p50_ms": latency.p50_ms,
        "latency_p90_ms": latency.p90_ms,
        "latency_p99_ms": latency.p99_ms,
        "speedup_p50": speedup(baseline, result).point,
        "peak_memory_mb": result.peak_memory_mb,
    }


def _refuse_unmeasurable(recipe: Recipe) -> None:
    for limits in recipe.constraints:
        if limits.energy_mj is not None:
            raise UsageError(
                "The constraint energy_mj cannot be checked: limbeck has no energy meter yet, on any machine.",
                "Leave energy_mj out; latency at a fixed number of threads is the nearest that is measured.",
            )


def _refuse_impossible(limits: Constraints, prediction: Prediction) -> None:
    for metric, limit in limits.limits().items():
        cost = prediction.costs.get(metric)
        if cost is None:
            raise UsageError(
                f"The constraint {metric} on {prediction.artifact} cannot be checked here: its device is elsewhere.",
                "Name in `artifact:` only what runs on this machine.",
            )
        possible = cost * _SLACK >= limit if metric == "speedup_p50" else cost <= limit * _SLACK
        if not possible:
            raise UsageError(
                f"The constraint {metric} = {limit:g} cannot be met: an untrained {prediction.artifact} of the "
                f"recipe's final shape was measured at {cost:.3g} ({prediction.parameters:,} parameters).",
                "Draw fewer layers, keep fewer channels, take another precision, or relax the constraint.",
            )
