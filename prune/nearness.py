"""How near pruned models are to the whole one by what they answer: the check behind whatever importance or a
layer's error only promises. No labels are looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..models.batching import Batch, Examples, batches_by_length
from ..models.checkpoint import Checkpoint
from ..models.placement import placed

if TYPE_CHECKING:
    from ..models.importance import Calibration

HELD_OUT, MOST_HELD_OUT = 0.2, 64
"""The share of the examples that nothing is fitted to, and how many texts are enough to judge by."""


def parted(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """The examples to decide by, and those held out to judge by. Both texts of a pair are on the same side: they are
    alike.

    Raises:
        InputError: there are not two.
    """
    examples = calibration.examples
    texts = 2 if examples.pairs else 1
    count = len(examples) // texts
    if count < 2:
        raise InputError("Some examples are held out to judge by, and there is one alone.", "Give it more rows.")
    many = max(1, min(round(HELD_OUT * count), MOST_HELD_OUT // texts))
    chosen = np.random.default_rng(calibration.seed).permutation(count)[:many]
    out = np.isin(np.arange(len(examples)) % count, chosen)
    held_out = replace(_only(calibration, np.flatnonzero(out)), progress=None)
    return _only(calibration, np.flatnonzero(~out)), held_out


def _only(calibration: Calibration, places: np.ndarray) -> Calibration:
    """Examples at some places; a task's references stay behind, since nothing is scored."""
    return replace(calibration, examples=Examples([calibration.examples.features[place] for place in places]))


def distances(whole: Checkpoint, others: Sequence[Checkpoint], looked_at: Calibration) -> list[float]:
    """How far the others' outputs y are from the whole model's y0, `sum |y - y0|^2 / sum |y0|^2` over the examples and
    their real tokens: 0 for the same outputs, about 1 where nothing is left of them. For unit vectors it is
    `2 (1 - mean cosine)`. Of logits, what all classes have in common is left out, which softmax does not see.

    One batch at a time goes through all models, on the GPU where one has room; none of the outputs are kept.
    """
    whole, others = placed(whole), [placed(other) for other in others]
    off, size = np.zeros(len(others)), 0.0
    for _, batch in batches_by_length(looked_at.examples, whole.tokenizer, looked_at.batch_size):
        expected = _outputs(whole, batch)
        size += _squares(expected)
        off += [_squares(_outputs(other, batch) - expected) for other in others]
    return [float(each) for each in off / max(size, 1e-300)]


def _squares(values: np.ndarray) -> float:
    return float(np.square(values).sum(dtype=np.float64))


def _outputs(checkpoint: Checkpoint, batch: Batch) -> np.ndarray:
    """float32 [texts or real tokens, values]."""
    outputs: Mapping[str, np.ndarray] = checkpoint.run(batch)
    found = outputs[checkpoint.task.output]
    if found.ndim == 3:
        found = found[batch["attention_mask"].bool().numpy()]
    return found - found.mean(axis=1, keepdims=True) if checkpoint.task.output == "logits" else found
