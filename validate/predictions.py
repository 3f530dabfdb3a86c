"""Running a model over examples, whatever computes it, and keeping what quality is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..models.batching import Examples, Run, batches_by_length, concatenate_in_order
from ..models.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Predictions = dict[str, np.ndarray]
"""Arrays whose first axis is the examples' order (object arrays of rows where examples differ in length)."""
Progress = Callable[[int, int], None]


def broken(answers: Predictions) -> bool:
    """Whether any of the answers is NaN or infinite."""
    return not all(_finite(values) for values in answers.values())


def _finite(values: np.ndarray) -> bool:
    rows: Sequence[np.ndarray] = list(values) if values.dtype == object else [values]
    return all(bool(np.isfinite(row).all()) for row in rows)


def predict(
    run: Run,
    examples: Examples,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> Predictions:
    """What `run` answers to every example, in their order."""
    parts = []
    done = 0
    for positions, batch in batches_by_length(examples, tokenizer, batch_size):
        parts.append((positions, task.predictions(run(batch), batch)))
        done += len(positions)
        progress(done, len(examples))
    return concatenate_in_order(parts)
