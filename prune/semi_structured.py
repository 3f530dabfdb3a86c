"""Semi-structured (N:M) pruning: of every m consecutive weights along the reduction axis at most n are not zero.

2:4 is the pattern that NVIDIA's sparse Tensor Cores take since Ampere: Mishra et al. 2021, "Accelerating Sparse Deep
Neural Networks". The model keeps its shape, so only a compiler that looks for the pattern makes it faster.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from ..errors import InputError, UsageError
from ..models.anatomy import Linear, anatomy_of, in_features, out_features, reduction_axis
from ..models.checkpoint import Checkpoint
from .result import PruneResult, check_finite, skipped_note

PATTERNS: dict[str, tuple[int, int]] = {"2:4": (2, 4)}

KERNEL_MULTIPLE = 32
"""Both sizes of a sparse matrix must be multiples of this. cuSPARSELt takes multiples of 16 in float16 and bfloat16 and
of 32 in int8 and fp8, as PyTorch's table for it says (`torch/sparse/semi_structured.py`,
`SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS`). The stricter one, since precision is chosen later."""


def prune_semi_structured(checkpoint: Checkpoint, pattern: str = "2:4") -> PruneResult:
    """Zero the smaller weights of every group, in every matrix inside the layers that sparse kernels can take.

    Groups run along the reduction axis: dimension 1 of `nn.Linear` [out, in], dimension 0 of `Conv1D` [in, out].
    Embeddings and heads (tied ones among them) are outside the layers, hence stay dense. The checkpoint's own model is
    left as it was.

    Raises:
        UsageError: an unknown pattern.
        InputError: an unknown architecture, weights that hold NaN, or a model in which no matrix is eligible.
    """
    n, m = parse_pattern(pattern)
    check_finite(checkpoint)
    model = copy.deepcopy(checkpoint.model)
    pruned: list[str] = []
    skipped: list[tuple[str, str]] = []
    for name, module in anatomy_of(model).linear_layers(model):
        if (reason := why_not_sparse(module)) is not None:
            skipped.append((name, reason))
            continue
        with torch.no_grad():
            mask = nm_mask(module.weight, n, m, reduction_axis(module))
            module.weight.masked_fill_(~mask, 0)
        pruned.append(name)
    if not pruned:
        raise InputError(f"No matrix of {checkpoint.source} can be made {pattern}: {skipped_note(skipped)}")
    note = f"{pattern} in {len(pruned)} of {len(pruned) + len(skipped)} matrices. {skipped_note(skipped)}".rstrip()
    return PruneResult(
        model=model,
        method=f"{pattern} by magnitude",
        settings={"pattern": pattern, "method": "magnitude"},
        skipped=skipped,
        note=note,
    )


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`"2:4"` -> (2, 4).

    Raises:
        UsageError: a pattern that is not in `PATTERNS`.
    """
    if pattern not in PATTERNS:
        raise UsageError(f"There is no pattern {pattern!r}; valid are {', '.join(PATTERNS)}.")
    return PATTERNS[pattern]


def why_not_sparse(module: Linear) -> str | None:
    """The reason for which sparse kernels do not take this matrix, or `None` where they do."""
    for size, what in ((in_features(module), "input"), (out_features(module), "output")):
        if size % KERNEL_MULTIPLE:
            return f"its {what} size {size} is not a multiple of {KERNEL_MULTIPLE}, which sparse kernels need"
    return None


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
    last = weight.detach().abs().movedim(dim, -1)
    groups = last.reshape(*last.shape[:-1], size // m, m)
    largest = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, largest, True)
    return mask.flatten(-2).movedim(-1, dim)


def is_semi_structured(weight: np.ndarray | torch.Tensor, axis: int, n: int = 2, m: int = 4) -> bool:
    """Whether every group of m consecutive values along `axis` has at most n that are not zero.

    A size that does not divide into groups counts as no pattern, since no sparse kernel takes it.
    """
    values = _as_numpy(weight)
    if values.shape[axis] % m:
        return False
    moved = np.moveaxis(values != 0, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, m)
    return bool((groups.sum(axis=-1) <= n).all())


def zero_share(weight: np.ndarray | torch.Tensor) -> float:
    """The share of values that are exactly zero, 0 for an empty weight."""
    values = _as_numpy(weight)
    return float((values == 0).mean()) if values.size else 0.0


def _as_numpy(weight: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(weight, torch.Tensor):
        return weight.detach().cpu().float().numpy()  # numpy has no bfloat16
    return weight
