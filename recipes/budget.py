"""Pruning to a budget, in rounds: score, search, cut a part of the way, score what is left. For latency, the result is
compiled and timed, and where the prediction was off the last search is repeated with what was learnt.

Importance says what cutting one part costs while the others are there. It says less the more is cut at once, so the way
to the budget is cut into equal factors, as iterative pruning does (Molchanov et al. 2019).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..models.anatomy import anatomy_of
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.importance import Calibration, Importance, Scores, get_importance
from ..models.lineage import LayerWidths
from ..models.shapes import LayerShape, shapes_of
from ..models.surgery import select
from ..prune.alternatives import Shapes, alternatives
from ..prune.budget_settings import Budget
from ..prune.costs import Costs, Storage, flop_costs, weight_costs
from ..prune.nearness import distances, parted
from ..prune.pruning import prune, refuse_if_sparse
from ..prune.result import PruneResult, check_finite
from ..prune.search import SearchSpace, check_protected, least, search, search_space, selection_of
from ..prune.settings import PruneSettings
from .latency_table import LatencyTable, SideBySide, Target, latency_table
from .progress import SILENT, Progress

TOLERANCE = 0.05
"""Share of the budget by which a measured latency may be off before the search is repeated."""
ROUNDS = 4
"""In how many cuts the budget is reached, each by the same factor. On all-MiniLM-L6-v2 at half its FLOPs, by importance
alone, one cut leaves 0.901 of Spearman on STS-B, two 0.904 and four 0.907; the same sizes in every layer 0.903."""
_ATTEMPTS = 4
_MEGABYTE = 1e6
_STORAGE = {
    "fp32": Storage(4, 4),
    "native": Storage(4, 4),
    "bf16": Storage(2, 2),
    "fp16": Storage(2, 2),
    "int8": Storage(1, 4),
}
"""Bytes of a weight in each precision; int8 is for matrices alone."""


def prune_to_budget(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    data: Data | None = None,
    *,
    rationale: str | None = None,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Choose heads, feed-forward channels and layers to cut so that the least importance is lost within the budget, cut
    them, and add the step to the history. The checkpoint that came in is left as it was; one that is within the budget
    already comes back whole, with a step that says so.

    Args:
        settings: with a `budget`, and a method whose scores are comparable over layers.
        data: rows with the task's fields, which importance looks at (labels are not needed); an int8 export is
            calibrated on them too.
        rationale: why, in the user's words, for the history.
        cache: folder of measured latency tables; the user's cache folder where not given.

    Raises:
        UsageError: a budget that cannot be reached (the message says what the least is), no data, a method whose scores
            cannot be added up, a layer to protect that is not there.
        BackendUnavailable: a latency budget for a backend that cannot run here.
        InputError: an unknown architecture, weights that hold NaN, or data without usable rows.
    """
    budget = settings.budget
    if budget is None:
        raise UsageError("There is no budget in these settings.", "Add budget: {latency_ms: 2.0, backend: openvino}.")
    target = Target.of(budget) if budget.latency_ms is not None else None  # what is impossible is said before the work
    check_protected(budget.protect, len(anatomy_of(checkpoint.model).layers(checkpoint.model)))
    refuse_if_sparse(checkpoint, settings)

    def pruning(checkpoint: Checkpoint, settings: PruneSettings, calibration: Calibration | None) -> PruneResult:
        check_finite(checkpoint)
        assert calibration is not None  # the methods that a budget takes look at data
        way = _Way(checkpoint, get_importance(settings.chosen_by), *parted(calibration), budget.protect, progress)
        if target is None:
            outcome = _by_counting(checkpoint, way, budget)
        else:
            with SideBySide(checkpoint, target, data, progress) as timing:
                outcome = _by_timing(timing, way, budget.limit, latency_table(timing, cache))
        return PruneResult(
            model=outcome.checkpoint.model,
            method=f"budget {budget.kind} by {settings.chosen_by}",
            settings={"found": outcome.record()},
            widths=_widths(checkpoint, outcome.shapes),
            note=outcome.note(budget, checkpoint),
        )

    return prune(checkpoint, settings, data, rationale, progress.advance, pruning)


@dataclass(frozen=True)
class _Stage:
    """A model on its way to the budget, scored as it is now."""

    checkpoint: Checkpoint
    """With a history and a hash that are not brought up to date."""
    origin: tuple[int, ...]
    """The numbers that its layers had at the start."""
    kept: float
    """The share of importance that the rounds before have left, multiplied up."""
    scores: Scores
    space: SearchSpace

    def cut(self, shapes: Shapes) -> Checkpoint:
        """The model with these sizes (by its own layers' numbers) only."""
        model = self.checkpoint.model
        return replace(self.checkpoint, model=select(model, selection_of(model, self.scores, shapes)))

    def kept_by(self, shapes: Shapes) -> float:
        """The share of importance that is left at these sizes, the rounds before included."""
        return self.kept * (1 - self.space.lost(shapes) / (self.space.total or 1.0))

    def from_start(self, shapes: Shapes) -> dict[int, LayerShape]:
        """The sizes by the numbers that layers had at the start."""
        return {self.origin[index]: shape for index, shape in shapes.items()}


