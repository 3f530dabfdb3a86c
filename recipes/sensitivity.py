"""Every part of a model cut alone, and what each cut costs: pruning's cuts, scored as validation scores."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..environment import facts
from ..errors import InputError, UsageError
from ..models.anatomy import anatomy_of
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.lineage import DataRecord
from ..prune.result import check_finite
from ..prune.sensitivity import (
    RANKED,
    STRUCTURES,
    ResumablePass,
    SensitivitySettings,
    measure_cuts,
    rank_parts,
    structures_of,
)
from ..validate.metrics.headline import higher_is_better
from ..validate.metrics.sensitivity import CutScorer
from ..validate.records.sensitivity import DEFAULT_TOLERANCE, Sensitivity, SensitivityRecord
from ..validate.standard import Standard
from .progress import SILENT, Progress
from .steps import command_line


def sensitivity(
    checkpoint: Checkpoint,
    data: Data,
    settings: SensitivitySettings | None = None,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    progress: Progress = SILENT,
) -> Sensitivity:
    """For every layer and structure, quality against how much of it is cut, on these rows, without training.

    Args:
        data: rows with the task's fields; with references quality is measured against them, and without them by how
            well the answers agree with the uncut model's own.
        tolerance: the loss, as a share of the uncut model's metric, above which the smallest cut makes a part
            untouchable.

    Raises:
        UsageError: an unknown importance, or a tolerance that is none.
        InputError: an unknown architecture, a structure that the model lacks, weights that hold NaN, or data without
            usable rows.
    """
    settings = settings or SensitivitySettings()
    if not 0 <= tolerance < 1:
        raise UsageError(f"A tolerance of {tolerance:g} is none; it is a share, at least 0 and less than 1.")
    check_finite(checkpoint)
    structures = structures_of(checkpoint, settings)
    rows = _drawn(data, settings)
    examples = checkpoint.task.examples(rows, checkpoint.tokenizer, checkpoint.max_length, checkpoint.model.config)
    if len(examples) == 0:
        raise InputError(f"{data.source} has no rows that the model could answer.")
    passes = ResumablePass(checkpoint, examples, settings.batch_size)
    progress.say("the uncut model")
    scorer = CutScorer(Standard(checkpoint, rows, examples.references, passes.answers(), examples.pairs))
    progress.say("importance")
    scores = rank_parts(checkpoint, examples, settings, progress.advance)
    progress.say("cutting one part at a time")
    measured = measure_cuts(passes, settings, scores, scorer, progress.advance)
    return Sensitivity(
        **_facts_of(checkpoint, rows, scorer),
        structures=list(structures),
        shares=list(settings.shares),
        method=settings.method if scores is not None else None,
        tolerance=tolerance,
        records=[SensitivityRecord(**vars(cut), **vars(score)) for cut, score in measured],
        notes=_notes(structures, settings),
    )


def _facts_of(checkpoint: Checkpoint, rows: Data, scorer: CutScorer) -> dict[str, Any]:
    """What was measured on what, and where."""
    return {
        "model": checkpoint.lineage.origin,
        "model_hash": checkpoint.hash,
        "task": checkpoint.task.name,
        "layers": len(anatomy_of(checkpoint.model).layers(checkpoint.model)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "data": DataRecord.of(rows),
        "metric": scorer.metric,
        "higher_is_better": scorer.higher_is_better,
        "against_references": scorer.against_references,
        "uncut": scorer.uncut,
        "drift_metric": scorer.drift_metric,
        "drift_higher_is_better": higher_is_better(scorer.drift_metric),
        "environment": facts(),
    }


def _drawn(data: Data, settings: SensitivitySettings) -> Data:
    """`samples` of the rows by chance, since files are often sorted by label."""
    if settings.samples is None or settings.samples >= len(data):
        return data
    chosen = np.random.default_rng(settings.seed).choice(len(data), size=settings.samples, replace=False)
    return Data(data.rows.select(np.sort(chosen)), data.source, data.columns)


def _notes(structures: tuple[str, ...], settings: SensitivitySettings) -> list[str]:
    notes = ["Each part is cut alone and nothing is trained: losses of cuts made together do not add up, and training "
             "brings much of a loss back."]  # fmt: skip
    if any(name in structures for name in RANKED):
        notes.append(
            f"The least important heads and channels by {settings.method} go first, judged on the same rows that the "
            "cuts are measured on; single weights go by magnitude, each matrix by the same share."
        )
    missing = [name for name in STRUCTURES if name not in structures]
    if settings.structures is None and missing:
        notes.append(f"This model has none of: {', '.join(missing)}.")
    return notes
