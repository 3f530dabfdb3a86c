"""What each objective contributes: the same student trained with all of them, then with each left out in turn."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .. import __version__
from ..distill.distillation import Surroundings
from ..distill.distillation import distill as train_student
from ..distill.objectives import DEFAULT_OBJECTIVES, build_objectives
from ..distill.settings import DistillSettings
from ..distill.student import draw_student
from ..errors import UsageError
from ..files import files_below, mend_half_done_swap, sha256_of_json, write_json, write_text
from ..models.checkpoint import Checkpoint, load_checkpoint
from ..models.data import Data
from ..models.lineage import DataRecord
from ..validate.measurement import check_overlap
from ..validate.metrics.comparison import chosen_metric, metric_interval, paired_difference
from ..validate.metrics.headline import higher_is_better
from ..validate.predictions import Predictions, predict
from ..validate.records.report import short_number
from ..validate.standard import Standard, examples_for, set_standard
from .keys import outputs_read
from .progress import SILENT, Progress
from .teachers import teacher_runtime

ABLATION_FILE, ABLATION_TABLE = "ablation.json", "ablation.md"
ABLATION_SCHEMA = 1
_STOPS_UNEQUALLY = ("patience", "evaluate_every")
_ALL, _UNTRAINED = "all objectives", "untrained"


class AblationRow(BaseModel):
    """One student of the table. `low` and `high` are the ends of a 95 % interval; a difference is to the student of all
    objectives, on the same examples."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    name: str
    left_out: str | None = None
    value: float
    low: float
    high: float
    by_seed: list[float]
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    method: str
    """How the difference's interval was made; the value's own where there is no difference."""

    @property
    def differs(self) -> bool:
        """Whether 0 lies outside the difference's interval."""
        low, high = self.difference_low, self.difference_high
        return low is not None and high is not None and not low <= 0 <= high


class Ablation(BaseModel):
    """`ablation.json`: what was compared, and the table."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    schema_version: int = ABLATION_SCHEMA
    teacher: str
    teacher_value: float | None
    """The teacher's own value of the metric, where it has one."""
    metric: str
    higher_is_better: bool
    seeds: list[int]
    settings: dict[str, Any]
    data: DataRecord
    measured_on: DataRecord
    rows: list[AblationRow]
    notes: list[str] = Field(default_factory=list)
    limbeck: str = __version__


@dataclass(frozen=True)
class AblationPlan:
    """What is compared on what."""

    teacher: Checkpoint
    settings: DistillSettings
    """Of the student with all objectives; `metric` is the one that the table shows."""
    data: Data
    measured_on: Data
    student: Checkpoint | None = None
    """Trained instead of one drawn from the teacher."""
    seeds: int = 1
    """Every student is trained so many times, from the settings' seed upwards."""
    teacher_runtime: str = "eager"
    teacher_cache: Path | None = None
    """A folder that keeps the teacher's outputs, a sub-folder for students that read the same of it."""

    @property
    def objectives(self) -> Mapping[str, Any]:
        """The full set."""
        return self.settings.objectives or DEFAULT_OBJECTIVES[self.teacher.task.name]

    @cached_property
    def inputs(self) -> list[str]:
        """What every student depends on beside its settings."""
        return [self.teacher.hash, self.data.exact_hash(), self.teacher_runtime, __version__]


def ablate(plan: AblationPlan, out: Path, progress: Progress = SILENT) -> Ablation:
    """Train the student with all objectives and with each left out in turn, for the same steps on the same data, and
    write the table into `out` (`ablation.json`, `ablation.md`) beside the students. A student that is there already is
    not trained again.

    Raises:
        UsageError: nothing to leave out, settings by which the students would be trained unequally long, or a metric
            that the rows do not give.
        InputError: data that cannot be used.
    """
    _refuse(plan)
    progress.say("the teacher on the rows to measure on")
    standard = set_standard(plan.teacher, plan.measured_on, progress=progress.advance)
    metric, reached = chosen_metric(standard, plan.settings.metric)
    untrained = plan.student or draw_student(plan.teacher, _drawn(plan), plan.data, plan.settings.seed)
    answers: dict[str, list[Predictions]] = {}
    for name, objectives in _variants(plan):
        answers[name] = [
            _answers(_trained(plan, name, objectives, seed, untrained, out, progress), standard)
            for seed in _seeds(plan)
        ]
    answers[_UNTRAINED] = [_answers(_copy(untrained), standard)]
    progress.say("intervals")
    overlap = check_overlap(plan.measured_on, set(plan.data.row_hashes))
    ablation = Ablation(
        teacher=plan.teacher.lineage.origin,
        teacher_value=reached,
        metric=metric,
        higher_is_better=higher_is_better(metric),
        seeds=_seeds(plan),
        settings=json.loads(plan.settings.model_copy(update={"objectives": dict(plan.objectives)}).model_dump_json()),
        data=DataRecord.of(plan.data),
        measured_on=DataRecord.of(plan.measured_on),
        rows=[_row(name, metric, answers, standard) for name in answers],
        notes=[] if overlap.passed else [f"{overlap.detail}: the figures flatter what was trained."],
    )
    write_json(out / ABLATION_FILE, ablation.model_dump(mode="json"))
    write_text(out / ABLATION_TABLE, ablation_markdown(ablation))
    return ablation


def _refuse(plan: AblationPlan) -> None:
    settings, names = plan.settings, list(plan.objectives)
    build_objectives(plan.objectives, plan.teacher.task, has_labels=True)
    if len(names) == 1:
        raise UsageError(
            f"There is one objective, {names[0]}: it cannot be left out.", "Name two or more to compare: --objective."
        )
    unequal = [name for name in _STOPS_UNEQUALLY if getattr(settings, name) is not None]
    if unequal:
        raise UsageError(
            f"An ablation trains every student for the same steps; {unequal[0]} would stop or choose them by the rows "
            "that they are compared on.",
            f"Leave {unequal[0]} out.",
        )
    if plan.student is not None and settings.student is not None:
        raise UsageError("A student that is at hand already cannot be drawn again: leave its sizes out.")
    _drawn(plan)


