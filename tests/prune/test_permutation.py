"""Permuted models compute what they did, and N:M masks keep more of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError, UsageError
from limbeck.models.anatomy import ANATOMIES, Linear, anatomy_of, in_features, out_features, reduction_axis
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.lineage import Step
from limbeck.prune.masks import nm_mask
from limbeck.prune.permutation import Gain, permute_channels
from limbeck.prune.permutation_search import kept_score, search_order

TinyCheckpoint = Callable[..., Path]
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
HEADS_ON_TOP = [
    *((family, "text-classification") for family in sorted(set(ANATOMIES) - {"mpnet"})),
    ("mpnet", "token-classification"),
    *((family, "text-generation" if family in DECODERS else "fill-mask") for family in sorted(ANATOMIES)),
]


def magnitudes(name: str, module: Linear) -> torch.Tensor:
    weight = module.weight.detach().abs()
    return weight if reduction_axis(module) == 1 else weight.T


def random_scores(seed: int) -> Callable[[str, Linear], torch.Tensor]:
    """Scores that depend on the matrix's name alone."""

    def scores(name: str, module: Linear) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        return torch.rand(out_features(module), in_features(module), generator=generator)

    return scores


def outputs(model: Any, texts: list[str], checkpoint: Checkpoint) -> torch.Tensor:
    """Of real tokens only: [tokens or rows, channels]."""
    batch = checkpoint.tokenizer(texts[:6], padding=True, return_tensors="pt")
    with torch.no_grad():
        first = model(**{name: batch[name] for name in batch})[0]
    return first[batch["attention_mask"].bool()] if first.dim() == 3 else first


def same(model: Any, permuted: Any, texts: list[str], checkpoint: Checkpoint) -> bool:
    before, after = outputs(model, texts, checkpoint), outputs(permuted, texts, checkpoint)
    return torch.allclose(before, after, atol=1e-5 * max(1.0, float(before.abs().max())))


def permuted_copy(checkpoint: Checkpoint, scores: Callable[[str, Linear], Any], **options: Any) -> tuple[Any, Gain]:
    model = copy.deepcopy(checkpoint.model)
    return model, permute_channels(model, scores, **options)


@pytest.mark.parametrize("family", sorted(ANATOMIES))
def test_a_bare_model_computes_the_same(family: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    permuted, gain = permuted_copy(checkpoint, random_scores(1))
    assert same(checkpoint.model, permuted, texts, checkpoint)
    anatomy = anatomy_of(permuted)
    moved = {name.rpartition("layers.")[2] if "layers." in name else name for name in gain.inputs}
    assert all(name.endswith((anatomy.down, anatomy.output)) for name in moved)
    assert len(gain.inputs) == 4, "down and output projections of two layers"


@pytest.mark.parametrize(("family", "task"), HEADS_ON_TOP)
def test_a_model_with_a_head_computes_the_same_and_all_inputs_move(
    family: str, task: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task)
    permuted, gain = permuted_copy(checkpoint, random_scores(2))
    assert same(checkpoint.model, permuted, texts, checkpoint)
    inside = {name for name, _ in anatomy_of(permuted).linear_layers(permuted)}
    assert {matrix.name for matrix in gain.matrices} == inside
    assert inside <= set(gain.inputs)


@pytest.mark.parametrize("family", ["modernbert", "gpt2", "qwen3"])
@settings(max_examples=4)
@given(seed=st.integers(0, 10_000), pattern=st.sampled_from([(1, 4), (2, 4), (4, 8), (1, 2)]))
def test_no_scores_and_no_pattern_change_the_function(
    family: str, tiny_checkpoint: TinyCheckpoint, texts: list[str], seed: int, pattern: tuple[int, int]
) -> None:
    task = "text-classification"
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task)
    permuted, gain = permuted_copy(checkpoint, random_scores(seed), n=pattern[0], m=pattern[1], seed=seed)
    assert same(checkpoint.model, permuted, texts, checkpoint)
    assert gain.after >= gain.before


