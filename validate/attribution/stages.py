"""What each stage of a recipe cost: its model in eager torch, on the rows that candidates are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...models.checkpoint import Checkpoint, load_checkpoint
from ..metrics.comparison import chosen_metric
from ..predictions import Predictions
from ..records.report import StageResult
from ..standard import Standard
from .answers import answers_of, longest_of, loss_between, metrics_of
from .points import Progressing

TEACHER = "teacher"


@dataclass(frozen=True)
class StageAsked:
    """A stage's name, that of the stage (or `teacher`) that it started from, and the checkpoint that it made."""

    name: str
    start: str
    folder: Path


@dataclass(frozen=True)
class _Made:
    """What a stage is compared with: the answers of its start, and how long the history was by then."""

    answers: Predictions
    steps: int


def measure_stages(
    asked: Sequence[StageAsked], standard: Standard, progress: Progressing
) -> tuple[list[StageResult], Mapping[str, Predictions]]:
    """Every stage with its metrics and what it lost to its start; and their answers, by the hash of the checkpoint. One
    model is in memory at a time beside the teacher.

    Args:
        asked: in an order in which each comes after its start.

    Raises:
        InputError: a checkpoint that does not load.
    """
    made = {TEACHER: _Made(standard.predictions, len(standard.teacher.lineage.steps))}
    results, known = [], {}
    metric = chosen_metric(standard)[0] if asked else ""
    for stage in asked:
        progress.say(f"the stage {stage.name}")
        checkpoint, before = load_checkpoint(stage.folder, standard.teacher.task.name), made[stage.start]
        longest = longest_of(checkpoint, standard)
        answers, _ = answers_of(checkpoint.run, checkpoint, longest, standard, progress.advance)
        found = _described(stage, checkpoint, before)
        loss = loss_between(metric, before.answers, answers, standard)
        results.append(found.model_copy(update={"metrics": metrics_of(answers, standard), "loss": loss}))
        made[stage.name] = _Made(answers, len(checkpoint.lineage.steps))
        known[checkpoint.hash] = answers
    return results, known


def _described(stage: StageAsked, checkpoint: Checkpoint, before: _Made) -> StageResult:
    """By its own history: a cycle has added several steps, a stage without a change none."""
    steps = checkpoint.lineage.steps
    added = steps[before.steps :] if len(steps) > before.steps else []
    weights = list(checkpoint.module.parameters())
    return StageResult(
        name=stage.name,
        start=stage.start,
        verb=added[-1].verb if added else None,
        method=" + ".join(dict.fromkeys(step.method for step in added)),
        checkpoint_hash=checkpoint.hash,
        parameters=checkpoint.parameters,
        zeros=sum(int((weight == 0).sum()) for weight in weights) / checkpoint.parameters,
        size_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        seconds=sum(step.seconds or 0.0 for step in added),
    )
