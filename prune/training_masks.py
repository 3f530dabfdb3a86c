"""Masks by score: true where a weight stays. Of equal scores the first stays, so every process makes the same mask."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch


def keep_largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at exactly `count` of the largest scores, in the shape of `scores` (any shape, finite).

    A selection, not a sort: its time is proportional to the number of scores.
    """
    flat = scores.flatten()
    if count >= len(flat):
        return torch.ones_like(scores, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = torch.kthvalue(flat, len(flat) - count + 1).values
    kept = flat > threshold
    equal = (flat == threshold).nonzero().flatten()
    kept[equal[: count - int(kept.sum())]] = True
    return kept.view_as(scores)


def keep_share(scores: Sequence[torch.Tensor], share: float, together: bool) -> list[torch.Tensor]:
    """Masks that keep the largest `share` of each tensor, or of all `together`."""
    if not together:
        return [keep_largest(each, round(share * each.numel())) for each in scores]
    *ends, total = accumulate(each.numel() for each in scores)
    mask = keep_largest(torch.cat([each.flatten() for each in scores]), round(share * total))
    return [part.view_as(each) for part, each in zip(mask.tensor_split(ends), scores, strict=True)]


def block_sums(scores: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The sum over every block of rows x columns: [R, C] -> [R / rows, C / columns]."""
    height, width = scores.shape
    return scores.reshape(height // rows, rows, width // columns, columns).sum(dim=(1, 3))


def fill_blocks(mask: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Every value repeated over its block: [R, C] -> [R * rows, C * columns]."""
    return mask.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
