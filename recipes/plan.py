"""Constraints first: what the wanted artifact would cost, measured on an untrained student of its final shape, before
any time goes into training it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel, ConfigDict, Field

from ..distill.student import draw_student
from ..errors import UsageError
from ..exporters.artifact import artifact_size
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..prune.settings import PruneSettings
from ..validate.performance.energy import POWERCAP, Device, NoMeter, find_meter
from ..validate.performance.latency import BenchResult, BenchSettings, BenchSubject, bench, speedup
from .progress import Progress
from .schema import Constraints, Export, Recipe
from .steps import export_for_device, prune

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
    """Metric to value: latencies, speed-up, memory, energy, size."""


class Plan(BaseModel):
    """Predictions for the artifacts that constraints name."""

    model_config = ConfigDict(extra="forbid")

    predictions: list[Prediction] = Field(default_factory=list)


def make_plan(recipe: Recipe, teacher: Checkpoint, data: Data, progress: Progress) -> Plan:
    """Compile and time an untrained student of each constrained artifact's final shape, and compare with the limits.

    Raises:
        UsageError: a limit that this recipe cannot meet on this machine, or that cannot be measured here.
    """
    refuse_unmeasurable(recipe)
    concerned = [
        export
        for export in recipe.exports
        if not export.baseline and any(limits.means(export.name) and limits.limits() for limits in recipe.constraints)
    ]
    plan = Plan()
    for wanted in concerned:
        progress.say(f"drawing and compiling an untrained {wanted.name}")
        untrained = _untrained(recipe, wanted, teacher, data, progress)
        costs = measured_costs(recipe, wanted, Subject(untrained, teacher, data), _asked(recipe, wanted), progress)
        plan.predictions.append(Prediction(artifact=wanted.name, parameters=untrained.parameters, costs=costs))
    for limits in recipe.constraints:
        for prediction in plan.predictions:
            if limits.means(prediction.artifact):
                _refuse_impossible(limits, prediction)
    return plan


@dataclass(frozen=True)
class Subject:
    """A model whose cost is asked for, the teacher it is compared with, and rows to calibrate int8 on."""

    checkpoint: Checkpoint
    teacher: Checkpoint
    calibration: Data


def measured_costs(
    recipe: Recipe, wanted: Export, subject: Subject, metrics: Collection[str], progress: Progress
) -> dict[str, float]:
    """What a model costs in the format of an export: compiled, weighed, and timed beside the teacher where `metrics`
    asks for more than its size (and the device is here). A floor is not held: the model may be untrained. Where the
    precision is yet to be found (`auto`), float32 stands for it, which whatever is found is not slower than."""
    settings = wanted.settings()
    rows = min(settings.calibration_samples, _CALIBRATION_ROWS)  # ranges change nothing about the cost
    with TemporaryDirectory(prefix="limbeck-plan-") as folder:
        target = Path(folder) / wanted.name
        settings = settings.model_copy(update={"calibration_samples": rows, "floor": None})
        manifest = export_for_device(
            subject.checkpoint,
            settings,
            target,
            calibration=subject.calibration,
            beside_float=False,
            progress=progress,
        )
        costs = {"size_mb": artifact_size(target) / 1e6}
        if not manifest.is_kit and set(metrics) - {"size_mb", "parameters"}:
            costs |= _timed(recipe, subject.teacher, wanted.name, target, progress)
    return costs


def _asked(recipe: Recipe, wanted: Export) -> set[str]:
    return {metric for limits in recipe.constraints if limits.means(wanted.name) for metric in limits.limits()}


def _untrained(recipe: Recipe, wanted: Export, teacher: Checkpoint, data: Data, progress: Progress) -> Checkpoint:
    """The recipe's changes of shape without its training: the student drawn, parts cut by magnitude, which needs no
    data. Which parts are cut changes nothing about the cost, but for a budget, which is searched as it will be. Of a
    cycle, what is left after all of its rounds."""
    checkpoint = teacher
    for stage in recipe.path_to(wanted.start):
        if stage.distill is not None and stage.distill.student is not None:
            checkpoint = draw_student(checkpoint, stage.distill.student, data)
        cut = stage.cycle.prune if stage.cycle is not None else stage.prune
        if stage.sparsify is not None and stage.sparsify.pattern is not None:
            cut = PruneSettings(pattern=stage.sparsify.pattern)
        if cut is not None:
            of_shape = cut if cut.budget is not None else cut.of_the_same_shape()
            for _ in range(stage.cycle.rounds if stage.cycle is not None else 1):
                checkpoint = prune(checkpoint, of_shape, data if cut.budget is not None else None, progress=progress)
    return checkpoint


def _timed(recipe: Recipe, teacher: Checkpoint, name: str, folder: Path, progress: Progress) -> Mapping[str, float]:
    subjects = [
        BenchSubject(name="teacher", path=Path(teacher.source), kind="checkpoint", task=teacher.task.name),
        BenchSubject(name=name, path=folder, kind="artifact"),
    ]
    settings = BenchSettings(**{**recipe.bench.of_calls(), "rounds": _ROUNDS})
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
        **({} if result.energy_mj is None else {"energy_mj": result.energy_mj}),
    }


def refuse_unmeasurable(recipe: Recipe, powercap: Path = POWERCAP) -> None:
    """Refuse a limit on energy where no meter can be read.

    Args:
        powercap: where the system shows the CPU's.

    Raises:
        UsageError: there is none; the message says why.
    """
    for limits in recipe.constraints:
        if limits.energy_mj is None:
            continue
        for export in (each for each in recipe.exports if limits.means(each.name) and not each.baseline):
            device: Device = "gpu" if export.backend.startswith("tensorrt") else "cpu"
            meter = find_meter(device, powercap)
            if isinstance(meter, NoMeter):
                raise UsageError(
                    f"The constraint energy_mj on {export.name} cannot be checked here: {meter.reason}.",
                    "Leave energy_mj out; latency at a fixed number of threads is the nearest that is measured.",
                )


def refuse_long_texts(recipe: Recipe, teacher: Checkpoint) -> None:
    """Refuse to time texts that are longer than the model has positions for.

    Raises:
        UsageError: they are.
    """
    texts = recipe.bench.generate
    if texts is not None and texts.longest > teacher.max_length:
        raise UsageError(
            f"bench.generate writes texts of {texts.longest} tokens, and {teacher.source} has positions for "
            f"{teacher.max_length}.",
            "Ask for a shorter prompt_length or fewer new_tokens.",
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
