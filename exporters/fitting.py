"""Batches of any size for a program that takes certain sizes: split where too large, padded where too small."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..models.batching import Batch, Run
from .settings import ShapeRange


def fitted(run: Run, shapes: ShapeRange) -> Run:
    """A program that takes only `shapes` as one that takes any batch of texts that are not too long."""

    def call(batch: Mapping[str, torch.Tensor]) -> Mapping[str, np.ndarray]:
        rows, size = len(next(iter(batch.values()))), shapes.max_batch
        starts = range(0, rows, size)
        parts = [_run(run, {name: value[i : i + size] for name, value in batch.items()}, shapes) for i in starts]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return call


def _run(run: Run, batch: Batch, shapes: ShapeRange) -> Mapping[str, np.ndarray]:
    rows, tokens = next(iter(batch.values())).shape
    longer = padded_to(batch, shapes)
    taken = tuple(next(iter(longer.values())).shape)
    outputs = run(longer)
    if taken == (rows, tokens):
        return outputs
    return {
        # Per token [batch, sequence, ...], per text [batch, ...].
        name: value[:rows, :tokens] if value.ndim >= 3 and value.shape[:2] == taken else value[:rows]
        for name, value in outputs.items()
    }


def padded_to(batch: Mapping[str, torch.Tensor], shapes: ShapeRange) -> Batch:
    """The batch, int64 [batch, sequence] by name, at the smallest size that the program takes: zeros on the right,
    where the mask's zeros say that nothing is, and copies of the last row below."""
    rows, tokens = next(iter(batch.values())).shape
    more_rows, more_tokens = max(shapes.min_batch - rows, 0), max(shapes.min_sequence - tokens, 0)
    if not more_rows and not more_tokens:
        return dict(batch)
    longer = {name: torch.nn.functional.pad(value, (0, more_tokens)) for name, value in batch.items()}
    return {name: torch.cat([value, value[-1:].expand(more_rows, -1)]) for name, value in longer.items()}