@dataclass(frozen=True)
class _Way:
    """How a model is brought near its budget."""

    whole: Checkpoint
    importance: Importance
    calibration: Calibration
    held_out: Calibration
    """Examples that importance does not look at, by which choices are judged."""
    protect: tuple[int, ...]
    progress: Progress

    def begin(self, checkpoint: Checkpoint) -> _Stage:
        """The model as it came."""
        depth = len(anatomy_of(checkpoint.model).layers(checkpoint.model))
        return self._stage(checkpoint, tuple(range(depth)), 1.0, 1)

    def near(self, stage: _Stage, costs: Costs, budget: float) -> _Stage:
        """The model after all rounds but the last, which is left to the caller."""
        whole = costs.of(stage.space.whole)
        for done in range(1, ROUNDS):
            shapes = self.chosen(stage, costs.only(stage.origin), whole * (budget / whole) ** (done / ROUNDS))
            origin = tuple(sorted(stage.from_start(shapes)))
            stage = self._stage(stage.cut(shapes), origin, stage.kept_by(shapes), done + 1)
        return stage

    def chosen(self, stage: _Stage, costs: Costs, budget: float) -> Shapes:
        """Of the choices within the budget, the one whose outputs on the examples held out come nearest to the whole
        model's.

        Raises:
            UsageError: the budget cannot be reached.
        """
        found = alternatives(stage.space, costs, budget)
        if len(found) == 1:
            return found[0]
        self.progress.say(f"comparing {len(found)} choices")
        off = distances(self.whole, [stage.cut(shapes) for shapes in found], self.held_out)
        return found[int(np.argmin(off))]

    def _stage(self, checkpoint: Checkpoint, origin: tuple[int, ...], kept: float, number: int) -> _Stage:
        self.progress.say(f"measuring importance, round {number} of {ROUNDS}")
        scores = self.importance.scores(checkpoint, ("heads", "ffn", "layers"), self.calibration)
        protect = [origin.index(layer) for layer in self.protect]
        return _Stage(checkpoint, origin, kept, scores, search_space(checkpoint.model, scores, protect))


@dataclass(frozen=True)
class _Outcome:
    """What was chosen, and how its cost was found to be."""

    checkpoint: Checkpoint
    shapes: Shapes
    kept: float
    """The share of importance that is left."""
    whole: float
    """What the model costs as it came, in the budget's unit; FLOPs as shares of it."""
    predicted: float
    measured: float | None = None
    attempts: int = 0
    table: LatencyTable | None = None
    dense_now: float | None = None
    """Milliseconds of the whole model beside the last measurement, where the table says `whole`."""

    @property
    def cost(self) -> float:
        """As measured, or as predicted where there is nothing to measure."""
        return self.predicted if self.measured is None else self.measured

    def record(self) -> dict[str, Any]:
        """JSON-ready, for the history."""
        sizes = [{"layer": index, **shape.model_dump()} for index, shape in sorted(self.shapes.items())]
        costs = {"whole": self.whole, "predicted": self.predicted, "measured": self.measured}
        found: dict[str, Any] = {name: round(value, 6) for name, value in costs.items() if value is not None}
        found |= {"importance_kept": round(self.kept, 6), "layers": sizes}
        if self.table is not None:
            found |= {"latency_table": self.table.key, "measured_on": self.table.of, "attempts": self.attempts}
        return found

    def note(self, budget: Budget, before: Checkpoint) -> str:
        """In a few sentences, for people."""
        unit = {"latency_ms": " ms", "size_mb": " MB of weights", "flops": " of the FLOPs"}[budget.kind]
        whole = dict(enumerate(shapes_of(before.model).layers))
        if self.shapes == whole:
            return f"Within the budget of {budget.limit:g}{unit} as it is ({self.cost:.4g}): nothing was cut."
        said = [f"{self.cost:.4g}{unit} where {budget.limit:g} is the budget and the whole model has {self.whole:.4g}."]
        if self.measured is not None:
            said.append(f"Predicted were {self.predicted:.4g} ms; the compiled result was measured.")
            if self.measured > budget.limit * (1 + TOLERANCE):
                said.append(f"The budget was NOT reached in {self.attempts} attempts.")
        if self.dense_now is not None and abs(self.dense_now / self.whole - 1) > 2 * TOLERANCE:
            said.append(
                f"The machine is busy, or not as it was when the table was measured: the whole model took "
                f"{self.dense_now:.4g} ms this time. Figures are given at the table's speed."
            )
        gone = [index for index in whole if index not in self.shapes]
        if gone:
            said.append(f"Layers cut out whole: {', '.join(map(str, gone))}.")
        return " ".join(said)


