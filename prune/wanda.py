"""Wanda: weights by their size and that of what they are multiplied with."""

from __future__ import annotations

import torch

from .layerwise import Moments, Statistic
from .sparsifier import Sparsifier


class Wanda(Sparsifier):
    """`s_ij = |W_ij| * ||X_j||_2`, X_j the values of input channel j over all calibration tokens; compared within an
    output, or within the groups of an N:M pattern. Sun et al. 2024, "A Simple and Effective Pruning Approach for Large
    Language Models".

    The norm is divided by the square root of the number of tokens, which changes no comparison.
    """

    name = "wanda"
    statistic = Statistic.SQUARES
    by_row = True

    def scores(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        assert moments is not None  # `statistic` says so
        return weight.abs() * (moments.squares / max(moments.tokens, 1)).sqrt().float()
