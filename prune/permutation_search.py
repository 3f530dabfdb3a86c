"""The search behind channel permutation: an order of columns under which an N:M mask keeps more of a matrix of scores.

Pool & Yu 2021, "Channel Permutations for N:M Sparsity" (NeurIPS). A *stripe* is m columns in a row, and a mask keeps
the n highest scores of every row in every stripe, so that only which columns share a stripe matters. Their search tries
all splits of two stripes' columns, pair after pair; here all exchanges of two columns are priced at once in one table,
which on a trained matrix of 320 x 864 kept as much in a small part of the time.
"""

from __future__ import annotations

import math

import torch

_OPERATIONS = 4e9
"""Additions for one table of all exchanges. Larger matrices are searched in blocks of columns, then in fewer rows: an
order found on some of the rows gains little on the others, so blocks come first."""
_SMALLEST_BLOCK, _LARGEST_BLOCK = 128, 4096
"""Columns searched together."""
_SWEEPS = 2
"""How often a matrix of several blocks is dealt into blocks anew."""
_ESCAPES = 6
"""How often a block's order is disturbed once no exchange helps any more."""
_DISTURBED = 0.02
"""The share of columns that one escape moves."""
_ROUNDS = 200
"""Rounds of exchanges at most; trained weights take 20 to 40."""
_TOLERANCE = 1e-5
"""An exchange must gain this share of what a stripe keeps on average; less is rounding."""
_BUFFER = {"cpu": 2**19, "cuda": 2**26}
"""Values computed at once: what stays in a core's cache."""


@torch.no_grad()
def kept_score(scores: torch.Tensor, n: int, m: int) -> float:
    """The sum of the scores that an N:M mask along the columns keeps.

    Args:
        scores: [rows, columns], not negative; the columns are a multiple of m.
    """
    stripes = scores.reshape(scores.shape[0], -1, m)
    return float(stripes.topk(n, dim=-1).values.sum(dtype=torch.float64))


def row_stride(rows: int, columns: int) -> int:
    """Of so many rows of scores each how-manieth is looked at: all of them, unless even blocks are too much."""
    return max(1, math.ceil(rows * columns * min(columns, _SMALLEST_BLOCK) / _OPERATIONS))


@torch.no_grad()
def search_order(scores: torch.Tensor, n: int, m: int, seed: int = 0) -> torch.Tensor:
    """An order of the columns under which an N:M mask keeps more; the same for the same scores and seed.

    Every round prices all exchanges of two columns, does the best ones that touch different stripes, and prices anew
    what they touched; when none helps, a few columns are shuffled and the descent starts again, `_ESCAPES` times, and
    what got worse is taken back. With R rows and C columns a table of prices takes R * C * B additions and B * B
    memory, where B is C, or less in matrices for which that is more than `_OPERATIONS`; a search takes about a dozen
    tables. One core needs some 7 seconds for 384 x 1536 and 30 for 4096 x 4096.

    Args:
        scores: [rows, columns], finite and not negative; the columns are a multiple of m.
        n: How many of every m are kept, 1 <= n < m.

    Returns:
        int64 [columns] on the CPU: the column that comes to each place.
    """
    rows, columns = scores.shape
    if columns < 2 * m or not rows:
        return torch.arange(columns)
    random = torch.Generator().manual_seed(seed)
    block = max(min(int(_OPERATIONS / (rows * columns)), _LARGEST_BLOCK), _SMALLEST_BLOCK) // m  # stripes
    table = scores[:: row_stride(rows, columns)].float().T.contiguous()  # [columns, rows]: a column's scores in a row
    order = torch.arange(columns).view(-1, m)  # [stripes, m]
    for _ in range(1 if block >= len(order) else _SWEEPS):
        for chosen in torch.split(torch.randperm(len(order), generator=random), block):
            stripes = order[chosen]
            found = _Block(table[stripes.flatten().to(table.device)], n, m).search(random)
            order[chosen] = stripes.flatten()[found].view(-1, m)
    return order.flatten()


