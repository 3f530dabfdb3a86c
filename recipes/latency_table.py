"""What the parts of a model cost on a runtime, measured: a table of milliseconds by heads, channels and depth.

Whole models are timed, never single layers, so that the costs are those of a layer where it runs: fused with its
neighbours, its weights competing with theirs for the cache. Variants of the model that differ in one size only (all
layers with so many heads, or so many channels; fewer layers) are compiled and timed beside the model itself, one
process each, rounds in turn; the difference, divided by the number of layers, is what the size saves in a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from .. import __version__
from ..backends.registry import backend_for
from ..environment import cache_folder, cpu_facts, gpu_facts, versions
from ..errors import BackendUnavailable, InputError, UsageError
from ..exporters.settings import ExportSettings, ShapeRange
from ..files import read_document, sha256_of_json, write_json
from ..models.anatomy import anatomy_of
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.shapes import LayerShape, uniform_shapes_of
from ..models.surgery import HeadSelection, Selection, select
from ..prune.budget_settings import Budget
from ..prune.costs import Costs, Curve, LayerCosts
from ..prune.search import widths
from ..validate.performance.latency import BenchSettings, BenchSubject, bench, speedup
from .progress import SILENT, Progress
from .steps import build, export

_SCHEMA = 1
_AT_ONCE = 4
"""Variants in one bench beside the model itself: each is a process that holds a whole runtime."""
_SHARES = (0.75, 0.5, 0.25)
"""Of the heads and channels of a layer: where the table is measured, beside the smallest size and the whole."""
_CALIBRATION_ROWS = 16  # int8 ranges change nothing about the cost


@dataclass(frozen=True)
class Target:
    """On what and at what sizes a model is timed."""

    export: ExportSettings
    bench: BenchSettings

    @classmethod
    def of(cls, budget: Budget) -> Target:
        """What a budget in latency asks for.

        Raises:
            UsageError: there is no such backend, or it lacks the precision.
            BackendUnavailable: its runtime or its device is not here.
        """
        shapes = ShapeRange(
            max_batch=max(budget.batch_size, ShapeRange().max_batch),
            max_sequence=max(budget.sequence_length, ShapeRange().max_sequence),
        )
        settings = ExportSettings(
            backend=str(budget.backend),
            precision=budget.precision or "fp32",
            shapes=shapes,
            calibration_samples=_CALIBRATION_ROWS,
            kv_cache=False,  # whole texts are timed
        )
        available = backend_for(settings).probe()
        if not available.can_run:
            raise BackendUnavailable(
                f"A budget in latency is measured, and the backend {settings.backend} cannot run here: "
                f"{available.reason}.",
                available.mend or "Set the budget on the device itself, or name a backend that runs here.",
            )
        bench_settings = BenchSettings(
            batch_size=budget.batch_size,
            sequence_length=budget.sequence_length,
            threads=budget.threads,
            seconds_per_round=0.3,
        )
        return cls(settings, bench_settings)


class SideBySide:
    """Compiles models and times them beside one dense model, which is compiled once; used in a `with` block, whose end
    removes what was compiled.

    Args:
        calibration: rows that an int8 export is calibrated on.
    """

    def __init__(
        self, dense: Checkpoint, target: Target, calibration: Data | None = None, progress: Progress = SILENT
    ) -> None:
        self.dense, self.target, self.progress = dense, target, progress
        self._calibration = calibration
        self._compiled_dense: BenchSubject | None = None

    def __enter__(self) -> Self:
        self._kept = TemporaryDirectory(prefix="limbeck-latency-")
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.cleanup()

    def time(self, others: Iterable[tuple[str, Checkpoint]]) -> tuple[float, dict[str, float]]:
        """Median milliseconds of the dense model, and of each of the others by its name.

        A few share a bench with the dense one, and each is given as its ratio to it in the rounds they shared times the
        dense one's median over all: a slow minute slows both.
        """
        samples: list[NDArray[np.float64]] = []
        speedups: dict[str, float] = {}
        waiting = iter(others)
        dense = self._compiled_dense = self._compiled_dense or self._compiled("dense", self.dense, self._kept.name)
        while (group := list(islice(waiting, _AT_ONCE))) or not samples:
            with TemporaryDirectory(prefix="limbeck-latency-") as scratch:
                subjects = [self._compiled(name, checkpoint, scratch) for name, checkpoint in group]
                baseline, *results = bench([dense, *subjects], self.target.bench, self.progress.say)
            samples.append(baseline.samples_ms)
            speedups |= {result.subject.name: speedup(baseline, result).point for result in results}
        dense_ms = float(np.median(np.concatenate(samples)))
        return dense_ms, {name: dense_ms / ratio for name, ratio in speedups.items()}

    def _compiled(self, name: str, checkpoint: Checkpoint, scratch: str) -> BenchSubject:
        """An artifact like any other, checks and all (a quarter of the work): the time of a program that is not the
        model would say nothing."""
        self.progress.say(f"compiling {name}")
        folder = Path(scratch) / name.replace(" ", "-")
        manifest = export(checkpoint, self.target.export, folder, calibration=self._calibration, beside_float=False)
        if manifest.is_kit:
            kit, folder = folder, folder.with_name(f"{folder.name}-built")
            build(kit, folder)
        return BenchSubject(name=name, path=folder, kind="artifact")


class Point(BaseModel):
    """One measured size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    ms: float
    """What a layer costs that has so many heads (or channels) and is otherwise whole."""