@pytest.mark.parametrize("family", sorted(ANATOMIES))
def test_a_mask_keeps_more_magnitude_afterwards(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    task = "text-generation" if family in DECODERS else "fill-mask"
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task)
    permuted, gain = permuted_copy(checkpoint, magnitudes)

    def kept(model: Any) -> dict[str, float]:
        return {
            name: float(module.weight.detach().abs()[nm_mask(module.weight, 2, 4, reduction_axis(module))].sum())
            for name, module in anatomy_of(model).linear_layers(model)
        }

    before, after = kept(checkpoint.model), kept(permuted)
    assert sum(after.values()) > 1.01 * sum(before.values())
    for matrix in gain.matrices:
        assert matrix.before == pytest.approx(before[matrix.name], rel=1e-5)
        assert matrix.after == pytest.approx(after[matrix.name], rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_what_moved_is_told_for_statistics_and_scores(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    task = "text-classification"
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task)
    permuted, gain = permuted_copy(checkpoint, magnitudes)
    now = dict(anatomy_of(permuted).linear_layers(permuted))
    for name, module in anatomy_of(checkpoint.model).linear_layers(checkpoint.model):
        assert torch.equal(gain.inputs[name].sort().values, torch.arange(in_features(module)))
        assert torch.equal(gain.reorder(name, magnitudes(name, module)), magnitudes(name, now[name]))


def test_tied_weights_stay_tied_and_a_permuted_model_reloads(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("gpt2", task="text-generation"))
    permuted, _ = permuted_copy(checkpoint, magnitudes)
    assert permuted.lm_head.weight is permuted.get_input_embeddings().weight
    checkpoint.after(permuted, Step(verb="prune", method="permutation")).save(tmp_path / "permuted")
    loaded = load_checkpoint(tmp_path / "permuted")
    assert same(checkpoint.model, loaded.model, texts, checkpoint)


def test_matrices_that_stay_dense_do_not_count(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    down = "encoder.layer.0.output.dense"
    _, gain = permuted_copy(checkpoint, lambda name, module: magnitudes(name, module) if name == down else None)
    assert [matrix.name for matrix in gain.matrices] == [down] == list(gain.inputs)
    assert list(gain.outputs) == ["encoder.layer.0.intermediate.dense"]


def test_the_same_seed_gives_the_same_model_and_progress_counts_to_the_end(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"))
    calls: list[tuple[int, int]] = []
    first, _ = permuted_copy(checkpoint, magnitudes, progress=lambda done, total: calls.append((done, total)))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    again, _ = permuted_copy(checkpoint, magnitudes)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), again.parameters(), strict=True))
    assert calls == [(done, 5) for done in range(1, 6)]


def test_bad_scores_and_patterns_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    with pytest.raises(UsageError, match="4:4"):
        permuted_copy(checkpoint, magnitudes, n=4, m=4)
    with pytest.raises(InputError, match=r"layer.0.output.dense are \[64, 32\]; \[out, in\] is \[32, 64\]"):
        permuted_copy(checkpoint, lambda name, module: magnitudes(name, module).T)
    with pytest.raises(InputError, match="negative"):
        permuted_copy(checkpoint, lambda name, module: -magnitudes(name, module))


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 9), stripes=st.integers(1, 6), m=st.integers(2, 6), n=st.data())
def test_an_order_is_a_permutation_that_keeps_no_less(
    seed: int, rows: int, stripes: int, m: int, n: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (rows, stripes * m), generator=generator).float()  # equal scores are common
    kept = n.draw(st.integers(1, m - 1))
    order = search_order(scores, kept, m, seed)
    assert torch.equal(order.sort().values, torch.arange(stripes * m))
    assert kept_score(scores[:, order], kept, m) >= kept_score(scores, kept, m)


def test_large_columns_that_stand_together_are_spread() -> None:
    scores = torch.full((8, 64), 0.01)
    scores[:, :32] = 1.0  # the first eight stripes lose half of it, the others have nothing to keep
    order = search_order(scores, 2, 4)
    assert kept_score(scores, 2, 4) == pytest.approx(8 * (16 + 16 * 0.01))
    assert kept_score(scores[:, order], 2, 4) == pytest.approx(8 * 32)
    assert ((order < 32).view(-1, 4).sum(dim=1) == 2).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_hidden_pattern_is_found_again(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(48, 32, generator=generator) + 0.5
    scores *= nm_mask(torch.rand(48, 32, generator=generator), 2, 4, dim=1)
    hidden = scores[:, torch.randperm(32, generator=generator)]
    assert kept_score(hidden, 2, 4) < 0.9 * float(scores.sum())
    order = search_order(hidden, 2, 4, seed)
    assert kept_score(hidden[:, order], 2, 4) == pytest.approx(float(scores.sum()))


def test_blocks_and_rows_bound_the_work_of_a_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(64, 1, generator=generator) * torch.rand(512, generator=generator) ** 4
    whole = kept_score(scores[:, search_order(scores, 2, 4)], 2, 4)
    monkeypatch.setattr("limbeck.prune.permutation_search._OPERATIONS", 512 * 128 * 16.0)
    order = search_order(scores, 2, 4)  # blocks of 128 columns, every fourth row
    assert torch.equal(order.sort().values, torch.arange(512))
    assert kept_score(scores, 2, 4) * 1.05 < kept_score(scores[:, order], 2, 4) > 0.99 * whole
