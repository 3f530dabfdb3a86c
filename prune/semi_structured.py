"""Semi-structured (N:M) pruning: of every m consecutive weights along the reduction axis at most n are not zero.

2:4 is the pattern that NVIDIA's sparse Tensor Cores take since Ampere: Mishra et al. 2021, "Accelerating Sparse Deep
Neural Networks". The model keeps its shape, so only a compiler that looks for the pattern makes it faster.
"""

from __future__ import annotations

import copy

import torch

from ..errors import InputError, UsageError
from ..models.anatomy import anatomy_of, in_features, out_features, reduction_axis
from ..models.checkpoint import Checkpoint
from ..models.sparsity import why_not_sparse
from .result import PruneResult, check_finite, skipped_note

PATTERNS: dict[str, tuple[int, int]] = {"2:4": (2, 4)}


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
        if (reason := why_not_sparse(in_features(module), out_features(module))) is not None:
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
