"""Patterns of zeros: which weights of a matrix [out, in] stay, given a score for each of them.

Scores are float32 [out, in], not negative, higher = more is lost without the weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..models.sparsity import why_not_sparse


class Pattern(ABC):
    """Which weights stay."""

    span: int | None
    """So many neighbouring columns (inputs) are decided together; `None` where any number of them may be."""

    @abstractmethod
    def keep(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool [out, in]: true where a weight stays."""

    @abstractmethod
    def why_not(self, rows: int, columns: int) -> str | None:
        """The reason for which a matrix [rows, columns] cannot have this pattern, or `None` where it can."""


@dataclass(frozen=True)
class SemiStructured(Pattern):
    """N:M: the `n` highest scores of every `m` consecutive inputs of an output stay."""

    n: int
    m: int

    @property
    def span(self) -> int:  # type: ignore[override]
        return self.m

    def keep(self, scores: torch.Tensor) -> torch.Tensor:
        return nm_mask(scores, self.n, self.m, dim=1)

    def why_not(self, rows: int, columns: int) -> str | None:
        if columns % self.m:
            return f"its input size {columns} does not divide into groups of {self.m}"
        return why_not_sparse(columns, rows)


@dataclass(frozen=True)
class Share(Pattern):
    """The lowest `sparsity` of the blocks go, compared over the whole matrix, or (`by_row`) over one row of blocks, so
    that every output loses as much. A block's score is the L2 norm of the scores in it."""

    sparsity: float
    block: tuple[int, int] = (1, 1)
    """Rows (outputs) and columns (inputs) of a block."""
    by_row: bool = False

    span = None

    def keep(self, scores: torch.Tensor) -> torch.Tensor:
        blocks = block_scores(scores, self.block)
        compared = blocks if self.by_row else blocks.reshape(1, -1)
        go = round(self.sparsity * compared.shape[1])
        mask = torch.ones_like(compared, dtype=torch.bool)
        mask.scatter_(1, compared.topk(go, dim=1, largest=False, sorted=False).indices, False)
        return _spread(mask.view_as(blocks), self.block)

    def why_not(self, rows: int, columns: int) -> str | None:
        return _why_no_blocks(rows, columns, self.block)


@dataclass(frozen=True)
class Above(Pattern):
    """Blocks whose score, divided by `scale`, is higher than a threshold stay: one threshold for several matrices."""

    threshold: float
    scale: float
    block: tuple[int, int] = (1, 1)

    span = None

    def keep(self, scores: torch.Tensor) -> torch.Tensor:
        return _spread(block_scores(scores, self.block) / self.scale > self.threshold, self.block)

    def why_not(self, rows: int, columns: int) -> str | None:
        return _why_no_blocks(rows, columns, self.block)


def nm_mask(weight: torch.Tensor, n: int, m: int, dim: int) -> torch.Tensor:
    """True at the n largest magnitudes of every m consecutive values along `dim`; of equal ones the first.

    Returns:
        A bool tensor of the weight's shape, with exactly n of every m true.

    Raises:
        InputError: the size along `dim` is not a multiple of m.
    """
    size = weight.shape[dim]
    if size % m:
        raise InputError(f"A size of {size} does not divide into groups of {m}.")
    last = weight.detach().abs().movedim(dim, 0)
    groups = last.reshape(size // m, m, *last.shape[1:])
    # Ranks by comparing every pair of places over all groups at once: much quicker than sorting groups of a few.
    places = [groups[:, place] for place in range(m)]
    ranks = torch.zeros(groups.shape, dtype=torch.int16, device=groups.device)
    for later in range(m):
        for earlier in range(later):
            beaten = places[later] > places[earlier]
            ranks[:, earlier] += beaten
            ranks[:, later] += ~beaten
    return (ranks < n).flatten(0, 1).movedim(0, dim)


def block_scores(scores: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[out, in] -> [out / rows, in / columns]: the L2 norm of every block."""
    if block == (1, 1):
        return scores
    rows, columns = block
    high, wide = scores.shape
    return scores.reshape(high // rows, rows, wide // columns, columns).square().sum(dim=(1, 3)).sqrt()


def _spread(mask: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """A mask of blocks as one of weights."""
    if block == (1, 1):
        return mask
    return mask.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)


def _why_no_blocks(rows: int, columns: int, block: tuple[int, int]) -> str | None:
    for size, side, what in ((rows, block[0], "output"), (columns, block[1], "input")):
        if size % side:
            return f"its {what} size {size} does not divide into blocks of {block[0]} x {block[1]}"
    return None


def smallest(parts: Callable[[], Iterable[torch.Tensor]], count: int) -> float:
    """The `count`-th smallest (from 1) of all values in all parts, exactly, with no more than one part in memory.

    Values are float32 and not negative, so that they are in the order of their bits read as integers: one histogram
    over the upper 16 bits finds the bin, a second over the lower 16 bits of what is in it the value.

    Args:
        parts: gives the same tensors at each of two calls.
    """
    high = low = 0
    for digit in ("high", "low"):
        histogram = torch.zeros(2**16, dtype=torch.int64)
        for part in parts():
            bits = part.reshape(-1).contiguous().view(torch.int32).cpu()
            chosen = bits >> 16 if digit == "high" else bits[bits >> 16 == high] & 0xFFFF
            histogram += torch.bincount(chosen, minlength=2**16)
        reached = histogram.cumsum(0)
        found = int(torch.searchsorted(reached, count))
        count -= int(reached[found - 1]) if found else 0
        high, low = (found, 0) if digit == "high" else (high, found)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))
