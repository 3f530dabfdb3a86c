"""SparseGPT: zeroes weights column by column and lets the columns that follow make up for it."""

from __future__ import annotations

import torch

from ..errors import InputError
from .layerwise import Moments, Statistic
from .masks import Pattern
from .sparsifier import Sparsifier

BLOCK = 128
"""Columns that are worked on before the rest of the matrix is updated."""
DAMPING = 0.01
_HIGHEST_DAMPING = 1.0


class SparseGPT(Sparsifier):
    """Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".

    With the Hessian `H = X^T X + damping * mean(diag) * I` of the squared output error and `H^-1 = U^T U`, U upper
    triangular, for the columns j = 0, 1, ... of W [out, in]:

        s_ij = |W_ij| / U_jj                 decides what is zeroed
        e_i  = (W_ij - zeroed W_ij) / U_jj   and what follows makes up for it:
        W_ik = W_ik - e_i * U_jk             for k > j

    Masks are chosen with the weights as they are by then: for N:M patterns at the first column of each group, for a
    share of the weights at the first column of each block of 128, of which that share goes. Inputs that are always
    zero are dead: their weights go to zero, and change nothing else.
    """

    name = "sparsegpt"
    statistic = Statistic.GRAM
    can_compare = False

    def scores(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """The scores before any weight has been updated."""
        return weight.abs() / _factor_of(moments).diagonal()

    @torch.no_grad()
    def sparsify(self, weight: torch.Tensor, pattern: Pattern, moments: Moments | None) -> torch.Tensor:
        factor = _factor_of(moments)
        assert moments is not None
        columns = weight.T.contiguous().clone()  # [in, out]: what is worked on together lies together
        columns[moments.squares == 0] = 0
        for start, end in _blocks(len(columns), pattern):
            errors = _sparsify_block(columns[start:end], factor[start:end, start:end], pattern)
            columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        return columns.T


def _factor_of(moments: Moments | None) -> torch.Tensor:
    """U [in, in], kept for the modules that share their inputs."""
    assert moments is not None  # `statistic` says so
    if moments.factor is None:
        moments.factor = inverse_factor(moments)
    return moments.factor


def _blocks(size: int, pattern: Pattern) -> list[tuple[int, int]]:
    """Blocks of about `BLOCK` columns that cut no group."""
    step = BLOCK if pattern.span is None else max(BLOCK // pattern.span, 1) * pattern.span
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _sparsify_block(columns: torch.Tensor, factor: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Sparsify columns [block, out] in place.

    Args:
        factor: U of these columns, [block, block].

    Returns:
        The errors e [block, out], for the update of the columns that follow.
    """
    errors = torch.empty_like(columns)
    diagonal = factor.diagonal()
    span = pattern.span or len(columns)
    for place, column in enumerate(columns):
        if place % span == 0:
            group = slice(place, place + span)
            goes = ~pattern.keep((columns[group].abs() / diagonal[group, None]).T).T
        zeroed = goes[place % span]
        torch.div(column * zeroed, diagonal[place], out=errors[place])
        column.masked_fill_(zeroed, 0)
        columns[place + 1 :].addr_(factor[place, place + 1 :], errors[place], alpha=-1)
    return errors


def inverse_factor(moments: Moments) -> torch.Tensor:
    """U, upper triangular, with `U^T U = (H + damping)^-1`, in float32.

    H is turned upside down, so that its Cholesky factor L turned back is upper triangular with H = R R^T: U is the
    inverse of R, which is that of L turned back, at the cost of one factorisation. Where that fails, damping is raised
    tenfold, up to 1.

    Raises:
        InputError: no damping helps; the message names the module.
    """
    assert moments.gram is not None  # `statistic` says so
    flipped = moments.gram.flip(0, 1).float()
    flipped /= max(moments.tokens, 1)
    diagonal = flipped.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal.masked_fill_(moments.squares.flip(0) == 0, mean)
    damping = DAMPING
    diagonal += damping * mean
    while True:
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed:
            break
        if damping >= _HIGHEST_DAMPING:
            raise InputError(
                f"What enters {moments.name} cannot be calibrated with: its second moments hold NaN or infinity, or "
                "are not positive definite even when damped.",
                "Look at the calibration rows and at the model's outputs on them, or take --method wanda.",
            )
        diagonal += (10 * damping - damping) * mean
        damping *= 10
    del flipped, diagonal  # these matrices may be larger than the layer
    _invert(lower)
    factor: torch.Tensor = lower.flip(0, 1)
    return factor


def _invert(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: `[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]`.
    Two thirds of the work of solving for the identity, and no second matrix of that size."""
    size = len(lower)
    if size <= BLOCK:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, second, between = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first)
    _invert(second)
    between.copy_((second @ between) @ first).neg_()
