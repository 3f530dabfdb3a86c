"""What chooses the zeros while a model trains, and what a weight that is cut learns meanwhile.

Between two steps a matrix holds its sparse weights w' = mask * w. A method that lets weights come back keeps the dense
w aside; the optimiser then updates w, with the gradient that w' received (straight through the mask).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..errors import UsageError


@dataclass
class SparseMatrix:
    """One matrix that becomes sparse; every tensor has the weight's shape and lies on its device."""

    name: str
    weight: torch.Tensor
    """The model's own parameter, [rows, columns]."""
    axis: int
    """The axis that is summed over: 1 of [out, in], 0 of [in, out]."""
    mask: torch.Tensor
    """bool, true where a weight stays."""
    dense: torch.Tensor | None = None
    """The weights as they would be without the mask, for methods that let them come back."""
    moved: torch.Tensor | None = None
    """float32, movement's scores."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is kept beside the weights, by attribute."""
        named = {"mask": self.mask, "dense": self.dense, "moved": self.moved}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def place(self) -> None:
        """Bring everything to where the weight is now."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.to(self.weight.device))


class TrainingMethod(ABC):
    """How scores come about. A method has no state of its own: all of it is in the matrices."""

    name: str

    def prepare(self, matrix: SparseMatrix) -> None:  # noqa: B027 - nothing, where nothing is kept aside
        """Make what it keeps beside the weights."""

    @abstractmethod
    def scores(self, matrix: SparseMatrix) -> torch.Tensor:
        """What ranks the weights, higher stays; a new tensor in the weight's shape."""

    @abstractmethod
    def learn(self, matrix: SparseMatrix, gradient: torch.Tensor) -> None:
        """Take in dL/dw', averaged over batches and processes and clipped, and leave in `gradient` what the optimiser
        shall see. `matrix.weight` holds the dense weights by now, where there are any."""


class ByMagnitude(TrainingMethod):
    """By |w|: the smallest are cut, and never come back (Zhu & Gupta 2017)."""

    name = "magnitude"

    def scores(self, matrix: SparseMatrix) -> torch.Tensor:
        """|w|, and -1 where it is cut already: masks only shrink, even where a weight that stays is zero."""
        return matrix.weight.detach().abs().masked_fill_(~matrix.mask, -1)

    def learn(self, matrix: SparseMatrix, gradient: torch.Tensor) -> None:
        """Nothing where it is cut."""
        gradient.mul_(matrix.mask)


class ByMovement(TrainingMethod):
    """By the sum over steps of -w * dL/dw' (Sanh et al. 2020, Movement Pruning, eq. 4): what training draws away from
    zero stays, however small it is.

    The score of a weight that is cut goes on, by the value that it had, so it can come back with that value; its own
    gradient is 0 meanwhile. The rate at which scores learn cancels out, since only their order counts.
    """

    name = "movement"

    def prepare(self, matrix: SparseMatrix) -> None:
        """Scores from 0 and the dense weights."""
        matrix.moved = torch.zeros_like(matrix.weight, dtype=torch.float32)
        matrix.dense = matrix.weight.detach().clone()

    def scores(self, matrix: SparseMatrix) -> torch.Tensor:
        """The movement so far.

        Raises:
            UsageError: there was none, so any order would be chance.
        """
        assert matrix.moved is not None
        if not matrix.moved.any():
            raise UsageError(
                f"Movement cannot rank the weights of {matrix.name}: it has received no gradient so far.",
                "Begin later, take method: magnitude, or an objective that reads the layers above it.",
            )
        return matrix.moved.clone()

    def learn(self, matrix: SparseMatrix, gradient: torch.Tensor) -> None:
        """Add to the scores."""
        assert matrix.moved is not None
        seen = gradient.nan_to_num(nan=0, posinf=0, neginf=0)  # a step that fp16's loss scaling will skip
        matrix.moved.addcmul_(seen.float(), matrix.weight.detach().float(), value=-1)
        gradient.mul_(matrix.mask)


class SrSte(TrainingMethod):
    """A pattern by |w| of the dense weights, chosen anew after every step (Zhou et al. 2021, Learning N:M Fine-grained
    Structured Sparse Neural Networks From Scratch, eq. 9): w <- w - rate * (dL/dw' + decay * (1 - mask) * w).

    All weights get the gradient of the sparse ones; what is cut is drawn to zero, so that masks settle. The decay goes
    through the optimiser, as in the authors' code, so Adam scales it as it scales gradients.
    """

    name = "sr-ste"

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def prepare(self, matrix: SparseMatrix) -> None:
        """The dense weights."""
        matrix.dense = matrix.weight.detach().clone()

    def scores(self, matrix: SparseMatrix) -> torch.Tensor:
        """|w| of the dense weights."""
        assert matrix.dense is not None
        return matrix.dense.abs()

    def learn(self, matrix: SparseMatrix, gradient: torch.Tensor) -> None:
        """Straight through, with the decay."""
        gradient.addcmul_(matrix.weight.detach(), (~matrix.mask).to(gradient.dtype), value=self.decay)
