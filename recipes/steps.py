"""One function a verb: what the command line and recipes call, and what a Python user imports.

What trains is imported where it is called: transformers' Trainer takes seconds to import, which no other verb needs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UsageError, did_you_mean
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..prune.pruning import prune as prune_checkpoint
from ..prune.settings import PruneSettings
from ..prune.sparsify_settings import SparsifySettings
from ..validate.measurement import score_checkpoint
from ..validate.metrics.quality import headline_metric, higher_is_better, score
from ..validate.standard import set_standard
from .benching import bench, command_line
from .building import build, export_for_device
from .exporting import export
from .progress import SILENT, Progress
from .validating import ValidationAsked, validate
from .verifying import verify

if TYPE_CHECKING:
    from ..distill.callbacks import Modification
    from ..distill.distillation import Surroundings
    from ..distill.settings import DistillSettings
    from ..distill.trainer import Evaluation

__all__ = [
    "ValidationAsked", "bench", "build", "command_line", "distill", "evaluation_on", "export", "export_for_device",
    "prune", "sparsification", "validate", "verify",
]  # fmt: skip


def distill(
    teacher: Checkpoint,
    settings: DistillSettings,
    data: Data,
    *,
    student: Checkpoint | None = None,
    around: Surroundings | None = None,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Draw a student from the teacher (or go on with the one given) and train it.

    Args:
        around: where the teacher's outputs come from, what is measured while training, where it can be resumed from.
    """
    from ..distill.distillation import Surroundings
    from ..distill.distillation import distill as train_student
    from ..distill.student import draw_student

    if student is None:
        if settings.student is None:
            raise UsageError("A student has to be drawn from the teacher.", "Say how many layers it has: --layers N.")
        progress.say("drawing the student")
        student = draw_student(teacher, settings.student, data, settings.seed)
    elif settings.student is not None:
        raise UsageError("A student that is at hand already cannot be drawn again: leave its sizes out.")
    progress.say("distilling")
    return train_student(student, teacher, settings, data, replace(around or Surroundings(), progress=progress.advance))


def evaluation_on(data: Data, teacher: Checkpoint, metric: str | None = None) -> Evaluation:
    """Measure a student on these rows while it trains, against the references where there are any and against the
    teacher's own answers.

    Args:
        metric: what decides; the task's own when not given.

    Raises:
        UsageError: a metric that these rows do not give.
    """
    from ..distill.trainer import Evaluation

    standard = set_standard(teacher, data)
    own = score(
        teacher.task.name,
        standard.predictions,
        standard.predictions,
        standard.references,
        label_names=standard.label_names,
        pairs=standard.pairs,
    )
    if metric is not None and metric not in own:
        raise UsageError(
            f"There is no metric {metric!r} to watch; on {data.source} there are {', '.join(own)}."
            f"{did_you_mean(metric, own)}"
        )
    chosen = metric or headline_metric(teacher.task.name, own)
    return Evaluation(lambda student: score_checkpoint(student, standard), chosen, higher_is_better(chosen))


def sparsification(settings: SparsifySettings) -> Modification:
    """Sparsity that is reached while a distillation trains, for `Surroundings(modification=...)`."""
    from ..distill.callbacks import Modification
    from ..prune.gradual import SparsityInTraining

    return Modification(
        "sparsify",
        settings.summary,
        settings.model_dump(mode="json"),
        start=lambda student: SparsityInTraining(student, settings),
    )


def prune(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    data: Data | None = None,
    *,
    rationale: str | None = None,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Remove what matters least; see `PruneSettings`."""
    if settings.budget is not None:
        from .budget import prune_to_budget  # which compiles and times what it cuts, by the steps of this file

        return prune_to_budget(checkpoint, settings, data, rationale=rationale, progress=progress)
    return prune_checkpoint(checkpoint, settings, data, rationale, progress.advance)
