"""The anatomy table against the modeling files that are installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, T5Config, T5EncoderModel
from transformers.pytorch_utils import Conv1D

from limbeck.errors import InputError
from limbeck.models.anatomy import ANATOMIES, FfnBlock, anatomy_of, in_features, out_features
from limbeck.models.checkpoint import load_checkpoint

TinyCheckpoint = Callable[..., Path]

every_family = pytest.mark.parametrize("family", sorted(ANATOMIES))


@every_family
def test_every_name_in_the_table_is_a_module(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = load_checkpoint(tiny_checkpoint(family)).model
    anatomy = anatomy_of(model)
    fused_or_split = [anatomy.qkv] if anatomy.qkv else [anatomy.query, anatomy.key, anatomy.value]
    names = [*fused_or_split, anatomy.output, anatomy.up, anatomy.down, *([anatomy.gate] if anatomy.gate else [])]
    layer = anatomy.layers(model)[1]
    for name in names:
        assert name is not None
        assert isinstance(layer.get_submodule(name), Conv1D if anatomy.transposed else nn.Linear)
    for name in anatomy.norms:
        assert "norm" in type(layer.get_submodule(name)).__name__.lower()


@every_family
def test_sizes_are_those_of_the_configuration(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = load_checkpoint(tiny_checkpoint(family)).model
    anatomy = anatomy_of(model)
    assert len(anatomy.layers(model)) == getattr(model.config, anatomy.layer_count) == 2
    assert getattr(model.config, anatomy.heads) == 4
    for block in anatomy.ffn(model):
        assert block.width == getattr(model.config, anatomy.ffn_width) == 64
        assert out_features(block.up) == block.width * (2 if block.fused else 1)
        assert in_features(block.up) == out_features(block.down) == model.config.hidden_size


@every_family
@pytest.mark.parametrize("task", ["sentence-similarity", "text-classification"])
def test_qualified_names_lead_to_the_modules(family: str, task: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = load_checkpoint(tiny_checkpoint(family, task=task), task=task).model
    anatomy = anatomy_of(model)
    for block in anatomy.ffn(model):
        assert model.get_submodule(block.up_name) is block.up
        assert model.get_submodule(block.down_name) is block.down
        assert block.gate_name is None or model.get_submodule(block.gate_name) is block.gate
    named = dict(anatomy.linear_layers(model))
    assert {block.down_name for block in anatomy.ffn(model)} <= set(named)
    assert all(model.get_submodule(name) is module for name, module in named.items())


@every_family
def test_linear_layers_are_all_matrices_of_the_layers_and_no_head(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = load_checkpoint(tiny_checkpoint(family, task="text-classification")).model
    anatomy = anatomy_of(model)
    inside = {name for name, parameter in anatomy.layers(model).named_parameters() if parameter.dim() == 2}
    weights = {
        f"{name}.weight".removeprefix(f"{anatomy.layers_name(model)}.") for name, _ in anatomy.linear_layers(model)
    }
    assert weights == inside


@every_family
def test_the_block_computes_what_the_layer_computes(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    """The roles of up, gate and down are right: the input of `down` is what the docstring of `FfnBlock` says."""
    model = load_checkpoint(tiny_checkpoint(family)).model
    block = anatomy_of(model).ffn(model)[0]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        block.up.register_forward_pre_hook(lambda _, inputs: seen.update(into=inputs[0])),
        block.down.register_forward_pre_hook(lambda _, inputs: seen.update(middle=inputs[0])),
    ]
    model(input_ids=torch.arange(5, 15).view(2, 5), attention_mask=torch.ones(2, 5, dtype=torch.int64))
    for handle in handles:
        handle.remove()
    assert torch.allclose(_middle(block, seen["into"], family), seen["middle"], atol=1e-5)


def _middle(block: FfnBlock, into: torch.Tensor, family: str) -> torch.Tensor:
    activation = nn.SiLU() if block.gate is not None else nn.GELU(approximate="tanh" if family == "gpt2" else "none")
    if block.fused:
        gate, up = block.up(into).split(block.width, dim=-1)
        return activation(gate) * up
    if block.gate is not None:
        return activation(block.gate(into)) * block.up(into)
    return activation(block.up(into))


def test_an_unknown_architecture_is_named_with_those_that_are_known() -> None:
    model = T5EncoderModel(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=10))
    with pytest.raises(InputError, match=r"'t5'.*bert.*gpt2.*qwen3"):
        anatomy_of(model)


def test_layers_are_the_models_own_list(tiny_checkpoint: TinyCheckpoint) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint("bert", task="text-classification"))
    assert anatomy_of(model).layers(model) is model.bert.encoder.layer
