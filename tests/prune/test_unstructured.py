"""How many weights go, where, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError, UsageError
from limbeck.models.anatomy import ANATOMIES, anatomy_of
from limbeck.models.batching import Examples
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.importance import Calibration
from limbeck.prune.masks import Share, smallest
from limbeck.prune.one_shot import SPARSIFIERS, matrix
from limbeck.prune.unstructured import prune_unstructured

TinyCheckpoint = Callable[..., Path]


def matrices(checkpoint_or_model: object) -> dict[str, torch.Tensor]:
    """[out, in] by name, of everything inside the layers."""
    model = getattr(checkpoint_or_model, "model", checkpoint_or_model)
    return {name: matrix(module) for name, module in anatomy_of(model).linear_layers(model)}


def calibration_of(checkpoint: Checkpoint, texts: list[str]) -> Calibration:
    return Calibration(Examples([dict(checkpoint.tokenizer(text)) for text in texts[:8]]), batch_size=4)


@pytest.mark.parametrize("method", sorted(SPARSIFIERS))
@pytest.mark.parametrize("family", sorted(ANATOMIES))
def test_every_matrix_loses_its_share(
    family: str, method: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    result = prune_unstructured(checkpoint, 0.25, method, calibration=calibration_of(checkpoint, texts))
    before = matrices(checkpoint)
    for name, weight in matrices(result.model).items():
        assert (weight == 0).float().mean() == pytest.approx(0.25), name
        if method != "sparsegpt":  # which changes what stays
            assert torch.equal(weight[weight != 0], before[name][weight != 0])
    inside = {f"{name}.weight" for name in before}
    for name, value in result.model.state_dict().items():
        if name not in inside:
            assert torch.equal(value, checkpoint.model.state_dict()[name])
    assert hash_of_model(checkpoint.model) == checkpoint.hash
    with torch.no_grad():  # nothing is shared either
        for parameter in result.model.parameters():
            parameter.add_(1)
    assert hash_of_model(checkpoint.model) == checkpoint.hash


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("block", [None, (4, 8)])
def test_one_threshold_over_all_matrices(
    method: str, block: tuple[int, int] | None, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama"))
    uneven = matrices(checkpoint)["layers.0.mlp.up_proj"]
    uneven[: len(uneven) // 2] *= 1e-6  # of what this matrix computes, half its rows are nothing
    calibration = calibration_of(checkpoint, texts)
    result = prune_unstructured(checkpoint, 0.3, method, "global", block, calibration)
    pruned = matrices(result.model)
    zeros, total = sum(int((w == 0).sum()) for w in pruned.values()), sum(w.numel() for w in pruned.values())
    assert zeros / total == pytest.approx(0.3, abs=1e-3)
    assert (pruned["layers.0.mlp.up_proj"][: len(uneven) // 2] == 0).all()
    if method == "magnitude":
        assert max(float((w == 0).float().mean()) for name, w in pruned.items() if "0.mlp.up" not in name) < 0.49


def test_a_global_threshold_does_not_see_the_size_of_a_whole_matrix(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    first = matrices(prune_unstructured(checkpoint, 0.5, allocation="global").model)
    name = "encoder.layer.1.intermediate.dense"
    matrices(checkpoint)[name].mul_(2**-8)
    second = matrices(prune_unstructured(checkpoint, 0.5, allocation="global").model)
    assert all(torch.equal(first[other] == 0, second[other] == 0) for other in first)


@pytest.mark.parametrize("method", sorted(SPARSIFIERS))
def test_blocks_go_as_a_whole(method: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("gpt2"))
    calibration = calibration_of(checkpoint, texts)
    result = prune_unstructured(checkpoint, 0.5, method, block=[8, 4], calibration=calibration)
    for weight in matrices(result.model).values():
        zeros = (weight == 0).unflatten(1, (-1, 4)).unflatten(0, (-1, 8)).float().mean(dim=(1, 3))
        assert ((zeros == 0) | (zeros == 1)).all()
        assert zeros.mean() == pytest.approx(0.5)
    assert result.method == f"50% of weights in blocks of 8 x 4 by {method}"


def test_the_blocks_that_go_are_those_of_the_smallest_norm(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    pruned = matrices(prune_unstructured(checkpoint, 0.25, block=(4, 2)).model)
    for name, weight in matrices(checkpoint).items():
        norms = weight.unflatten(1, (-1, 2)).unflatten(0, (-1, 4)).square().sum(dim=(1, 3))
        gone = (pruned[name] == 0)[::4, ::2]
        assert norms[gone].max() < norms[~gone].min()


def test_matrices_that_do_not_divide_into_blocks_are_listed(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama"))
    result = prune_unstructured(checkpoint, 0.5, block=(32, 8))
    assert [name.rpartition(".")[2] for name, _ in result.skipped] == ["k_proj", "v_proj"] * 2
    assert result.skipped[0][1] == "its output size 16 does not divide into blocks of 32 x 8"
    assert result.note is not None and "in 10 of 14 matrices." in result.note
    with pytest.raises(InputError, match="blocks of 7 x 7"):
        prune_unstructured(checkpoint, 0.5, block=(7, 7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 0.0}, "sparsity is 0"),
        ({"sparsity": 1.0}, "sparsity is 1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"method": "wand"}, "Did you mean 'wanda'"),
        ({"method": "movement"}, "training"),
        ({"method": "wanda"}, "needs examples"),
        ({"method": "sparsegpt"}, "needs examples"),
        ({"allocation": "globally"}, "Did you mean 'global'"),
        ({"allocation": "global", "method": "sparsegpt"}, "no global threshold"),
        ({"block": [0, 4]}, r"block is \[0, 4\]"),
        ({"block": [4]}, "two sizes"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    with pytest.raises(UsageError, match=message):
        prune_unstructured(checkpoint, **{"sparsity": 0.5, **changes})


def test_weights_that_are_not_numbers_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    matrices(checkpoint)["encoder.layer.0.output.dense"][0, 0] = float("nan")
    with pytest.raises(InputError, match=r"encoder\.layer\.0\.output\.dense"):
        prune_unstructured(checkpoint, 0.5)


@settings(max_examples=30)
@given(
    values=st.lists(st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=20), min_size=1, max_size=5),
    place=st.floats(0, 1),
)
def test_the_smallest_of_all_parts_is_exact(values: list[list[float]], place: float) -> None:
    parts = [torch.tensor(part) for part in values]
    together = torch.cat(parts).sort().values
    count = min(int(place * len(together)) + 1, len(together))
    assert smallest(lambda: parts, count) == float(together[count - 1])


@settings(max_examples=30)
@given(rows=st.integers(1, 6), columns=st.integers(1, 30), sparsity=st.floats(0.01, 0.99), by_row=st.booleans())
def test_a_share_keeps_the_higher_scores(rows: int, columns: int, sparsity: float, by_row: bool) -> None:
    scores = torch.rand(rows, columns)
    kept = Share(sparsity, by_row=by_row).keep(scores)
    compared = zip(scores, kept, strict=True) if by_row else [(scores.flatten(), kept.flatten())]
    for score, keep in compared:
        assert int((~keep).sum()) == round(sparsity * len(score))
        if 0 < int(keep.sum()) < len(score):
            assert score[~keep].max() <= score[keep].min()
