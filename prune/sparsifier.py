"""What every one-shot method offers: scores for the weights of a matrix, and the matrix with zeros in a pattern."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from .layerwise import Moments, Statistic
from .masks import Pattern


class Sparsifier(ABC):
    """Zeroes weights of one matrix at a time. Matrices are float32 [out, in], whatever they are stored as."""

    name: ClassVar[str]
    statistic: ClassVar[Statistic | None] = None
    """What the method needs to know of a matrix's inputs; `None` where weights alone decide."""
    by_row: ClassVar[bool] = False
    """Whether a share of the weights is taken from every output alike, and not from the matrix as a whole."""
    can_compare: ClassVar[bool] = True
    """Whether the scores of several matrices can be held against one threshold before any weight has changed."""

    @property
    def needs_data(self) -> bool:
        """Whether the method looks at examples."""
        return self.statistic is not None

    @abstractmethod
    def scores(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """float32 [out, in], not negative: the higher, the more is lost without the weight, within a matrix."""

    def sparsify(self, weight: torch.Tensor, pattern: Pattern, moments: Moments | None) -> torch.Tensor:
        """The matrix with zeros where the pattern wants them, as a new tensor."""
        return weight.masked_fill(~pattern.keep(self.scores(weight, moments)), 0)


class Magnitude(Sparsifier):
    """`s_ij = |W_ij|`: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks"; in N:M
    groups: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks". Needs no data."""

    name = "magnitude"

    def scores(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        return weight.abs()
