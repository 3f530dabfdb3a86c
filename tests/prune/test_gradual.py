"""Sparsity that is reached in training: each method against its formula, and whole distillations with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from limbeck.errors import UsageError
from limbeck.models.anatomy import anatomy_of
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.sparsity import is_semi_structured
from limbeck.prune.gradual import SparsityInTraining
from limbeck.prune.sparsify_settings import SparsifySettings
from limbeck.prune.training_masks import block_sums, fill_blocks, keep_largest, keep_share

TinyCheckpoint = Callable[..., Path]


def sparsity_of(**settings: Any) -> SparsifySettings:
    return SparsifySettings(**settings)


# Masks


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(0, 45))
def test_exactly_so_many_of_the_largest_are_kept(values: list[int], count: int) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    mask = keep_largest(scores, count)
    assert int(mask.sum()) == min(count, len(values))
    order = sorted(range(len(values)), key=lambda at: (-values[at], at))  # of equal ones the first
    assert sorted(order[:count]) == mask.nonzero().flatten().tolist()


def test_one_threshold_for_all_or_one_for_each() -> None:
    large, small = torch.tensor([[9.0, 8, 7, 6]]), torch.tensor([[1.0, 2, 3, 4]])
    assert [mask.sum().item() for mask in keep_share([large, small], 0.5, together=False)] == [2, 2]
    assert [mask.sum().item() for mask in keep_share([large, small], 0.5, together=True)] == [4, 0]


def test_blocks_are_summed_and_filled_again() -> None:
    scores = torch.arange(8.0).reshape(2, 4)
    assert block_sums(scores, 2, 2).tolist() == [[0 + 1 + 4 + 5, 2 + 3 + 6 + 7]]
    assert fill_blocks(torch.tensor([[True, False]]), 2, 2).tolist() == [[True, True, False, False]] * 2


# Methods on one small matrix, with an optimiser, as the trainer would drive them


@pytest.fixture
def tiny(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert"), task="sentence-similarity")


def step(sparsity: SparsityInTraining, optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    sparsity.before_update()
    optimizer.step()
    sparsity.after_update()


def loss_of(weights: list[nn.Parameter], seed: int = 0) -> Callable[[], torch.Tensor]:
    """A loss with a gradient of its own for every weight, that depends on the weights."""
    generator = torch.Generator().manual_seed(seed)
    wanted = [torch.randn(weight.shape, generator=generator) for weight in weights]
    return lambda: sum(
        ((weight - goal) ** 2).mean() + (weight * weight.roll(1, 0)).mean()
        for weight, goal in zip(weights, wanted, strict=True)
    )


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_the_share_is_exact_and_holds_under_momentum(tiny: Checkpoint, method: str, allocation: str) -> None:
    sparsity = SparsityInTraining(tiny, sparsity_of(target=0.7, method=method, allocation=allocation))
    weights = [matrix.weight for matrix in sparsity.matrices]
    optimizer = torch.optim.AdamW(weights, 0.05, weight_decay=0.1)
    loss = loss_of(weights)
    for _ in range(3):
        step(sparsity, optimizer, loss)
    sparsity.make_masks(0.7)
    zeros = [weight == 0 for weight in weights]
    for _ in range(4):
        step(sparsity, optimizer, loss)
        assert all(torch.equal(weight == 0, was) for weight, was in zip(weights, zeros, strict=True))
    total = sum(weight.numel() for weight in weights)
    if allocation == "global":
        assert sum(int(was.sum()) for was in zeros) == total - round(0.3 * total)
        assert len({round(float(was.float().mean()), 3) for was in zeros}) > 1
    else:
        assert [int(was.sum()) for was in zeros] == [each.numel() - round(0.3 * each.numel()) for each in zeros]
    assert sparsity.zero_share() == pytest.approx(0.7, abs=1e-3)


def test_what_magnitude_cut_stays_cut(tiny: Checkpoint) -> None:
    sparsity = SparsityInTraining(tiny, sparsity_of(target=0.9))
    weights = [matrix.weight for matrix in sparsity.matrices]
    optimizer, loss = torch.optim.Adam(weights, 0.1), loss_of(weights)
    before = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    for zeros in (0.2, 0.5, 0.5, 0.9):
        sparsity.make_masks(zeros)
        now = [weight == 0 for weight in weights]
        assert all(bool((was <= is_now).all()) for was, is_now in zip(before, now, strict=True))
        assert sparsity.zero_share() == pytest.approx(zeros, abs=1e-3)
        before = now
        step(sparsity, optimizer, loss)


def test_blocks_go_together(tiny: Checkpoint) -> None:
    sparsity = SparsityInTraining(tiny, sparsity_of(target=0.5, block=(4, 2)))
    sparsity.make_masks(0.5)
    for matrix in sparsity.matrices:
        zeros = block_sums((matrix.weight == 0).float(), 4, 2)
        assert set(zeros.unique().tolist()) == {0, 8}
    assert sparsity.zero_share() == 0.5


def test_rows_of_a_block_are_outputs_whichever_way_weights_lie(tiny_checkpoint: TinyCheckpoint) -> None:
    gpt2 = load_checkpoint(tiny_checkpoint("gpt2", "text-generation"))
    sparsity = SparsityInTraining(gpt2, sparsity_of(target=0.5, block=(4, 1)))
    sparsity.make_masks(0.5)
    for matrix in sparsity.matrices:
        assert matrix.axis == 0
        assert set(block_sums((matrix.weight == 0).float(), 1, 4).unique().tolist()) == {0, 4}  # [in, out]


class _TopV(torch.autograd.Function):
    """Sanh et al.'s binarizer, as they publish it: straight through the mask."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, kept: int) -> torch.Tensor:
        mask = torch.zeros_like(scores).flatten()
        mask[scores.flatten().argsort(descending=True, stable=True)[:kept]] = 1
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def test_movement_equals_masks_that_are_learnt(tiny: Checkpoint) -> None:
    """Against w' = w * TopV(s) with w and s as parameters and autograd through both: AdamW on w, plain gradient descent
    on s."""
    sparsity = SparsityInTraining(tiny, sparsity_of(target=0.6, method="movement"))
    matrices = sparsity.matrices[:3]
    sparsity.matrices[:] = matrices
    weights = [matrix.weight for matrix in matrices]
    dense = [weight.detach().clone().requires_grad_() for weight in weights]
    scores = [torch.zeros_like(weight).requires_grad_() for weight in dense]
    shares = [0.0, 0.0, 0.2, 0.4, 0.6, 0.6, 0.6, 0.6]
    ours = torch.optim.AdamW(weights, 0.05, weight_decay=0.01)
    theirs = torch.optim.AdamW(dense, 0.05, weight_decay=0.01)
    learning_scores = torch.optim.SGD(scores, 3.0)  # any rate: only the order counts
    back = 0
    for number, zeros in enumerate(shares):
        before = [matrix.mask.clone() for matrix in matrices]
        sparsity.make_masks(zeros)
        back += sum(int((matrix.mask & ~was).sum()) for matrix, was in zip(matrices, before, strict=True))
        masked = [
            weight * _TopV.apply(score, round((1 - zeros) * weight.numel()))
            for weight, score in zip(dense, scores, strict=True)
        ]
        for mine, other in zip(weights, masked, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        theirs.zero_grad()
        learning_scores.zero_grad()
        loss_of(masked, number)().backward()  # type: ignore[arg-type]
        theirs.step()
        learning_scores.step()
        step(sparsity, ours, loss_of(weights, number))
    assert back > 0  # or the test would say nothing of coming back


def test_movement_lets_a_weight_come_back_with_its_value(tiny: Checkpoint) -> None:
    sparsity = SparsityInTraining(tiny, sparsity_of(target=0.5, method="movement"))
    (matrix,) = sparsity.matrices[:] = sparsity.matrices[:1]
    weight = matrix.weight
    with torch.no_grad():
        weight.fill_(1)
    assert matrix.dense is not None
    matrix.dense.fill_(1)
    optimizer = torch.optim.SGD([weight], 0.1)
    half = torch.arange(weight.numel()).view_as(weight) < weight.numel() // 2
    towards_zero = torch.where(half, 1.0, -1.0)  # dL/dw > 0 makes a positive weight smaller
    step(sparsity, optimizer, lambda: (weight * towards_zero).sum())
    sparsity.make_masks(0.5)
    assert torch.equal(weight == 0, half)
    for _ in range(2):
        step(sparsity, optimizer, lambda: (weight * -3 * towards_zero).sum())
    sparsity.make_masks(0.5)
    assert torch.equal(weight == 0, ~half)
    torch.testing.assert_close(weight[half], torch.full_like(weight[half], 0.9))  # where its first step had left it


def test_sr_ste_is_the_papers_update(tiny: Checkpoint) -> None:
    sparsity = SparsityInTraining(tiny, sparsity_of(pattern="2:4", method="sr-ste", decay=0.5))
    (matrix,) = sparsity.matrices[:] = sparsity.matrices[:1]
    weight, rate = matrix.weight, 0.1
    dense = weight.detach().clone()
    sparsity.make_masks(0.5)
    optimizer = torch.optim.SGD([weight], rate)
    goal = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    changed = 0
    for _ in range(6):
        mask = _two_largest_of_four(dense)
        torch.testing.assert_close(weight.detach(), dense * mask)
        gradient = 2 * (dense * mask - goal)
        dense = dense - rate * (gradient + 0.5 * (1 - mask) * dense)
        step(sparsity, optimizer, lambda: ((weight - goal) ** 2).sum())
        torch.testing.assert_close(matrix.dense, dense)
        changed += int((_two_largest_of_four(dense) != mask).sum())
    assert changed > 0
    assert is_semi_structured(weight.detach().numpy(), axis=1)


def _two_largest_of_four(weight: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 4):
            group = weight[row, start : start + 4].abs()
            for place in sorted(range(4), key=lambda at: -float(group[at]))[:2]:
                mask[row, start + place] = 1
    return mask


def test_a_step_that_loss_scaling_skips_leaves_no_trace_in_the_scores(tiny: Checkpoint) -> None:
    sparsity = SparsityInTraining(tiny, sparsity_of(target=0.5, method="movement"))
    (matrix,) = sparsity.matrices[:] = sparsity.matrices[:1]
    matrix.weight.grad = torch.full_like(matrix.weight, float("nan"))
    sparsity.before_update()
    assert matrix.moved is not None and not matrix.moved.any()


# Which matrices


def test_only_matrices_that_learn(tiny: Checkpoint) -> None:
    tiny.model.requires_grad_(False)
    anatomy_of(tiny.model).layers(tiny.model)[1].requires_grad_(True)
    sparsity = SparsityInTraining(tiny, sparsity_of(target=0.5))
    assert {matrix.name.split(".")[2] for matrix in sparsity.matrices} == {"1"}
    assert {reason for _, reason in sparsity.skipped} == {"they do not learn"}
    sparsity.make_masks(0.5)
    assert (
        "6 of 12 matrices" in sparsity.note()
        and "Left dense, since they do not learn: encoder.layer.0" in sparsity.note()
    )


def test_sizes_that_kernels_or_blocks_do_not_take(tiny: Checkpoint) -> None:
    config = BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    odd = replace(tiny, model=BertModel(config))
    sparsity = SparsityInTraining(odd, sparsity_of(pattern="2:4", method="sr-ste"))
    assert len(sparsity.matrices) == 4
    assert [reason for _, reason in sparsity.skipped] == [
        f"its {side} size 40 is not a multiple of 32, which sparse kernels need" for side in ("output", "input")
    ]
    blocks = SparsityInTraining(odd, sparsity_of(target=0.5, block=(32, 1)))
    assert [reason for _, reason in blocks.skipped] == ["its output size 40 is not a multiple of the block's 32"]
    with pytest.raises(UsageError, match=r"No matrix of .* can reach 50 % zeros by magnitude: Left dense, since"):
        SparsityInTraining(odd, sparsity_of(target=0.5, block=(64, 1)))


def test_what_is_sparse_already_is_refused(tiny: Checkpoint) -> None:
    SparsityInTraining(tiny, sparsity_of(pattern="2:4")).make_masks(0.5)
    with pytest.raises(UsageError, match="2:4 is there already"):
        SparsityInTraining(tiny, sparsity_of(pattern="2:4", method="sr-ste"))
    assert len(SparsityInTraining(tiny, sparsity_of(target=0.8)).matrices) == 12


def test_movement_without_a_gradient_is_refused(tiny: Checkpoint) -> None:
    sparsity = SparsityInTraining(tiny, sparsity_of(target=0.5, method="movement"))
    with pytest.raises(UsageError, match=r"Movement cannot rank the weights of encoder\.layer\.0.*no gradient so far"):
        sparsity.make_masks(0.5)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_shards_are_refused(tiny: Checkpoint, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UsageError, match="no process sees whole weights"):
        SparsityInTraining(tiny, sparsity_of(target=0.5))


# Settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one of target and pattern"),
        ({"target": 0.5, "pattern": "2:4"}, "exactly one of target and pattern"),
        ({"target": 1.0}, "more than 0 and less than 1"),
        ({"target": 0.0}, "more than 0 and less than 1"),
        ({"target": 0.5, "begin": 0.7, "end": 0.7}, "0 <= begin < end <= 1"),
        ({"target": 0.5, "end": 1.1}, "0 <= begin < end <= 1"),
        ({"target": 0.5, "schedule": "sudden"}, "there are cubic, linear, exponential, one-shot"),
        ({"target": 0.5, "block": [0, 4]}, "its sizes must be 1 or more"),
        ({"target": 0.5, "method": "sr-ste"}, "sr-ste needs a pattern"),
        ({"target": 0.5, "decay": 0.1}, "decay belongs to sr-ste"),
        ({"pattern": "2:4", "method": "movement"}, "not a pattern"),
        ({"pattern": "4:2"}, "N less than M"),
        ({"pattern": 124}, "reads as a number"),
        ({"pattern": "2:4", "schedule": "linear"}, "once, at `begin`: leave schedule out"),
        ({"pattern": "2:4", "method": "sr-ste", "begin": 0.3}, "from the first step on: leave begin out"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        sparsity_of(**given)
    assert said in f"{caught.value.message} {caught.value.hint}"


def test_settings_survive_being_written_down() -> None:
    kinds: list[dict[str, Any]] = [{"target": 0.5, "block": (4, 1)}, {"pattern": "2:4", "method": "sr-ste"}]
    for kind in kinds:
        settings = sparsity_of(**kind)
        assert SparsifySettings.model_validate(settings.model_dump(mode="json")) == settings


def test_masks_of_a_training(tiny: Checkpoint) -> None:
    def masks(steps: int, **given: Any) -> dict[int, float]:
        return SparsityInTraining(tiny, sparsity_of(**given)).masks_of(steps)

    linear = {"target": 0.6, "schedule": "linear", "begin": 0.1, "end": 0.7}
    assert masks(10, **linear, every=2) == pytest.approx({1: 0, 3: 0.2, 5: 0.4, 7: 0.6})
    assert sorted(masks(1000, **linear))[:3] == [100, 130, 160] and max(masks(1000, **linear)) == 700
    assert masks(1, **linear) == {0: 0.6}
    assert max(masks(10, target=0.5, end=1)) == 9  # at least one step with the last mask
    assert masks(10, pattern="2:4", begin=0.5) == {5: 0.5}
    assert masks(10, pattern="2:4", method="sr-ste") == {}
