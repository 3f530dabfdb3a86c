"""Pruning by settings: one function from checkpoint to checkpoint, the step written into the history."""

from __future__ import annotations

import time

import numpy as np

from ..errors import InputError, UsageError
from ..models.anatomy import anatomy_of, reduction_axis
from ..models.batching import Examples
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.lineage import DataRecord, Step
from ..models.sparsity import is_semi_structured
from .importance import Progress, get_importance
from .result import PruneResult
from .semi_structured import prune_semi_structured
from .settings import PruneSettings
from .structured import prune_ffn


def prune(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    data: Data | None = None,
    rationale: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Prune a checkpoint and add the step to its history; the checkpoint that came in is left as it was.

    Args:
        data: rows with the task's fields, for a method that looks at data; other methods leave them unread.
        rationale: why, in the user's words, for the history.
        progress: called with (batches done, batches in all) while importance is measured.

    Raises:
        UsageError: a method that needs data without any, or channels to be cut from a model that is 2:4 already.
        InputError: an unknown architecture, weights that hold NaN, or data without usable rows.
    """
    begun = time.perf_counter()
    used = _rows_used(settings, data)
    result = (
        _cut_channels(checkpoint, settings, used, progress)
        if settings.pattern is None
        else prune_semi_structured(checkpoint, settings.pattern)
    )
    step = Step(
        verb="prune",
        method=result.method,
        settings=settings.model_dump(exclude_none=True),
        rationale=rationale,
        parent=checkpoint.hash,
        data=DataRecord.of(used) if used is not None else None,
        seconds=round(time.perf_counter() - begun, 3),
        widths=result.widths,
        note=result.note,
    )
    return checkpoint.after(result.model, step, used)


def _rows_used(settings: PruneSettings, data: Data | None) -> Data | None:
    """The rows that importance looks at: `samples` of them by chance, since files are often sorted by label."""
    if not get_importance(settings.method).needs_data:
        return None
    if data is None:
        raise UsageError(
            f"Pruning by {settings.method} looks at examples, and there are none.",
            "Add --data FILE (labels are not needed), or take --method magnitude.",
        )
    if settings.samples is None or settings.samples >= len(data):
        return data
    chosen = np.random.default_rng(settings.seed).choice(len(data), size=settings.samples, replace=False)
    return Data(data.rows.select(np.sort(chosen)), data.source, data.columns)


def _cut_channels(
    checkpoint: Checkpoint, settings: PruneSettings, used: Data | None, progress: Progress | None
) -> PruneResult:
    _refuse_if_sparse(checkpoint)
    return prune_ffn(
        checkpoint,
        settings.keep or 1.0,
        settings.method,
        _examples(checkpoint, used) if used is not None else None,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=progress,
    )


def _examples(checkpoint: Checkpoint, data: Data) -> Examples:
    examples = checkpoint.task.examples(data, checkpoint.tokenizer, checkpoint.max_length, checkpoint.model.config)
    if len(examples) == 0:
        raise InputError(f"{data.source} has no rows that importance could look at.")
    return examples


def _refuse_if_sparse(checkpoint: Checkpoint) -> None:
    """Cutting channels out of a 2:4 matrix moves its neighbours into other groups of four, and the pattern is gone."""
    blocks = anatomy_of(checkpoint.model).ffn(checkpoint.model)
    if all(is_semi_structured(block.down.weight.detach().numpy(), reduction_axis(block.down)) for block in blocks):
        raise UsageError(
            f"{checkpoint.source} is 2:4 sparse already; cutting channels now would break the pattern.",
            "Cut channels first, then prune with --pattern 2:4.",
        )
