"""Means over the global batch: the same value and gradient whether one process holds the batch or several share it.

DistributedDataParallel averages gradients over processes. A mean over examples is right under that average when every
process holds as many; a mean over tokens, or over pairs of examples that lie in different processes, is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


def processes() -> int:
    """How many processes train together; 1 outside a launcher."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """Rows [batch, ...] of every process in rank order, [processes * batch, ...], with their gradient: a loss over all
    of them, computed alike by every process, gets the gradient that one process with the whole batch would get.

    Every process must hold the same number of rows.
    """
    return rows if processes() == 1 else _Gather.apply(rows)  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """Every process gets all rows, and each row the sum of the gradients that all processes have for it."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(processes())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)  # autograd may hand it to others too
        distributed.all_reduce(gradient)
        return gradient.chunk(processes())[distributed.get_rank()]


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum of a constant over all processes; no gradient flows through it."""
    value = value.detach().clone()
    if processes() > 1:
        distributed.all_reduce(value)
    return value


def global_mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The mean (weighted, where `weights` of the same shape are given) over everything in the global batch.

    What each process returns is scaled so that the processes' average is the global mean, in value and in gradient.
    An empty global batch gives 0.
    """
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    count = total(weights.sum())
    return (values * weights).sum() * processes() / count.clamp(min=1e-12)
