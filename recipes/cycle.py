"""Cycles: prune a little, let the rest recover, measure, and again, until the model is cheap enough or too bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ..errors import InputError, UsageError, did_you_mean
from ..files import files_below, mend_half_done_swap, read_document, write_json
from ..validate.metrics.headline import higher_is_better
from .progress import Progress
from .stages import Cycle

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint
    from ..validate.standard import Standard

CYCLE_FILE = "cycle.json"
_SCHEMA = 1
_AT_LEAST = frozenset({"speedup_p50"})
"""Costs that are better higher."""

Model = TypeVar("Model")
Stopped = Literal["until reached", "below the floor", "rounds used up", "nothing left to cut"]


class Figures(BaseModel):
    """What was measured on the model of one round."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    schema_version: int = _SCHEMA
    costs: dict[str, float]
    """`parameters`, and what `until` names."""
    quality: dict[str, float]
    """Every metric of the task on the development rows, by name."""


class Round(BaseModel):
    """One round: what it left, and how that stands to what was asked."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    number: int
    """0 is the model that the cycle started from."""
    costs: dict[str, float]
    quality: dict[str, float]
    holds_floor: bool
    reaches_until: bool


class CycleRecord(BaseModel):
    """`cycle.json`: every round of a cycle, which one was kept, and why it stopped there."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    schema_version: int = _SCHEMA
    rounds: list[Round]
    kept: int
    """The number of the round whose model is the result."""
    stopped: Stopped
    until: dict[str, float] = Field(default_factory=dict)
    floor: dict[str, float] = Field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Whether what was kept has the costs that were asked for."""
        return next(each for each in self.rounds if each.number == self.kept).reaches_until

    def summary(self) -> str:
        """In a sentence: what was kept, why no more was cut, and what was not reached."""
        kept = next(each for each in self.rounds if each.number == self.kept)
        shown = {name: kept.costs[name] for name in ("parameters", *self.until) if name in kept.costs}
        shown |= {name: kept.quality[name] for name in self.floor}
        figures = ", ".join(f"{name} {value:,.0f}" if name == "parameters" else f"{name} {value:.4g}"
                            for name, value in shown.items())  # fmt: skip
        last = len(self.rounds) - 1
        said = f"round {self.kept} of {last} was kept ({figures}); it stopped there: {self.stopped}"
        return said if self.reached or not self.until else f"{said}; what `until` asks was NOT reached"


class Rounds(Protocol[Model]):
    """How a round is made and measured."""

    def next(self, number: int, model: Model) -> Model | None:
        """The model after one more round, or `None` where nothing is left to cut."""

    def figures(self, number: int, model: Model) -> Figures:
        """What it costs and how good it is."""


def run_cycle(
    settings: Cycle, start: Model, rounds: Rounds[Model], say: Callable[[str], None]
) -> tuple[Model, CycleRecord]:
    """Rounds until `until` is reached, the floor is hit, or none are left: the last model that holds the floor, which
    is the cheapest, since every round cuts.

    A start below the floor may be mended by its first round; after that, the first round below it is the last.

    Raises:
        InputError: no round holds the floor.
        UsageError: a floor on a metric that the development rows do not give.
    """
    until = settings.until.limits() if settings.until is not None else {}
    judged = [_judged(0, rounds.figures(0, start), until, settings.floor)]
    kept, model = (start, 0) if judged[0].holds_floor else None, start
    stopped: Stopped = "rounds used up"
    if kept is not None and until and judged[0].reaches_until:
        stopped = "until reached"
    else:
        for number in range(1, settings.rounds + 1):
            say(f"round {number} of {settings.rounds}")
            following = rounds.next(number, model)
            if following is None:
                stopped = "nothing left to cut"
                break
            model = following
            judged.append(_judged(number, rounds.figures(number, model), until, settings.floor))
            if not judged[-1].holds_floor:
                stopped = "below the floor"
                break
            kept = (model, number)
            if until and judged[-1].reaches_until:
                stopped = "until reached"
                break
    if kept is None:
        raise InputError(_no_round(settings, judged[-1]), "Lower the floor, cut less a round, or recover for longer.")
    record = CycleRecord(rounds=judged, kept=kept[1], stopped=stopped, until=until, floor=settings.floor)
    return kept[0], record


def _judged(number: int, found: Figures, until: Mapping[str, float], floor: Mapping[str, float]) -> Round:
    for metric in floor:
        if metric not in found.quality:
            raise UsageError(unknown_floor(metric, found.quality))
    return Round(
        number=number,
        costs=found.costs,
        quality=found.quality,
        holds_floor=all(_holds(metric, found.quality[metric], worst) for metric, worst in floor.items()),
        reaches_until=all(_reaches(metric, found.costs[metric], limit) for metric, limit in until.items()),
    )


def unknown_floor(metric: str, known: Mapping[str, float]) -> str:
    """What is wrong with a floor on a metric that is not measured."""
    return f"A floor is set on {metric}; the development rows give {', '.join(known)}.{did_you_mean(metric, known)}"


def _holds(metric: str, value: float, worst: float) -> bool:
    return value >= worst if higher_is_better(metric) else value <= worst  # NaN holds nothing


def _reaches(metric: str, value: float, limit: float) -> bool:
    return value >= limit if metric in _AT_LEAST else value <= limit


def _no_round(settings: Cycle, last: Round) -> str:
    missed = ", ".join(
        f"{metric} {last.quality[metric]:.4g} instead of {worst:g}"
        for metric, worst in settings.floor.items()
        if not _holds(metric, last.quality[metric], worst)
    )
    return f"No round of the cycle holds its floor: the last one reached {missed}."


@dataclass(frozen=True)
class KeptRounds:
    """Rounds of a cycle on checkpoints, each in a folder of its own, complete or absent: what is there is not made
    again, whatever the cycle's limits are by now."""

    folder: Path
    key: Callable[[int], str]
    """Round -> the hash of everything that led to its model."""
    measured_with: str
    """The hash of what costs depend on beside the model."""
    prune: Callable[[Checkpoint], Checkpoint]
    train: Callable[[Checkpoint, Path], Checkpoint]
    """Student and the folder for its training's own checkpoints -> the trained student."""
    costs: Callable[[Checkpoint], Mapping[str, float]]
    standard: Standard
    load: Callable[[Path], Checkpoint]
    progress: Progress

    def next(self, number: int, model: Checkpoint) -> Checkpoint | None:
        """Prune and recover; read back from its folder, as a later run would find it."""
        folder = self._folder(number)
        mend_half_done_swap(folder)
        if not (folder.is_dir() and any(files_below(folder))):
            self.progress.say(f"round {number}: pruning")
            pruned = self.prune(model)
            if pruned.parameters == model.parameters:
                return None
            self.progress.say(f"round {number}: recovering")
            self.train(pruned, folder.with_name(f"{folder.name}.training")).save(folder)
        return self.load(folder)

    def figures(self, number: int, model: Checkpoint) -> Figures:
        """Measured once, then read."""
        from ..validate.measurement import score_checkpoint

        path = self.folder / f"{self._folder(number).name}.measured-{self.measured_with[:12]}.json"
        if path.exists():
            return read_document(path, Figures, _SCHEMA)
        self.progress.say(f"round {number}: measuring")
        quality = {name: float(value) for name, value in score_checkpoint(model, self.standard).items()}
        found = Figures(costs={"parameters": model.parameters, **self.costs(model)}, quality=quality)
        write_json(path, found.model_dump(mode="json"))
        return found

    def _folder(self, number: int) -> Path:
        return self.folder / f"round-{number}-{self.key(number)[:12]}"


def with_note(checkpoint: Checkpoint, name: str, record: CycleRecord) -> Checkpoint:
    """The kept model, whose last step says how the cycle went; as it came where no round was kept."""
    if record.kept == 0:
        return checkpoint
    *before, last = checkpoint.lineage.steps
    said = " ".join(filter(None, (last.note, f"Cycle {name}: {record.summary()}.")))
    steps = [*before, last.model_copy(update={"note": said})]
    return replace(checkpoint, lineage=checkpoint.lineage.model_copy(update={"steps": steps}))
