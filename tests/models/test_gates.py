"""Gates: 0 is as if the part had been cut out, 1 is as it is, and each example may have its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from limbeck.errors import InputError
from limbeck.models.anatomy import ANATOMIES
from limbeck.models.checkpoint import load_checkpoint
from limbeck.models.gates import Gates, gated, residual_norms
from limbeck.models.surgery import HeadSelection, Selection, select

TinyCheckpoint = Callable[..., Path]

every_family = pytest.mark.parametrize("family", sorted(ANATOMIES))
WIDTH, HEADS, FFN = 32, 4, 64  # of the tiny models
LOADED: dict[tuple[str, str], PreTrainedModel] = {}  # no test changes a model

IDS = torch.tensor([[5, 9, 17, 33, 41, 60, 22], [8, 5, 77, 12, 90, 31, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


def tiny(tiny_checkpoint: TinyCheckpoint, family: str, task: str = "sentence-similarity") -> PreTrainedModel:
    if (family, task) not in LOADED:
        LOADED[family, task] = load_checkpoint(tiny_checkpoint(family, task), task).model
    return LOADED[family, task]


@torch.inference_mode()
def answer(model: PreTrainedModel, gates: Gates | None = None, rows: slice = slice(None)) -> torch.Tensor:
    """Hidden states at the real tokens, or logits."""
    with gated(model, gates or Gates()):
        first = model.eval()(input_ids=IDS[rows], attention_mask=MASK[rows])[0]
    return first[MASK[rows].bool()] if first.dim() == 3 and first.shape[1] == MASK.shape[1] else first


def mask(count: int, kept: list[int]) -> torch.Tensor:
    return torch.zeros(count).index_fill(0, torch.tensor(kept), 1.0)


def assert_like_surgery(model: PreTrainedModel, gates: Gates, selection: Selection, cut_outputs: bool = False) -> None:
    """The gated model answers as the smaller one does, and not as it did."""
    wanted, got, before = answer(select(model, selection)), answer(model, gates), answer(model)
    assert (got - before).abs().max() > 1e-2
    if cut_outputs:
        assert selection.channels is not None
        gone = [channel for channel in range(WIDTH) if channel not in selection.channels.tolist()]
        assert (got[:, gone] == 0).all()
        got = got[:, selection.channels]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@every_family
def test_heads_gated_to_zero_are_heads_cut_out(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny(tiny_checkpoint, family)
    shared = ANATOMIES[family].key_value_heads is not None
    # Two heads share keys and values where any do: one of each two may go. MPNet's layers have to keep the same ones.
    kept = [[0, 3], [1, 2]] if shared else [[0, 3], [0, 3]] if family == "mpnet" else [[1, 2, 3], [0, 2, 3]]
    selected = [
        HeadSelection(torch.tensor(some), torch.tensor([0, 1]) if shared else torch.tensor(some)) for some in kept
    ]
    gates = Gates(heads={layer: mask(HEADS, some) for layer, some in enumerate(kept)})
    assert_like_surgery(model, gates, Selection(heads=selected))


@every_family
def test_channels_gated_to_zero_are_channels_cut_out(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny(tiny_checkpoint, family)
    kept = [list(range(0, FFN, 2)), list(range(32))]
    gates = Gates(ffn={layer: mask(FFN, some) for layer, some in enumerate(kept)})
    assert_like_surgery(model, gates, Selection(ffn=[torch.tensor(some) for some in kept]))


@every_family
@pytest.mark.parametrize("gone", [0, 1])
def test_a_layer_gated_to_zero_is_a_layer_cut_out(family: str, gone: int, tiny_checkpoint: TinyCheckpoint) -> None:
    if family == "modernbert" and gone == 0:
        pytest.skip("its first layer cannot be cut out")
    model = tiny(tiny_checkpoint, family)
    assert_like_surgery(model, Gates(layers={gone: torch.tensor(0.0)}), Selection(layers=[1 - gone]))


@every_family
@pytest.mark.parametrize("task", ["sentence-similarity", "text-classification", "language"])
def test_a_width_gated_to_zero_is_a_width_cut_out(family: str, task: str, tiny_checkpoint: TinyCheckpoint) -> None:
    """Norms take their statistics over the channels that stay; poolers and heads lose the same channels."""
    if task == "language":
        task = "fill-mask" if family not in ("gpt2", "llama", "mistral", "qwen2", "qwen3") else "text-generation"
    model = tiny(tiny_checkpoint, family, task)
    kept = [channel for channel in range(WIDTH) if channel % 4 != 1]
    selection = Selection(channels=torch.tensor(kept))
    assert_like_surgery(model, Gates(width=mask(WIDTH, kept)), selection, cut_outputs=task == "sentence-similarity")


@every_family
def test_gates_of_one_change_nothing(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny(tiny_checkpoint, family)
    layers = range(2)
    exact = Gates(
        heads={layer: torch.ones(HEADS) for layer in layers},
        ffn={layer: torch.ones(2, FFN) for layer in layers},
        layers={layer: torch.ones(()) for layer in layers},
    )
    assert torch.equal(answer(model, exact), answer(model))
    torch.testing.assert_close(answer(model, Gates(width=torch.ones(WIDTH))), answer(model), rtol=1e-4, atol=1e-5)


@every_family
def test_every_example_has_gates_of_its_own(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny(tiny_checkpoint, family)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) + 0.5

    both = Gates(heads={1: random(2, HEADS)}, ffn={0: random(2, FFN)}, layers={1: random(2)}, width=random(2, WIDTH))
    assert both.width is not None
    alone = [
        answer(
            model,
            Gates({1: both.heads[1][row]}, {0: both.ffn[0][row]}, {1: both.layers[1][row]}, both.width[row]),
            slice(row, row + 1),
        )
        for row in (0, 1)
    ]
    torch.testing.assert_close(answer(model, both), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_model_in_half_precision_stays_in_it(tiny_checkpoint: TinyCheckpoint) -> None:
    for family in ("bert", "llama"):
        model = load_checkpoint(tiny_checkpoint(family)).model.bfloat16()
        gates = Gates({0: torch.ones(HEADS)}, {0: torch.ones(FFN)}, {0: torch.ones(())}, torch.ones(WIDTH))
        assert answer(model, gates).dtype == torch.bfloat16
        torch.testing.assert_close(answer(model, gates), answer(model), rtol=0.1, atol=0.1)


def test_nothing_is_left_of_the_gates_even_after_an_error(tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny(tiny_checkpoint, "electra")
    before = answer(model)
    gates = Gates({0: torch.zeros(HEADS)}, {0: torch.zeros(FFN)}, {0: torch.zeros(())}, torch.zeros(WIDTH))
    with pytest.raises(RuntimeError, match="from inside"), gated(model, gates):
        raise RuntimeError("from inside")
    assert torch.equal(answer(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_norms_inside_heads_are_not_of_the_residual_stream(tiny_checkpoint: TinyCheckpoint) -> None:
    for family, count in (("bert", 5), ("modernbert", 5), ("gpt2", 5), ("qwen3", 5)):
        model = tiny(
            tiny_checkpoint, family
        )  # two a layer and one more; ModernBERT's first has one, and two are around
        assert len(residual_norms(model, model)) == count


def test_an_unknown_architecture_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load_checkpoint(tiny_checkpoint("bert")).model
    model.config.model_type = "mystery"
    with pytest.raises(InputError, match="does not know where the layers of a 'mystery'"), gated(model, Gates()):
        pass