class _Block:
    """Some columns, their order so far and the price table of all exchanges among them."""

    def __init__(self, scores: torch.Tensor, n: int, m: int) -> None:
        self.scores = scores  # [columns, rows]
        self.n, self.m = n, m
        columns = len(scores)
        self.order = torch.arange(columns)
        self.kept = scores.new_zeros(columns // m)
        self.replaced = scores.new_zeros(columns, columns)
        """What stripe of the first column would keep with the second in its place."""
        self.price(torch.arange(columns // m))

    def search(self, random: torch.Generator) -> torch.Tensor:
        """The best order found, int64 [columns]."""
        self.descend()
        columns = len(self.order)
        moved = min(columns, max(4, round(columns * _DISTURBED)))
        for _ in range(_ESCAPES):
            order, kept = self.order.clone(), float(self.kept.sum(dtype=torch.float64))
            places = torch.randperm(columns, generator=random)[:moved]
            self.order[places] = order[places.roll(1)]
            self.price(torch.unique(places // self.m))
            self.descend()
            if float(self.kept.sum(dtype=torch.float64)) < kept:
                changed = torch.unique(torch.nonzero(self.order != order).flatten() // self.m)
                self.order = order
                self.price(changed)
        return self.order

    def descend(self) -> None:
        """Exchange columns until nothing is gained by it."""
        for _ in range(_ROUNDS):
            changed = self.exchange()
            if not changed:
                return
            self.price(torch.tensor(changed))

    def price(self, stripes: torch.Tensor) -> None:
        """Fill in the rows of the table that belong to these stripes' columns.

        A stripe without one of its columns keeps the n highest of the others in every row; a column that takes the free
        place adds max(0, its score - the lowest of those n). Hence the sum over the rows of max(score, lowest).
        """
        columns = self.order.view(-1, self.m)[stripes].to(self.scores.device)
        values = self.scores[columns]  # [stripes, m, rows]
        top = values.topk(self.n + 1, dim=1).values
        highest, next_one = top[:, self.n - 1 : self.n], top[:, self.n :]
        among = values >= highest
        lowest = torch.where(among, next_one, highest)
        whole = top[:, : self.n].sum(dim=1, keepdim=True)
        others = torch.where(among, whole + next_one - values, whole)  # the n highest without this column
        self.kept[stripes.to(self.kept.device)] = whole.sum(dim=(1, 2))
        base = (others - lowest).sum(dim=2).flatten()
        self.replaced[columns.flatten()] = base[:, None] + _sum_of_larger(lowest.flatten(0, 1), self.scores)

    def exchange(self) -> list[int]:
        """Do the best exchanges that touch different stripes; which stripes they touched, in order."""
        columns = len(self.order)
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(columns)
        stripe = place // self.m  # of each column
        own = stripe.to(self.kept.device)
        gain = self.replaced + self.replaced.T
        gain -= self.kept[own][:, None] + self.kept[own]
        gain.masked_fill_(own[:, None] == own, 0)
        best, partner = (found.tolist() for found in gain.max(dim=1))
        least = _TOLERANCE * float(self.kept.mean())
        touched: set[int] = set()
        where, places = stripe.tolist(), place.tolist()
        for column in sorted(range(columns), key=best.__getitem__, reverse=True):
            other = partner[column]
            if best[column] <= least:
                break
            if where[column] in touched or where[other] in touched:
                continue
            touched |= {where[column], where[other]}
            self.order[places[column]], self.order[places[other]] = other, column
        return sorted(touched)


def _sum_of_larger(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sum over rows of max(left, right) for every pair: [columns a, rows] and [columns b, rows] to [a, b]."""
    size = _BUFFER.get(left.device.type, 2**19)
    rows = max(1, min(left.shape[1], size // len(right)))
    at_once = max(1, size // (rows * len(right)))
    sums = left.new_zeros(len(left), len(right))
    for first in range(0, left.shape[1], rows):
        one, other = left[:, first : first + rows], right[:, first : first + rows].contiguous()
        for start in range(0, len(left), at_once):
            part = torch.maximum(one[start : start + at_once, None], other)
            sums[start : start + at_once] += part.sum(dim=-1)
    return sums
