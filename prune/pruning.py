"""Pruning by settings: one function from checkpoint to checkpoint, the step written into the history."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ..errors import InputError, UsageError
from ..models.anatomy import anatomy_of, reduction_axis
from ..models.batching import Examples
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.importance import Calibration, Progress, get_importance
from ..models.lineage import DataRecord, Step
from ..models.sparsity import is_semi_structured
from .one_shot import get_sparsifier
from .result import PruneResult
from .semi_structured import prune_semi_structured
from .settings import PruneSettings
from .structured import prune_structure
from .unstructured import prune_unstructured

Pruning = Callable[[Checkpoint, PruneSettings, Calibration | None], PruneResult]


def prune(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    data: Data | None = None,
    rationale: str | None = None,
    progress: Progress | None = None,
    pruning: Pruning | None = None,
) -> Checkpoint:
    """Prune a checkpoint and add the step to its history; the checkpoint that came in is left as it was.

    Args:
        data: rows with the task's fields, for a method that looks at data; other methods leave them unread.
        rationale: why, in the user's words, for the history.
        progress: called with (batches done, batches in all) while the data is looked at.
        pruning: what does it, where that needs more than this room has: a budget is measured on a backend.

    Raises:
        UsageError: a method that needs data without any, or parts to be cut from a model that is 2:4 already.
        InputError: an unknown architecture, weights that hold NaN, or data without usable rows.
    """
    begun = time.perf_counter()
    used = _rows_used(settings, data) if needs_data(settings) else None
    calibration = _calibration(checkpoint, settings, used, progress) if used is not None else None
    result = (pruning or _pruned)(checkpoint, settings, calibration)
    step = Step(
        verb="prune",
        method=result.method,
        settings={**settings.model_dump(mode="json", exclude_defaults=True), **result.settings},
        rationale=rationale,
        parent=checkpoint.hash,
        data=DataRecord.of(used) if used is not None else None,
        seconds=round(time.perf_counter() - begun, 3),
        widths=result.widths,
        note=result.note,
    )
    return checkpoint.after(result.model, step, used)


def needs_data(settings: PruneSettings) -> bool:
    """Whether these settings look at examples.

    Raises:
        UsageError: a method that does not exist.
    """
    if settings.pattern is not None or settings.sparsity is not None:
        return get_sparsifier(settings.chosen_by).needs_data
    return settings.repair or get_importance(settings.chosen_by).needs_data


def _rows_used(settings: PruneSettings, data: Data | None) -> Data:
    """The rows that are looked at: `samples` of them by chance, since files are often sorted by label."""
    if data is None:
        what = "Repair" if settings.repair else f"Pruning by {settings.chosen_by}"
        raise UsageError(
            f"{what} looks at examples, and there are none.",
            "Add --data FILE (labels are not needed), or take --method magnitude without repair.",
        )
    if settings.samples is None or settings.samples >= len(data):
        return data
    chosen = np.random.default_rng(settings.seed).choice(len(data), size=settings.samples, replace=False)
    return Data(data.rows.select(np.sort(chosen)), data.source, data.columns)


def _calibration(checkpoint: Checkpoint, settings: PruneSettings, data: Data, progress: Progress | None) -> Calibration:
    length = min(settings.max_length or checkpoint.max_length, checkpoint.max_length)
    examples = checkpoint.task.examples(data, checkpoint.tokenizer, length, checkpoint.model.config)
    if len(examples) == 0:
        raise InputError(f"{data.source} has no rows that pruning could look at.")
    return Calibration(_at_most(examples, settings), settings.batch_size, settings.seed, progress)


def _at_most(examples: Examples, settings: PruneSettings) -> Examples:
    """A long text is many windows of a language model: of these too, no more than `samples` are looked at."""
    many, count = len(examples.features), settings.samples
    if count is None or many <= count or examples.pairs:
        return examples
    chosen = np.sort(np.random.default_rng(settings.seed).choice(many, size=count, replace=False))
    references = examples.references
    if references is not None and len(references) == many:
        references = references[chosen]
    return Examples([examples.features[index] for index in chosen], references)


def _pruned(checkpoint: Checkpoint, settings: PruneSettings, calibration: Calibration | None) -> PruneResult:
    if settings.pattern is not None:
        return prune_semi_structured(
            checkpoint, settings.pattern, settings.chosen_by, calibration, permute=settings.permute
        )
    if settings.sparsity is not None:
        return prune_unstructured(
            checkpoint, settings.sparsity, settings.chosen_by, settings.allocation, settings.block, calibration
        )
    refuse_if_sparse(checkpoint, settings)
    return prune_structure(checkpoint, settings, calibration)


def refuse_if_sparse(checkpoint: Checkpoint, settings: PruneSettings) -> None:
    """Cutting channels out of a 2:4 matrix moves its neighbours into other groups of four, and the pattern is gone.

    Raises:
        UsageError: the model is 2:4 sparse, and more than whole layers is to be cut.
    """
    if settings.structure == "layers":
        return
    blocks = anatomy_of(checkpoint.model).ffn(checkpoint.model)
    if all(is_semi_structured(block.down.weight.detach().numpy(), reduction_axis(block.down)) for block in blocks):
        raise UsageError(
            f"{checkpoint.source} is 2:4 sparse already; cutting channels now would break the pattern.",
            "Cut channels first, then prune with --pattern 2:4.",
        )
