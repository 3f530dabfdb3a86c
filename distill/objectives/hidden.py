"""Objectives on token vectors: hidden states and the embedding layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import nn
from torch.nn import functional

from ...models.features import EMBEDDINGS, hidden
from ..reduction import global_mean, total
from .base import ALL_TASKS, Comparison, Objective, Pair, Sides
from .layer_maps import LayerMap, layer_pairs

_LEAST_VARIANCE = 1e-3
"""Share of the mean square: where all tokens of a batch are alike, their variance is no measure of an error."""


class HiddenStates(Objective):
    """Over the real tokens' hidden states s, t of paired layers, mean over the pairs:

    - `mse`: `mean |W s + b - t|^2 / var(t)`, the variance about the batch's mean token, so that 1 is the error of a
      student that knows nothing but the mean (FitNets, Romero et al. 2015; PKD, Sun et al. 2019; TinyBERT, Jiao et al.
      2020);
    - `cosine`: `mean 1 - cos(W s + b, t)` (DistilBERT, Sanh et al. 2019).

    The projection `W, b` is learnt, one a pair, where the widths differ; where they are equal there is none.

        hidden-states: {weight: 1, layers: uniform}
        hidden-states: {layers: {0: 1, 1: 3, 2: 5}, distance: cosine}
    """

    name = "hidden-states"
    tasks = ALL_TASKS

    layers: LayerMap = "uniform"
    distance: Literal["mse", "cosine"] = "mse"

    def pairs(self, sides: Sides) -> list[Pair]:
        return [Pair(hidden(ours), hidden(theirs)) for ours, theirs in layer_pairs(self.layers, sides)]

    def learned(self, sides: Sides) -> nn.Module | None:
        return _projections(sides, len(self.pairs(sides)))

    def loss(self, seen: Comparison) -> torch.Tensor:
        measure = _relative_error if self.distance == "mse" else _cosine_distance
        return torch.stack([measure(ours, theirs) for ours, theirs in _real_tokens(seen)]).mean()


class EmbeddingLayer(Objective):
    """`mean |W s + b - t|^2 / var(t)` over the real tokens' vectors s, t that enter the first layer, positions included
    (the embedding-layer distillation of TinyBERT, Jiao et al. 2020); projection and variance as in `hidden-states`.

        embedding-layer: 1
    """

    name = "embedding-layer"
    tasks = ALL_TASKS

    def pairs(self, sides: Sides) -> list[Pair]:
        return [Pair(EMBEDDINGS, EMBEDDINGS)]

    def learned(self, sides: Sides) -> nn.Module | None:
        return _projections(sides, 1)

    def loss(self, seen: Comparison) -> torch.Tensor:
        ((ours, theirs),) = _real_tokens(seen)
        return _relative_error(ours, theirs)


def _projections(sides: Sides, count: int) -> nn.ModuleList | None:
    """One from the student's width to the teacher's for each pair; none where the widths are equal."""
    ours, theirs = sides.student.width, sides.teacher.width
    return nn.ModuleList(nn.Linear(ours, theirs) for _ in range(count)) if ours != theirs else None


def _real_tokens(seen: Comparison) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each pair the two sides' vectors at real tokens, float32 [tokens, teacher's width]."""
    for index, pair in enumerate(seen.pairs):
        ours = seen.student[pair.student][seen.real].float()
        theirs = seen.teacher[pair.teacher][seen.real].float()
        yield (cast(nn.ModuleList, seen.learned)[index](ours) if seen.learned is not None else ours), theirs


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The mean squared error over the global batch's tokens [tokens, width] in units of the teacher's variance."""
    count = total(theirs.new_tensor(len(theirs))).clamp(min=1)
    mean = total(theirs.sum(dim=0)) / count
    variance = total((theirs - mean).square().mean(dim=-1).sum()) / count
    size = variance + mean.square().mean()  # the mean square
    scale = torch.maximum(variance, _LEAST_VARIANCE * size).clamp(min=1e-12)
    return global_mean((ours - theirs).square().mean(dim=-1)) / scale


def _cosine_distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return global_mean(1 - functional.cosine_similarity(ours, theirs, dim=-1))
