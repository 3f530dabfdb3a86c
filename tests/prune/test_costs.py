"""Costs are what the really cut model has: its parameters counted, its operations as torch counts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.models.anatomy import ANATOMIES, anatomy_of
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.shapes import LayerShape, shapes_of
from limbeck.models.surgery import HeadSelection, Selection, select
from limbeck.prune.costs import Storage, counted_flops, flop_costs, weight_costs

TinyCheckpoint = Callable[..., Path]

TASK_OF = {"gpt2": "text-generation", "llama": "text-generation", "mistral": "text-generation",
           "qwen2": "text-generation", "qwen3": "text-generation", "modernbert": "token-classification",
           "distilbert": "text-classification", "electra": "text-classification"}  # fmt: skip
every_family = pytest.mark.parametrize("family", sorted(ANATOMIES))


def tiny(tiny_checkpoint: TinyCheckpoint, family: str) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint(family, TASK_OF.get(family, "sentence-similarity")))


def drawn_shapes(checkpoint: Checkpoint, data: st.DataObject) -> dict[int, LayerShape]:
    """Sizes of their own for each layer of some of the layers, of those that surgery can make."""
    anatomy = anatomy_of(checkpoint.model)
    before = shapes_of(checkpoint.model).layers
    shared = before[0].heads // before[0].key_value_heads
    kept = {index for index in range(len(before)) if data.draw(st.booleans())} | {0}
    same = data.draw(st.integers(1, before[0].key_value_heads))
    shapes = {}
    for index in sorted(kept):
        groups = same if anatomy.relative_bias else data.draw(st.integers(1, before[index].key_value_heads))
        width = data.draw(st.integers(1, before[index].ffn))
        shapes[index] = LayerShape(heads=groups * shared, key_value_heads=groups, ffn=width)
    return shapes


def cut(checkpoint: Checkpoint, shapes: dict[int, LayerShape]) -> Checkpoint:
    heads = [HeadSelection(torch.arange(s.heads), torch.arange(s.key_value_heads)) for s in shapes.values()]
    ffn = [torch.arange(shape.ffn) for shape in shapes.values()]
    return replace(checkpoint, model=select(checkpoint.model, Selection(layers=list(shapes), heads=heads, ffn=ffn)))


@every_family
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parameters_and_flops_are_those_of_the_cut_model(
    family: str, data: st.DataObject, tiny_checkpoint: TinyCheckpoint
) -> None:
    checkpoint = tiny(tiny_checkpoint, family)
    shapes = drawn_shapes(checkpoint, data)
    smaller = cut(checkpoint, shapes)
    assert weight_costs(checkpoint).of(shapes) == smaller.parameters
    sequence, batch = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 2))
    assert flop_costs(checkpoint, sequence, batch).of(shapes) == counted_flops(smaller, sequence, batch)


@every_family
def test_flops_are_counted_on_the_model_as_it_runs(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    """Nothing is missing from the count: it is at least what the matrices inside the layers make of every token."""
    checkpoint = tiny(tiny_checkpoint, family)
    before = checkpoint.model.config._attn_implementation
    linear = sum(module.weight.numel() for _, module in anatomy_of(checkpoint.model).linear_layers(checkpoint.model))
    layers, heads, head_size, tokens = 2, 4, 8, 16
    products = 2 * tokens * linear + layers * 4 * heads * tokens**2 * head_size
    costs = flop_costs(checkpoint, tokens)
    whole = dict(enumerate(shapes_of(checkpoint.model).layers))
    assert costs.of(whole) - costs.rest == products
    assert costs.rest >= 0
    assert checkpoint.model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["bert", "mpnet", "llama"])
def test_bytes_are_the_weights_as_they_are_stored(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = tiny(tiny_checkpoint, family)
    whole = dict(enumerate(shapes_of(checkpoint.model).layers))
    tensors = list(checkpoint.module.parameters())
    expected = sum(tensor.numel() * (1 if tensor.dim() > 1 else 4) for tensor in tensors)
    assert weight_costs(checkpoint, Storage(matrix=1, vector=4)).of(whole) == expected
    assert weight_costs(checkpoint, Storage(2, 2)).of(whole) == 2 * checkpoint.parameters


def test_costs_in_other_units_are_in_proportion(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = tiny(tiny_checkpoint, "mpnet")
    costs = weight_costs(checkpoint)
    shapes = {1: LayerShape(heads=2, key_value_heads=2, ffn=24)}
    assert costs.in_units_of(1e3).of(shapes) == pytest.approx(costs.of(shapes) / 1e3, rel=1e-12)
