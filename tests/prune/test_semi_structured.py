"""The laws of N:M masks, and the pattern in whole models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from limbeck.errors import InputError, UsageError
from limbeck.models.anatomy import ANATOMIES, anatomy_of, reduction_axis
from limbeck.models.batching import Examples
from limbeck.models.checkpoint import hash_of_model, load_checkpoint
from limbeck.models.importance import Calibration
from limbeck.models.sparsity import is_semi_structured, zero_share
from limbeck.prune.masks import nm_mask
from limbeck.prune.one_shot import SPARSIFIERS
from limbeck.prune.pruning import prune
from limbeck.prune.semi_structured import prune_semi_structured
from limbeck.prune.settings import PruneSettings

TinyCheckpoint = Callable[..., Path]


@st.composite
def matrices(draw: st.DrawFn, axis: int) -> torch.Tensor:
    """float32 [rows, columns] whose size along `axis` is a multiple of 4; equal values and zeros are common."""
    sizes = [draw(st.integers(1, 5)), draw(st.integers(1, 5))]
    sizes[axis] *= 4
    values = st.floats(-2, 2, width=16) | st.sampled_from([0.0, 1.0, -1.0])
    return torch.from_numpy(draw(hnp.arrays(np.float32, tuple(sizes), elements=values)))


matrix_and_axis = st.sampled_from([0, 1]).flatmap(lambda axis: st.tuples(matrices(axis), st.just(axis)))


def groups(values: torch.Tensor, axis: int) -> torch.Tensor:
    """[groups, 4] along the axis."""
    return values.movedim(axis, -1).reshape(-1, 4)


@given(matrix_and_axis)
def test_a_mask_keeps_exactly_two_of_four(case: tuple[torch.Tensor, int]) -> None:
    weight, axis = case
    mask = nm_mask(weight, 2, 4, axis)
    assert mask.shape == weight.shape and mask.dtype == torch.bool
    assert (groups(mask, axis).sum(dim=1) == 2).all()


@given(matrix_and_axis)
def test_a_mask_keeps_the_larger_ones(case: tuple[torch.Tensor, int]) -> None:
    weight, axis = case
    mask, sizes = groups(nm_mask(weight, 2, 4, axis), axis), groups(weight.abs(), axis)
    smallest_kept = sizes.masked_fill(~mask, float("inf")).amin(dim=1)
    largest_dropped = sizes.masked_fill(mask, float("-inf")).amax(dim=1)
    assert (largest_dropped <= smallest_kept).all()


@given(matrix_and_axis)
def test_masking_twice_is_masking_once(case: tuple[torch.Tensor, int]) -> None:
    weight, axis = case
    once = weight * nm_mask(weight, 2, 4, axis)
    assert torch.equal(once * nm_mask(once, 2, 4, axis), once)
    assert is_semi_structured(once.numpy(), axis) and zero_share(once.numpy()) >= 0.5


def test_the_axis_matters() -> None:
    weight = np.array([[1.0, 1.0, 0.0, 0.0]] * 4)
    assert is_semi_structured(weight, axis=1)
    assert not is_semi_structured(weight, axis=0)


def test_a_size_that_does_not_divide_has_no_pattern() -> None:
    assert not is_semi_structured(np.zeros((3, 6)), axis=1)
    with pytest.raises(InputError, match="groups of 4"):
        nm_mask(torch.zeros(3, 6), 2, 4, dim=1)


@pytest.mark.parametrize("family", sorted(ANATOMIES))
def test_the_pattern_survives_saving_and_loading(family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    result = prune_semi_structured(checkpoint)
    skipped = {name for name, _ in result.skipped}
    prune(checkpoint, PruneSettings(pattern="2:4")).save(tmp_path / "sparse")
    loaded = load_checkpoint(tmp_path / "sparse")
    original = dict(anatomy_of(checkpoint.model).linear_layers(checkpoint.model))
    for name, module in anatomy_of(loaded.model).linear_layers(loaded.model):
        axis = reduction_axis(module)
        if name in skipped:
            assert torch.equal(module.weight, original[name].weight)
            continue
        weight = module.weight.detach().numpy()
        assert is_semi_structured(weight, axis)
        assert zero_share(weight) == pytest.approx(0.5)
        kept = module.weight != 0
        assert torch.equal(module.weight[kept], original[name].weight[kept])
    assert loaded.hash == prune(loaded, PruneSettings(pattern="2:4")).hash
    assert hash_of_model(checkpoint.model) == checkpoint.hash


def test_everything_outside_the_layers_stays_dense(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("gpt2", task="text-generation"))
    pruned = prune_semi_structured(checkpoint).model
    assert torch.equal(pruned.lm_head.weight, checkpoint.model.lm_head.weight)
    assert pruned.lm_head.weight is pruned.get_input_embeddings().weight


def test_matrices_that_kernels_do_not_take_are_listed_with_the_reason(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama"))
    pruned = prune(checkpoint, PruneSettings(pattern="2:4"))
    result = prune_semi_structured(checkpoint)
    assert [name for name, _ in result.skipped] == [
        f"layers.{index}.self_attn.{name}" for index in range(2) for name in ("k_proj", "v_proj")
    ]
    assert all("output size 16 is not a multiple of 32" in reason for _, reason in result.skipped)
    step = pruned.lineage.steps[-1]
    assert step.method == "2:4 by magnitude" and step.note is not None
    assert step.note.startswith("2:4 in 10 of 14 matrices.") and "layers.1.self_attn.v_proj" in step.note


def test_a_model_in_which_nothing_can_be_sparse_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    for _, module in anatomy_of(checkpoint.model).linear_layers(checkpoint.model):
        module.weight = torch.nn.Parameter(module.weight[:, :20].clone())
    with pytest.raises(InputError, match="20 is not a multiple of 32"):
        prune_semi_structured(checkpoint)


@pytest.mark.parametrize("pattern", ["3:5:7", "4:2", "4:4", "0:4", "2 of 4", "1:64", ""])
def test_an_unknown_pattern_is_refused(pattern: str, tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(UsageError, match="N:M"):
        prune_semi_structured(load_checkpoint(tiny_checkpoint("bert")), pattern=pattern)


@pytest.mark.parametrize("method", sorted(SPARSIFIERS))
@pytest.mark.parametrize(("family", "pattern"), [("gpt2", "1:4"), ("llama", "4:8"), ("modernbert", "2:4")])
def test_every_method_keeps_n_of_m(
    family: str, pattern: str, method: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    examples = Examples([dict(checkpoint.tokenizer(text)) for text in texts[:8]])
    result = prune_semi_structured(checkpoint, pattern, method, Calibration(examples, batch_size=4))
    n, m = map(int, pattern.split(":"))
    skipped = {name for name, _ in result.skipped}
    for name, module in anatomy_of(result.model).linear_layers(result.model):
        if name not in skipped:
            kept = (module.weight != 0).movedim(reduction_axis(module), -1).unflatten(-1, (-1, m)).sum(dim=-1)
            assert (kept == n).all(), name
    assert result.method == f"{pattern} by {method}"
    assert hash_of_model(checkpoint.model) == checkpoint.hash


def test_padding_does_not_matter(tiny_checkpoint: TinyCheckpoint, texts: list[str]) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    examples = Examples([dict(checkpoint.tokenizer(text)) for text in texts[:8]])
    alone, padded = (
        prune_semi_structured(checkpoint, "2:4", "sparsegpt", Calibration(examples, size)).model for size in (1, 8)
    )
    for one, other in zip(alone.parameters(), padded.parameters(), strict=True):
        assert torch.equal(one == 0, other == 0)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_groups_that_do_not_divide_are_listed(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    with pytest.raises(InputError, match="input size 32 does not divide into groups of 5"):
        prune_semi_structured(checkpoint, "3:5")


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_channels_may_be_put_in_a_better_order_first(
    method: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"))
    examples = Examples([dict(checkpoint.tokenizer(text)) for text in texts[:8]])
    plain, permuted = (
        prune_semi_structured(checkpoint, "2:4", method, Calibration(examples, 4), permute=permute)
        for permute in (False, True)
    )
    assert permuted.method == f"2:4 by {method}, permuted"
    assert permuted.note is not None and "more score" in permuted.note and "-" not in permuted.note.split(" keep ")[1]
    assert hash_of_model(checkpoint.model) == checkpoint.hash
    if method == "magnitude":
        kept = [
            sum(float(m.weight.detach().abs().sum()) for _, m in anatomy_of(result.model).linear_layers(result.model))
            for result in (plain, permuted)
        ]
        assert kept[1] > kept[0]


@pytest.mark.parametrize(("method", "message"), [("wanda", "needs examples"), ("movement", "training")])
def test_methods_without_what_they_need_are_refused(method: str, message: str, tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(UsageError, match=message):
        prune_semi_structured(load_checkpoint(tiny_checkpoint("bert")), method=method)
