"""The sums of a layer-by-layer pass are those of the whole model's forward, in every family, padding left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from limbeck.errors import InputError
from limbeck.models.anatomy import ANATOMIES, anatomy_of
from limbeck.models.batching import Examples
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.importance import Calibration
from limbeck.prune.layerwise import Statistic, layerwise_pass

TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def load(tiny_checkpoint: TinyCheckpoint, texts: list[str]) -> Callable[[str], tuple[Checkpoint, Examples]]:
    """A tiny model of a family and 16 texts of 1 to 12 words as its token ids."""

    def loaded(family: str) -> tuple[Checkpoint, Examples]:
        checkpoint = load_checkpoint(tiny_checkpoint(family))
        encoded = [checkpoint.tokenizer(text) for text in texts[-16:]]
        return checkpoint, Examples([dict(tokens) for tokens in encoded])

    return loaded


@torch.no_grad()
def grams_of_whole_forwards(checkpoint: Checkpoint, examples: Examples) -> dict[str, torch.Tensor]:
    """X^T X of every linear module inside the layers, one example at a time through the model itself: no padding."""
    grams: dict[str, torch.Tensor] = {}

    def see(name: str, inputs: torch.Tensor) -> None:
        tokens = inputs.flatten(0, -2).double()
        grams[name] = grams.get(name, 0) + tokens.T @ tokens

    model = checkpoint.model
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
        for name, module in anatomy_of(model).linear_layers(model)
    ]
    for feature in examples.features:
        model(**{name: torch.tensor([feature[name]]) for name in checkpoint.input_names})
    for handle in handles:
        handle.remove()
    return grams


@pytest.mark.parametrize("family", sorted(ANATOMIES))
@pytest.mark.parametrize("batch_size", [1, 5])
def test_sums_are_those_of_whole_forwards(family: str, batch_size: int, load: Callable) -> None:
    checkpoint, examples = load(family)
    expected = grams_of_whole_forwards(checkpoint, examples)
    calibration = Calibration(examples, batch_size)
    seen = set()
    for layer in layerwise_pass(checkpoint, calibration, Statistic.GRAM):
        for name, _ in layer.linear_layers():
            moments = layer.moments[name]
            torch.testing.assert_close(moments.gram.double(), expected[name], rtol=1e-3, atol=1e-3)
            assert moments.tokens == sum(len(feature["input_ids"]) for feature in examples.features)
            seen.add(name)
    assert seen == set(expected)
    for layer in layerwise_pass(checkpoint, calibration, Statistic.SQUARES, changes=False):
        for name, moments in layer.moments.items():
            torch.testing.assert_close(moments.squares, expected[name].diagonal(), rtol=1e-3, atol=1e-3)
    assert hash_of_model(checkpoint.model) == checkpoint.hash


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "llama", "modernbert"])
def test_later_layers_see_what_changed_ones_make(family: str, load: Callable) -> None:
    checkpoint, examples = load(family)
    changed = load(family)[0]
    with torch.no_grad():
        for parameter in anatomy_of(changed.model).layers(changed.model)[0].parameters():
            parameter.mul_(0.5)
    expected = grams_of_whole_forwards(changed, examples)
    for layer in layerwise_pass(checkpoint, Calibration(examples, 4), Statistic.GRAM):
        if layer.index == 1:
            for name, moments in layer.moments.items():
                torch.testing.assert_close(moments.gram.double(), expected[name], rtol=1e-3, atol=1e-3)
        else:
            with torch.no_grad():
                for parameter in layer.module.parameters():
                    parameter.mul_(0.5)
    assert hash_of_model(checkpoint.model) == checkpoint.hash


def test_modules_with_the_same_input_share_their_sums(load: Callable) -> None:
    checkpoint, examples = load("llama")
    layer = next(layerwise_pass(checkpoint, Calibration(examples, 4), Statistic.GRAM))
    moments = {name.removeprefix("layers.0."): value for name, value in layer.moments.items()}
    query, gate = moments["self_attn.q_proj"], moments["mlp.gate_proj"]
    assert moments["self_attn.k_proj"] is query and moments["self_attn.v_proj"] is query
    assert moments["mlp.up_proj"] is gate and gate is not query
    assert len({id(value) for value in moments.values()}) == 4


def test_only_named_modules_are_added_up_and_progress_ends_at_all(load: Callable) -> None:
    checkpoint, examples = load("bert")
    calls: list[tuple[int, int]] = []
    name = "encoder.layer.1.output.dense"
    calibration = Calibration(examples, 8, progress=lambda done, total: calls.append((done, total)))
    passed = layerwise_pass(checkpoint, calibration, Statistic.SQUARES, names={name}, changes=False)
    assert [sorted(layer.moments) for layer in passed] == [[], [name]]
    assert calls == [(done, 4) for done in (1, 2, 3, 4)]


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert", "electra"])
def test_a_model_in_half_precision_is_computed_in_float32(family: str, load: Callable) -> None:
    checkpoint, examples = load(family)
    for parameter in checkpoint.model.parameters():  # not the buffers, which loading leaves in float32
        parameter.data = parameter.data.bfloat16()
    rounded = load(family)[0]
    rounded.model.load_state_dict(checkpoint.model.state_dict())
    expected = grams_of_whole_forwards(rounded, examples)
    for layer in layerwise_pass(checkpoint, Calibration(examples, 4), Statistic.GRAM):
        assert all(parameter.dtype == torch.float32 for parameter in layer.module.parameters())
        for name, moments in layer.moments.items():
            torch.testing.assert_close(moments.gram.double(), expected[name], rtol=1e-3, atol=1e-3)
    assert all(parameter.dtype == torch.bfloat16 for parameter in checkpoint.model.parameters())


def test_no_examples_are_refused(load: Callable) -> None:
    checkpoint, _ = load("bert")
    with pytest.raises(InputError, match="no examples"):
        next(layerwise_pass(checkpoint, Calibration(Examples([])), Statistic.GRAM))
