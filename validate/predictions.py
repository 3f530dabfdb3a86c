"""Running a model over examples, whatever computes it, and keeping what quality is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..models.batching import Examples, Run, batches_by_length, concatenate_in_order
from ..models.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Predictions = dict[str, np.ndarray]
"""Arrays whose first axis is the examples' order (object arrays of rows where examples differ in length)."""
Progress = Callable[[int, int], None]


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