def _by_counting(checkpoint: Checkpoint, way: _Way, budget: Budget) -> _Outcome:
    """Size and FLOPs are known from the shapes."""
    if budget.size_mb is not None:
        costs, unit = weight_costs(checkpoint, storage_of(budget)), _MEGABYTE
    else:
        if budget.sequence_length > checkpoint.max_length:
            raise UsageError(
                f"{checkpoint.source} takes {checkpoint.max_length} tokens; its FLOPs cannot be counted at "
                f"{budget.sequence_length}.",
                f"Ask for --sequence-length {checkpoint.max_length} or less.",
            )
        costs = flop_costs(checkpoint, budget.sequence_length)
        unit = costs.of(dict(enumerate(shapes_of(checkpoint.model).layers)))
    costs = costs.in_units_of(unit)
    stage = way.begin(checkpoint)
    whole = costs.of(stage.space.whole)
    shapes: Shapes = search(stage.space, costs, budget.limit)
    if shapes != stage.space.whole:
        stage = way.near(stage, costs, budget.limit)
        shapes = way.chosen(stage, costs.only(stage.origin), budget.limit)
    predicted = costs.only(stage.origin).of(shapes)
    return _Outcome(stage.cut(shapes), stage.from_start(shapes), stage.kept_by(shapes), whole, predicted)


def storage_of(budget: Budget) -> Storage:
    """The bytes that a weight takes in an export of this budget's precision. OpenVINO turns to bfloat16 when it
    compiles: on disk its weights are float32."""
    if budget.backend == "openvino" and budget.precision == "bf16":
        return _STORAGE["fp32"]
    return _STORAGE[budget.precision or "fp32"]


def _by_timing(timing: SideBySide, way: _Way, budget: float, table: LatencyTable) -> _Outcome:
    """The best choice that was measured within the tolerance of the budget; the fastest one where none was."""
    stage = way.begin(timing.dense)
    costs, whole = table.costs(len(stage.origin)), stage.space.whole
    if search(stage.space, costs, budget) == whole:
        return _Outcome(stage.checkpoint, whole, 1.0, table.dense_ms, costs.of(whole), table.dense_ms, table=table)
    stage = way.near(stage, costs, budget)
    costs, tried = costs.only(stage.origin), list[_Outcome]()
    while len(tried) < _ATTEMPTS:
        timing.progress.say("searching")
        shapes = _chosen(way, stage, costs, budget)
        if any(stage.from_start(shapes) == before.shapes for before in tried):
            break
        tried.append(_checked(timing, stage, shapes, costs.of(shapes), table))
        if abs(tried[-1].cost - budget) <= TOLERANCE * budget:
            break
        # Costs that do not add up (fusion, caches) are taken for a constant near this choice.
        costs = replace(costs, rest=costs.rest + tried[-1].cost - tried[-1].predicted)
    within = [each for each in tried if each.cost <= budget * (1 + TOLERANCE)]
    best = max(within, key=lambda each: each.kept) if within else min(tried, key=lambda each: each.cost)
    return replace(best, attempts=len(tried))


def _chosen(way: _Way, stage: _Stage, costs: Costs, budget: float) -> Shapes:
    """The best choice; where corrected costs leave none, the least there is, which may do better than they say."""
    try:
        return way.chosen(stage, costs, budget)
    except UsageError:
        return least(stage.space, costs)


def _checked(timing: SideBySide, stage: _Stage, shapes: Shapes, predicted: float, table: LatencyTable) -> _Outcome:
    """Compiled, and timed beside the whole model; as a ratio to it at the table's speed, so that a slow minute cuts
    nothing out of the model."""
    timing.progress.say(f"checking a choice: {predicted:.3g} ms predicted")
    cut = stage.cut(shapes)
    now, times = timing.time([("chosen", cut)])
    return _Outcome(
        checkpoint=cut,
        shapes=stage.from_start(shapes),
        kept=stage.kept_by(shapes),
        whole=table.dense_ms,
        predicted=predicted,
        measured=times["chosen"] * table.dense_ms / now,
        table=table,
        dense_now=now,
    )


def _widths(checkpoint: Checkpoint, shapes: Shapes) -> list[LayerWidths]:
    """Heads and channels of every layer before and after; a layer that is gone has none."""
    model = checkpoint.model
    name = anatomy_of(model).layers_name(model)
    found = []
    for index, before in enumerate(shapes_of(model).layers):
        after = shapes.get(index)
        layer = f"{name}.{index}"
        found += [
            LayerWidths(layer=layer, unit="heads", before=before.heads, after=after.heads if after else 0),
            LayerWidths(layer=layer, before=before.ffn, after=after.ffn if after else 0),
        ]
    return found
