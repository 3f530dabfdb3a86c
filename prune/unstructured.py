"""Unstructured pruning: a share of the weights goes to zero, wherever they stand, singly or in whole blocks.

No dense kernel is faster for it; it makes files smaller when they are compressed, and blocks suit block-sparse kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError, did_you_mean
from ..models.checkpoint import Checkpoint
from .layerwise import Moments, layerwise_pass
from .masks import Above, Pattern, Share, block_scores, smallest
from .one_shot import get_sparsifier, matrix, plan, require_calibration, sparsify
from .result import PruneResult, check_finite
from .sparsifier import Sparsifier

if TYPE_CHECKING:
    from ..models.importance import Calibration

ALLOCATIONS = ("uniform", "global")


def prune_unstructured(
    checkpoint: Checkpoint,
    sparsity: float,
    method: str = "magnitude",
    allocation: str = "uniform",
    block: Sequence[int] | None = None,
    calibration: Calibration | None = None,
) -> PruneResult:
    """Zero a share of the weights inside the layers; embeddings and heads stay dense, and the checkpoint's own model is
    left as it was.

    Args:
        sparsity: the share of zeros, more than 0 and less than 1.
        method: one of `SPARSIFIERS`.
        allocation: `uniform`: every matrix loses the same share (with Wanda every output of it, with SparseGPT every
            128 inputs of it). `global`: one threshold over all matrices, their scores divided by the L2 norm of all of
            the matrix's scores; so what is zeroed is, for its number, the least of the matrices' squared norms, each
            taken as 1 (with Wanda: of the energy of their outputs, as far as inputs are not correlated, all measured
            in the model as it was).
        block: [rows, columns] (outputs, inputs): whole blocks go, by the L2 norm of the scores in them. A matrix that
            does not divide into blocks is left dense and listed.
        calibration: examples, for a method that looks at them.

    Raises:
        UsageError: a setting outside what is valid, or a method that needs examples without any.
        InputError: an unknown architecture, weights that hold NaN, or no matrix that divides into blocks.
    """
    sparsifier, shape = get_sparsifier(method), _checked(sparsity, allocation, block)
    if allocation == "global" and not sparsifier.can_compare:
        raise UsageError(
            f"The scores of {method} are known only as layers are pruned one by one, so there is no global threshold.",
            "Use --allocation uniform, or the methods magnitude or wanda.",
        )
    require_calibration(sparsifier, calibration)
    check_finite(checkpoint)
    share = Share(sparsity, shape, by_row=sparsifier.by_row)
    planned = plan(checkpoint, "sparse", share.why_not)
    moments: dict[str, Moments] | None = None
    patterns: dict[str, Pattern] = dict.fromkeys(planned.chosen, share)
    if allocation == "global":
        moments, patterns = _one_threshold(checkpoint, sparsifier, share, planned.chosen, calibration)
    model = sparsify(checkpoint, sparsifier, patterns, calibration, moments)
    blocks = "" if shape == (1, 1) else f" in blocks of {shape[0]} x {shape[1]}"
    return PruneResult(
        model=model,
        method=f"{sparsity:.0%} of weights{blocks} by {method}",
        settings={"sparsity": sparsity, "method": method, "allocation": allocation, "block": list(shape)},
        skipped=planned.skipped,
        note=f"{sparsity:.1%} zeros ({allocation}){blocks} in {planned.note}",
    )


def _checked(sparsity: float, allocation: str, block: Sequence[int] | None) -> tuple[int, int]:
    if not 0 < sparsity < 1:
        raise UsageError(f"sparsity is {sparsity:g}; it must be more than 0 and less than 1.", "Use 0.5 for half.")
    if allocation not in ALLOCATIONS:
        known = ", ".join(ALLOCATIONS)
        raise UsageError(
            f"There is no allocation {allocation!r}; valid are {known}.{did_you_mean(allocation, ALLOCATIONS)}"
        )
    if block is None:
        return 1, 1
    if len(block) != 2 or min(block) < 1:
        raise UsageError(f"block is {list(block)}; it must be two sizes of at least 1.", "Use [16, 16].")
    return int(block[0]), int(block[1])


def _one_threshold(
    checkpoint: Checkpoint, sparsifier: Sparsifier, share: Share, names: list[str], calibration: Calibration | None
) -> tuple[dict[str, Moments], dict[str, Pattern]]:
    """What every matrix saw in the dense model, and a pattern for each with the same threshold: of all blocks together
    the share goes. Scores are made again at each of the three readings, so that only a matrix's are in memory."""
    moments: dict[str, Moments] = {}
    looked_at = require_calibration(sparsifier, calibration)
    if looked_at is not None:
        for layer in layerwise_pass(checkpoint, looked_at, sparsifier.statistic, names=names, changes=False):
            moments.update(layer.moments)

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for layer in layerwise_pass(checkpoint):
            for name, module in layer.linear_layers():
                if name in names:
                    yield name, block_scores(sparsifier.scores(matrix(module), moments.get(name)), share.block)

    scales: dict[str, float] = {}
    blocks = 0
    for name, scores in read():
        scales[name] = float(scores.double().square().sum().sqrt()) or 1.0
        blocks += scores.numel()
    threshold = smallest(lambda: (scores / scales[name] for name, scores in read()), round(share.sparsity * blocks))
    return moments, {name: Above(threshold, scales[name], share.block) for name in names}