def _drawn(plan: AblationPlan) -> Any:
    if plan.student is None and plan.settings.student is None:
        raise UsageError("A student has to be drawn from the teacher.", "Say how many layers it has: --layers N.")
    return plan.settings.student


def _seeds(plan: AblationPlan) -> list[int]:
    return [plan.settings.seed + number for number in range(plan.seeds)]


def _variants(plan: AblationPlan) -> Iterator[tuple[str, dict[str, Any]]]:
    yield _ALL, dict(plan.objectives)
    for left_out in plan.objectives:
        yield f"without {left_out}", {name: value for name, value in plan.objectives.items() if name != left_out}


def _trained(
    plan: AblationPlan, name: str, objectives: Mapping[str, Any], seed: int, untrained: Checkpoint, out: Path,
    progress: Progress,
) -> Checkpoint:  # fmt: skip
    """The student of one variant and seed: read where it is there, else trained and saved."""
    settings = plan.settings.model_copy(update={"objectives": dict(objectives), "seed": seed, "metric": None})
    cached = plan.teacher_cache is not None
    key = sha256_of_json([*plan.inputs, untrained.hash, cached, settings.model_dump(mode="json")])
    folder = out / f"{name.replace(' ', '-')}-seed{seed}-{key[:12]}"
    mend_half_done_swap(folder)
    if folder.is_dir() and any(files_below(folder)):
        progress.say(f"{name}, seed {seed}: done already")
    else:
        progress.begin(f"{name}, seed {seed}")
        progress.say("distilling")
        around = Surroundings(
            teacher_runtime=lambda recorded: teacher_runtime(recorded, plan.teacher_runtime, progress),
            teacher_cache=_cache(plan, settings, untrained),
            work=folder.with_name(f"{folder.name}.training"),
            progress=progress.advance,
        )
        train_student(_copy(untrained), plan.teacher, settings, plan.data, around).save(folder)
    return load_checkpoint(folder, plan.teacher.task.name)


def _cache(plan: AblationPlan, settings: DistillSettings, untrained: Checkpoint) -> Path | None:
    """Students whose objectives read the same of the teacher share a folder."""
    if plan.teacher_cache is None:
        return None
    read = outputs_read(settings, plan.teacher.task.name)
    return plan.teacher_cache / sha256_of_json([*plan.inputs, untrained.hash, settings.max_length, read])[:12]


def _copy(untrained: Checkpoint) -> Checkpoint:
    """Training changes its student in place."""
    return replace(untrained, model=copy.deepcopy(untrained.model))


def _answers(student: Checkpoint, standard: Standard) -> Predictions:
    examples = examples_for(standard.teacher, standard.data, student.tokenizer, student.max_length)
    return predict(student.run, examples, student.task, student.tokenizer)


def _row(name: str, metric: str, answers: Mapping[str, Sequence[Predictions]], standard: Standard) -> AblationRow:
    own = metric_interval(metric, answers[name], standard)
    difference = None if name == _ALL else paired_difference(metric, answers[name], answers[_ALL], standard)
    return AblationRow(
        name=name,
        left_out=name.removeprefix("without ") if name.startswith("without ") else None,
        value=own.point,
        low=own.low,
        high=own.high,
        by_seed=[metric_interval(metric, [run], standard).point for run in answers[name]],
        difference=difference.point if difference else None,
        difference_low=difference.low if difference else None,
        difference_high=difference.high if difference else None,
        method=(difference or own).method,
    )


HEADINGS = ("Student", "Value", "95 % interval", "Difference", "95 % interval of the difference")


def ablation_cells(ablation: Ablation) -> Iterator[tuple[str, ...]]:
    """The table's rows as text, in the order of `HEADINGS`; the teacher first, where it has a value."""
    if ablation.teacher_value is not None:
        yield f"teacher ({ablation.teacher})", short_number(ablation.teacher_value), "", "", ""
    for row in ablation.rows:
        between = f"{short_number(row.low)} to {short_number(row.high)}"
        if row.difference is None or row.difference_low is None or row.difference_high is None:
            yield row.name, short_number(row.value), between, "", ""
            continue
        apart = f"{row.difference_low:+.4f} to {row.difference_high:+.4f}"
        yield row.name, short_number(row.value), between, f"{row.difference:+.4f}", apart


def ablation_caption(ablation: Ablation) -> str:
    """What the table is of."""
    better = "higher" if ablation.higher_is_better else "lower"
    seeds = f"seed {ablation.seeds[0]}" if len(ablation.seeds) == 1 else f"mean of {len(ablation.seeds)} seeds"
    return (
        f"{ablation.metric} ({better} is better) on {ablation.measured_on.rows:,} rows of "
        f"{ablation.measured_on.source}; {seeds}"
    )


def ablation_markdown(ablation: Ablation) -> str:
    """The table as Markdown."""
    rules = ["---", *["---:"] * (len(HEADINGS) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADINGS, rules, *ablation_cells(ablation))]
    told = (
        "A difference is to the student of all objectives on the same examples (paired); an interval that leaves out 0 "
        "means that the objective matters on data like these. Each interval is for its row alone, and speaks of other "
        "examples, not of other seeds."
    )
    title = f"## {ablation_caption(ablation)}"
    return "\n\n".join([title, "\n".join(lines), told, *(f"> **Note:** {note}" for note in ablation.notes)]) + "\n"
