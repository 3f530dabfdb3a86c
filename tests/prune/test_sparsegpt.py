"""SparseGPT against its definition, and against what it improves on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.models.batching import Examples
from limbeck.models.checkpoint import load_checkpoint
from limbeck.models.importance import Calibration
from limbeck.prune.layerwise import Moments
from limbeck.prune.masks import Pattern, SemiStructured, Share
from limbeck.prune.semi_structured import prune_semi_structured
from limbeck.prune.sparsegpt import SparseGPT, inverse_factor
from limbeck.prune.sparsifier import Magnitude
from limbeck.prune.wanda import Wanda

TinyCheckpoint = Callable[..., Path]


def correlated(tokens: int, channels: int, seed: int) -> torch.Tensor:
    """[tokens, channels], channels of unlike size that say much the same."""
    chance = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, channels // 2, generator=chance) @ torch.randn(
        channels // 2, channels, generator=chance
    )
    sizes = torch.rand(channels, generator=chance).exp()
    return (mixed + 0.3 * torch.randn(tokens, channels, generator=chance)) * sizes


def moments_of(inputs: torch.Tensor) -> Moments:
    """The sums that a layer-by-layer pass would make of these tokens [tokens, in]."""
    return Moments("a matrix", len(inputs), inputs.double().square().sum(dim=0), inputs.T @ inputs)


def naive(weight: torch.Tensor, inputs: torch.Tensor, decide: Callable[[torch.Tensor, int], torch.Tensor | None]):
    """Algorithm 1 of the paper, literally: columns one by one through the whole matrix, the inverse Hessian of what is
    left made anew for each. `decide` gives, from the scores [out, in] and the column, the mask [out, span] of what goes
    from this column on, or `None` where it was decided before."""
    weight = weight.double().clone()
    size = weight.shape[1]
    hessian = 2 * inputs.double().T @ inputs.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(size)
    goes = torch.zeros_like(weight, dtype=torch.bool)
    for column in range(size):
        inverse = torch.linalg.inv(hessian[column:, column:])  # of the columns that can still be changed
        if column % 4 == 0 or decide(weight, 0) is None:
            # the diagonal of each later column's inverse when it is its turn
            turns = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(column, size)])
            mask = decide(weight[:, column:].square() / turns, column)
            if mask is not None:
                goes[:, column : column + mask.shape[1]] = mask
        error = weight[:, column] * goes[:, column] / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
        weight[goes[:, column], column] = 0
    return weight


def test_it_is_the_algorithm_of_the_paper_for_2_of_4() -> None:
    inputs, weight = correlated(300, 16, seed=1), torch.randn(24, 16, generator=torch.Generator().manual_seed(2))

    def two_smallest_of_four(scores: torch.Tensor, column: int) -> torch.Tensor | None:
        if column % 4:
            return None
        group = scores[:, :4]
        return torch.zeros_like(group, dtype=torch.bool).scatter_(1, group.topk(2, largest=False).indices, True)

    expected = naive(weight, inputs, two_smallest_of_four)
    found = SparseGPT().sparsify(weight, SemiStructured(2, 4), moments_of(inputs))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_it_is_the_algorithm_of_the_paper_for_a_share() -> None:
    inputs, weight = correlated(300, 16, seed=3), torch.randn(24, 16, generator=torch.Generator().manual_seed(4))

    def smallest_half(scores: torch.Tensor, column: int) -> torch.Tensor | None:
        return scores <= scores.flatten().kthvalue(scores.numel() // 2).values if column == 0 else None

    expected = naive(weight, inputs, smallest_half)
    found = SparseGPT().sparsify(weight, Share(0.5), moments_of(inputs))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", [SemiStructured(2, 4), SemiStructured(1, 3), Share(0.5, block=(4, 3))])
def test_blocks_of_columns_do_not_matter_but_for_the_rounding(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, weight = correlated(400, 48, seed=5), torch.randn(8, 48, generator=torch.Generator().manual_seed(6))
    whole = SparseGPT().sparsify(weight, pattern, moments_of(inputs))
    if pattern.span is not None:  # a share is taken block by block
        monkeypatch.setattr("limbeck.prune.sparsegpt.BLOCK", 8)
        torch.testing.assert_close(
            SparseGPT().sparsify(weight, pattern, moments_of(inputs)), whole, rtol=1e-4, atol=1e-4
        )
    assert torch.equal(pattern.keep((whole != 0).float()), whole != 0)
    assert (whole == 0).float().mean() == pytest.approx(1 - pattern.n / pattern.m if pattern.span else 0.5)  # type: ignore[attr-defined]


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), pattern=st.sampled_from([(2, 4), (4, 8), 0.5]))
def test_each_method_reconstructs_better_than_the_one_before(seed: int, pattern: tuple[int, int] | float) -> None:
    inputs = correlated(600, 64, seed)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed))
    moments = moments_of(inputs)
    errors = []
    for method in (Magnitude(), Wanda(), SparseGPT()):
        chosen = SemiStructured(*pattern) if isinstance(pattern, tuple) else Share(pattern, by_row=method.by_row)
        found = method.sparsify(weight, chosen, moments)
        errors.append(float((inputs @ (found - weight).T).square().sum()))
    magnitude, wanda, sparsegpt = errors
    assert sparsegpt < wanda < magnitude


def test_dead_inputs_lose_their_weights_and_disturb_nothing() -> None:
    inputs, weight = correlated(200, 16, seed=7), torch.randn(8, 16, generator=torch.Generator().manual_seed(8))
    inputs[:, [3, 9]] = 0
    found = SparseGPT().sparsify(weight, SemiStructured(2, 4), moments_of(inputs))
    assert (found[:, [3, 9]] == 0).all() and torch.isfinite(found).all()
    factor = inverse_factor(moments_of(inputs))
    assert factor[3, 4:].abs().max() == 0 and factor[:3, 3].abs().max() == 0
    dead = SparseGPT().sparsify(weight, SemiStructured(2, 4), moments_of(torch.zeros(5, 16)))
    assert (dead == 0).all()


def test_the_size_of_the_inputs_does_not_matter() -> None:
    inputs, weight = correlated(200, 16, seed=9), torch.randn(8, 16, generator=torch.Generator().manual_seed(10))
    found = SparseGPT().sparsify(weight, SemiStructured(2, 4), moments_of(inputs))
    for factor in (1e-4, 1e4):
        scaled = SparseGPT().sparsify(weight, SemiStructured(2, 4), moments_of(inputs * factor))
        torch.testing.assert_close(scaled, found, rtol=1e-3, atol=1e-4)


def test_the_factor_is_that_of_the_inverse() -> None:
    inputs = correlated(300, 20, seed=11)
    moments = moments_of(inputs)
    factor = inverse_factor(moments).double()
    hessian = inputs.double().T @ inputs.double() / 300
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(20).double(), rtol=0, atol=1e-3)


def test_damping_is_raised_until_a_hessian_can_be_factorised() -> None:
    moments = moments_of(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    assert moments.gram is not None
    values = torch.tensor([-0.05, *[1.0] * 7])
    moments.gram = torch.diag(values) * moments.tokens  # what rounding may leave: not quite positive definite
    factor = inverse_factor(moments)
    assert 1 / factor[7, 7] ** 2 == pytest.approx(1 + 0.1 * float(values.mean()), rel=1e-4)
    moments.gram = torch.diag(torch.tensor([-100.0, *[1.0] * 7]))
    with pytest.raises(InputError, match="enters a matrix"):
        inverse_factor(moments)
    moments.gram = torch.full((8, 8), float("nan"))
    with pytest.raises(InputError, match="NaN or infinity"):
        inverse_factor(moments)


def test_activations_that_are_not_finite_name_the_matrix(tiny_checkpoint: TinyCheckpoint, texts: list[str]) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    with torch.no_grad():
        checkpoint.model.encoder.layer[0].intermediate.dense.weight.fill_(3e38)
    examples = Examples([dict(checkpoint.tokenizer(text)) for text in texts[:4]])
    with pytest.raises(InputError, match=r"encoder\.layer\.0\.output\.dense"):
        prune_semi_structured(checkpoint, "2:4", "sparsegpt", Calibration(examples))
