"""Objectives on self-attention: its maps, and the relations among queries, keys and values."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch.nn import functional

from ...errors import UsageError
from ...models.features import attention
from ..reduction import global_mean
from .base import ALL_TASKS, Comparison, Objective, Pair, Sides
from .layer_maps import LayerMap, layer_pairs

_RELATION_HEADS = 12
"""Of MiniLMv2's base models."""


class AttentionMaps(Objective):
    """`mean KL(T_q || S_q)` over the real queries q, heads and paired layers, where T_q and S_q are the attention
    probabilities that q spreads over the keys.

    TinyBERT (Jiao et al. 2020) takes the squared error of the unnormalised scores. Of probabilities that error shrinks
    with the square of the text's length and vanishes where the student's softmax is saturated; the divergence does
    neither, and its gradient in the scores is `S_q - T_q` (MobileBERT, Sun et al. 2020; MiniLM, Wang et al. 2020).
    Probabilities that dropout has set to zero are left out on both sides.

    Both sides need as many heads, and attention that shows its maps (slower than fused kernels).

        attention-maps: {weight: 1, layers: last}
    """

    name = "attention-maps"
    tasks = ALL_TASKS

    layers: LayerMap = "uniform"

    def pairs(self, sides: Sides) -> list[Pair]:
        ours, theirs = sides.student.heads, sides.teacher.heads
        if ours != theirs:
            raise UsageError(
                f"The objective {self.name!r} compares head by head, but the student has {ours} heads and the teacher "
                f"{theirs}.",
                "Take attention-relations, which needs no equal number of heads.",
            )
        return [Pair(attention(ours), attention(theirs)) for ours, theirs in layer_pairs(self.layers, sides)]

    def loss(self, seen: Comparison) -> torch.Tensor:
        return torch.stack([_map_divergence(seen, pair) for pair in seen.pairs]).mean()


class AttentionRelations(Objective):
    """`mean KL(softmax(A_t A_t' / sqrt(d_t)) || softmax(A_s A_s' / sqrt(d_s)))` over the real tokens, relation heads,
    and A = queries, keys, values: how each token's vector relates to those of all tokens of its text (MiniLMv2, Wang et
    al. 2021).

    Each side's A is split anew into `heads` relation heads of width d, so neither heads nor widths have to be equal. By
    default, as there, the last layer of the student learns from the last of the teacher; MiniLMv2 finds an upper middle
    layer of a large teacher to be better: `layers: {-1: 20}`.

        attention-relations: 1
        attention-relations: {weight: 1, heads: 16, layers: {-1: 20}}
    """

    name = "attention-relations"
    tasks = ALL_TASKS

    layers: LayerMap = Field(default_factory=lambda: {-1: -1})
    heads: int | None = Field(None, ge=1)
    """Relation heads; the largest number up to 12 that divides both widths when not given (keys and values are narrower
    than queries in grouped-query attention, and may be split into fewer)."""

    def pairs(self, sides: Sides) -> list[Pair]:
        return [
            Pair(f"{kind}.{ours}", f"{kind}.{theirs}")
            for ours, theirs in layer_pairs(self.layers, sides)
            for kind in ("query", "key", "value")
        ]

    def loss(self, seen: Comparison) -> torch.Tensor:
        return torch.stack([self._divergence(seen, pair) for pair in seen.pairs]).mean()

    def _divergence(self, seen: Comparison, pair: Pair) -> torch.Tensor:
        ours, theirs = seen.student[pair.student], seen.teacher[pair.teacher]
        heads = self._heads_for(ours.shape[-1], theirs.shape[-1], pair)
        student, teacher = (_log_relations(side, heads, seen.real) for side in (ours, theirs))
        divergence = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(dim=-1)
        return global_mean(divergence, seen.real[:, None, :].expand_as(divergence))

    def _heads_for(self, ours: int, theirs: int, pair: Pair) -> int:
        common = math.gcd(ours, theirs)
        if self.heads is None:
            return max(heads for heads in range(1, _RELATION_HEADS + 1) if common % heads == 0)
        if common % self.heads:
            raise UsageError(
                f"The objective {self.name!r} cannot split {pair.student} of width {ours} and the teacher's "
                f"{pair.teacher} of width {theirs} into {self.heads} relation heads each.",
                f"Take a divisor of {common}, or leave `heads` out.",
            )
        return self.heads


def _map_divergence(seen: Comparison, pair: Pair) -> torch.Tensor:
    """Maps [batch, heads, queries, keys] of one pair of layers -> scalar."""
    ours, theirs = seen.student[pair.student].float(), seen.teacher[pair.teacher].float()
    # what is exactly zero is padding, the future, or dropout's: both sides are compared on what is left
    kept = (ours > 0) & seen.real[:, None, None, :]
    student, teacher = (
        side * kept / (side * kept).sum(dim=-1, keepdim=True).clamp(min=1e-12) for side in (ours, theirs)
    )
    least = torch.finfo(torch.float32).tiny
    divergence = (torch.xlogy(teacher, teacher) - teacher * student.clamp(min=least).log()).sum(dim=-1)
    return global_mean(divergence, seen.real[:, None, :].expand_as(divergence))


def _log_relations(vectors: torch.Tensor, heads: int, real: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, width] -> log-probabilities [batch, heads, sequence, sequence] over the real tokens."""
    rows, sequence, width = vectors.shape
    split = vectors.float().view(rows, sequence, heads, width // heads).transpose(1, 2)
    scores = split @ split.mT / math.sqrt(width // heads)
    # the least number instead of -inf: a row of nothing but padding would be NaN
    return scores.masked_fill(~real[:, None, None, :], torch.finfo(torch.float32).min).log_softmax(dim=-1)
