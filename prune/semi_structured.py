"""Semi-structured (N:M) pruning: of every m consecutive weights along the reduction axis at most n are not zero.

2:4 is the pattern that NVIDIA's sparse Tensor Cores take since Ampere: Mishra et al. 2021, "Accelerating Sparse Deep
Neural Networks". The model keeps its shape, so only a compiler that looks for the pattern makes it faster.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..models.anatomy import Linear
from ..models.checkpoint import Checkpoint
from ..models.mapped import copy_of
from ..models.sparsity import parse_pattern
from .layerwise import Moments, layerwise_pass
from .masks import SemiStructured
from .one_shot import Plan, get_sparsifier, matrix, plan, require_calibration, sparsify
from .permutation import permute_channels
from .result import PruneResult, check_finite
from .sparsifier import Magnitude, Sparsifier
from .wanda import Wanda

if TYPE_CHECKING:
    import torch

    from ..models.importance import Calibration


def prune_semi_structured(
    checkpoint: Checkpoint,
    pattern: str = "2:4",
    method: str = "magnitude",
    calibration: Calibration | None = None,
    permute: bool = False,
) -> PruneResult:
    """Zero m - n weights of every group, in every matrix inside the layers that sparse kernels can take.

    Groups run along the reduction axis: dimension 1 of `nn.Linear` [out, in], dimension 0 of `Conv1D` [in, out].
    Embeddings and heads (tied ones among them) are outside the layers, hence stay dense. The checkpoint's own model is
    left as it was.

    Args:
        pattern: `N:M`, N less than M.
        method: one of `SPARSIFIERS`.
        calibration: examples, for a method that looks at them.
        permute: first put channels in an order in which more of what matters is kept, the function unchanged (see
            `permutation.py`), by the magnitude of weights, or by Wanda's scores for a method that looks at examples.
            The whole model is in memory then, whatever its size.

    Raises:
        UsageError: an unknown pattern or method, or one that needs examples without any.
        InputError: an unknown architecture, weights that hold NaN, a model in which no matrix is eligible, or
            examples on which the model's activations are not finite.
    """
    groups, sparsifier = SemiStructured(*parse_pattern(pattern)), get_sparsifier(method)
    require_calibration(sparsifier, calibration)
    check_finite(checkpoint)
    planned = plan(checkpoint, pattern, groups.why_not)
    start, gained = checkpoint, ""
    if permute:
        start, gained = _permuted(checkpoint, groups, planned, sparsifier, calibration)
    return PruneResult(
        model=sparsify(start, sparsifier, dict.fromkeys(planned.chosen, groups), calibration),
        method=f"{pattern} by {method}{', permuted' if permute else ''}",
        settings={"pattern": pattern, "method": method, "permute": permute},
        skipped=planned.skipped,
        note=f"{pattern} in {planned.note}{gained}",
    )


def _permuted(
    checkpoint: Checkpoint,
    groups: SemiStructured,
    planned: Plan,
    sparsifier: Sparsifier,
    calibration: Calibration | None,
) -> tuple[Checkpoint, str]:
    """The same function with its channels in another order, and what that gained."""
    scorer: Sparsifier = Wanda() if sparsifier.needs_data else Magnitude()
    looked_at, chosen = require_calibration(scorer, calibration), set(planned.chosen)
    moments: dict[str, Moments] = {}
    if looked_at is not None:
        for layer in layerwise_pass(checkpoint, looked_at, scorer.statistic, names=chosen, changes=False):
            moments.update(layer.moments)

    def scores(name: str, module: Linear) -> torch.Tensor | None:
        return scorer.scores(matrix(module).float(), moments.get(name)) if name in chosen else None

    model = copy_of(checkpoint.model, lambda weight: weight.detach().clone())
    gain = permute_channels(model, scores, groups.n, groups.m, calibration.seed if calibration else 0)
    if gain.before == 0:
        return replace(checkpoint, model=model), ""
    return replace(checkpoint, model=model), f" Reordered channels keep {gain.after / gain.before - 1:.2%} more score."