class LatencyTable(BaseModel):
    """Median milliseconds of one model shape's parts on one runtime and device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = _SCHEMA
    key: str
    """SHA-256 of `of`."""
    of: dict[str, Any]
    """All that the figures depend on: device, versions, model shape, backend, precision, batch."""
    dense_ms: float = Field(gt=0)
    """The whole model."""
    layer_ms: float = Field(ge=0)
    """One whole layer."""
    rest_ms: float = Field(ge=0)
    """What is outside the layers, and the call itself."""
    heads: list[Point] = Field(min_length=1)
    """Ascending, the whole layer last; `ffn` likewise."""
    ffn: list[Point] = Field(min_length=1)
    measured: str

    def costs(self, depth: int) -> Costs:
        """The costs of a model of `depth` such layers, in milliseconds."""
        heads, ffn = _curve(self.heads), _curve(self.ffn)
        both = heads(self.heads[-1].size) + ffn(self.ffn[-1].size)
        share = min(1.0, self.layer_ms / both) if both > 0 else 1.0  # noise may give them more than there is
        layer = LayerCosts(
            max(self.layer_ms - share * both, 0.0), lambda size: share * heads(size), lambda size: share * ffn(size)
        )
        return Costs(self.rest_ms, (layer,) * depth)


def _curve(points: Sequence[Point]) -> Curve:
    """Milliseconds over those of the smallest measured size, for any size: monotone cubic interpolation (Fritsch and
    Carlson 1980) through the measured points, which are first made monotone, since what is measured is noisy."""
    from scipy.interpolate import PchipInterpolator
    from scipy.optimize import isotonic_regression

    if len(points) == 1:
        return lambda _: 0.0
    fitted = isotonic_regression([point.ms for point in points]).x
    through = PchipInterpolator([point.size for point in points], fitted - fitted[0])
    return lambda size: float(through(size))


def latency_table(timing: SideBySide, cache: Path | None = None) -> LatencyTable:
    """The table of the dense model's shape on this machine: read where it has been measured before, else measured (some
    minutes) and kept.

    Args:
        cache: folder of the tables; `cache_folder()` where not given.

    Raises:
        UsageError: a model whose layers differ in size, or a sequence that it has no positions for.
        BackendUnavailable, WorkerDied: the runtime does not run here.
    """
    checkpoint, target = timing.dense, timing.target
    shape = uniform_shapes_of(checkpoint.model)
    if target.bench.sequence_length > checkpoint.max_length:
        raise UsageError(
            f"{checkpoint.source} takes {checkpoint.max_length} tokens; it cannot be timed at "
            f"{target.bench.sequence_length}.",
            f"Ask for --sequence-length {checkpoint.max_length} or less.",
        )
    of = dependencies(checkpoint, target)
    key = sha256_of_json(of)
    path = (cache or cache_folder()) / f"latency-{key[:24]}.json"
    if (kept := _kept(path, key)) is not None:
        timing.progress.say("latency table: measured before")
        return kept
    table = _measured(timing, shape, key, of)
    write_json(path, table.model_dump(mode="json"))
    return table


def _kept(path: Path, key: str) -> LatencyTable | None:
    """The table that lies there, if it is the right one; a broken one is as none, since it can be measured again."""
    try:
        table = read_document(path, LatencyTable, _SCHEMA)
    except InputError:
        return None
    return table if table.key == key else None


def dependencies(checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
    """All that a table depends on, JSON-ready: of the model its shape and not its weights."""
    model = checkpoint.model
    ignored = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id"}
    config = {name: value for name, value in model.config.to_dict().items() if name not in ignored}
    labels = len(model.config.id2label or {})
    return {
        "schema": _SCHEMA,
        "limbeck": __version__,
        "versions": versions(),
        "cpu": {name: value for name, value in cpu_facts().items() if name != "memory_bytes"},
        "gpus": gpu_facts(),
        "threads": target.bench.threads_used,
        "backend": target.export.backend,
        "precision": target.export.precision,
        "batch_size": target.bench.batch_size,
        "sequence_length": target.bench.sequence_length,
        "task": checkpoint.task.name,
        "pooling": [checkpoint.pooling.mode, checkpoint.pooling.normalize],
        "family": anatomy_of(model).family,
        "labels": labels,
        "shape": uniform_shapes_of(model).model_dump(),
        "config": sha256_of_json(config),
    }


@dataclass(frozen=True)
class _Variant:
    """The model with one size changed."""

    what: str
    """`heads`, `ffn` or `layers`."""
    size: int

    @property
    def name(self) -> str:
        return f"{self.size} {self.what}"


def _variants(shape: LayerShape, depth: int) -> Iterator[_Variant]:
    """What is timed beside the whole model."""
    for kept in sorted({max(1, round(depth * share)) for share in (0.5, 0.25)} - {depth}):
        yield _Variant("layers", kept)
    shared = shape.heads // shape.key_value_heads
    groups = {1, *(max(1, round(shape.key_value_heads * share)) for share in _SHARES)} - {shape.key_value_heads}
    for count in sorted(groups):
        yield _Variant("heads", count * shared)
    possible = widths(shape.ffn)
    nearest = {possible[0], *(min(possible, key=lambda w: abs(w - shape.ffn * share)) for share in _SHARES)}
    for width in sorted(nearest - {shape.ffn}):
        yield _Variant("ffn", width)


def _cut(checkpoint: Checkpoint, variant: _Variant) -> Checkpoint:
    """The model with the first so many of its parts: which ones they are changes nothing about the time."""
    model, shape = checkpoint.model, uniform_shapes_of(checkpoint.model)
    depth = len(anatomy_of(model).layers(model))
    if variant.what == "layers":
        selection = Selection(layers=range(variant.size))
    elif variant.what == "ffn":
        selection = Selection(ffn=[torch.arange(variant.size)] * depth)
    else:
        groups = variant.size * shape.key_value_heads // shape.heads
        selection = Selection(heads=[HeadSelection(torch.arange(variant.size), torch.arange(groups))] * depth)
    return replace(checkpoint, model=select(model, selection))


def _measured(timing: SideBySide, shape: LayerShape, key: str, of: dict[str, Any]) -> LatencyTable:
    checkpoint = timing.dense
    depth = len(anatomy_of(checkpoint.model).layers(checkpoint.model))
    variants = list(_variants(shape, depth))
    dense, times = timing.time((variant.name, _cut(checkpoint, variant)) for variant in variants)
    shallower = {variant.size: times[variant.name] for variant in variants if variant.what == "layers"}
    layer = _layer_ms(dense, shallower, depth)

    def points(what: str, whole: int) -> list[Point]:
        saved = {variant.size: (dense - times[variant.name]) / depth for variant in variants if variant.what == what}
        return [Point(size=size, ms=layer - saved.get(size, 0.0)) for size in sorted({*saved, whole})]

    return LatencyTable(
        key=key,
        of=of,
        dense_ms=dense,
        layer_ms=layer,
        rest_ms=max(dense - depth * layer, 0.0),
        heads=points("heads", shape.heads),
        ffn=points("ffn", shape.ffn),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _layer_ms(dense: float, shallower: Mapping[int, float], depth: int) -> float:
    """What a layer costs: the slope of time over depth, by least squares through the whole model. A model of one layer
    is all layer, since nothing can be told apart there and it has to stay."""
    if not shallower:
        return dense
    gone = np.array([depth - kept for kept in shallower], dtype=np.float64)
    saved = np.array([dense - ms for ms in shallower.values()])
    return float(np.clip(gone @ saved / (gone @ gone), 0.0, dense / depth))
