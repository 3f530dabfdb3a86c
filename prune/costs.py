"""What a model of given sizes costs: parameters, bytes and FLOPs, counted from the shapes of its matrices.

Every cost is a sum: of what lies outside the layers, of a layer with nothing in it (norms, output biases), of its
heads, and of its feed-forward channels. Measured latency takes the same form (`recipes/latency_table.py`), so that one
search serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..models.anatomy import Anatomy, anatomy_of, in_features
from ..models.checkpoint import Checkpoint
from ..models.features import showing_attention
from ..models.shapes import LayerShape, shapes_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Curve = Callable[[int], float]
"""A number of heads or channels of one layer -> what they cost."""


@dataclass(frozen=True)
class LayerCosts:
    """What one layer costs."""

    base: float
    """With no head and no channel."""
    heads: Curve
    """Of so many heads, with the key-value heads that belong to them."""
    ffn: Curve

    def of(self, shape: LayerShape) -> float:
        """The layer at that size."""
        return self.base + self.heads(shape.heads) + self.ffn(shape.ffn)

    def in_units_of(self, unit: float) -> LayerCosts:
        """The same divided by `unit`."""
        heads, ffn = self.heads, self.ffn
        return LayerCosts(self.base / unit, lambda count: heads(count) / unit, lambda count: ffn(count) / unit)


@dataclass(frozen=True)
class Costs:
    """What a model costs, in one unit."""

    rest: float
    """Everything outside the layers."""
    layers: tuple[LayerCosts, ...]
    shared_head: float = 0.0
    """Of one head, outside the layers: MPNet's layers share a table of position biases with a column a head."""

    def of(self, shapes: Mapping[int, LayerShape]) -> float:
        """The model with these layers (by their number) at these sizes."""
        shared = self.shared_head * max((shape.heads for shape in shapes.values()), default=0)
        return self.rest + shared + sum(self.layers[index].of(shape) for index, shape in shapes.items())

    def only(self, layers: Sequence[int]) -> Costs:
        """The costs of a model that has lost the other layers."""
        return replace(self, layers=tuple(self.layers[index] for index in layers))

    def in_units_of(self, unit: float) -> Costs:
        """The same divided by `unit`."""
        return Costs(self.rest / unit, tuple(layer.in_units_of(unit) for layer in self.layers), self.shared_head / unit)


@dataclass(frozen=True)
class Storage:
    """Bytes of one weight. With both at 1, bytes are parameters."""

    matrix: float
    vector: float
    """In biases and norms."""


PARAMETERS = Storage(1, 1)


@dataclass(frozen=True)
class _Weights:
    """Numbers of weights in matrices and in vectors."""

    matrix: int = 0
    vector: int = 0

    def __add__(self, other: _Weights) -> _Weights:
        return _Weights(self.matrix + other.matrix, self.vector + other.vector)

    def __sub__(self, other: _Weights) -> _Weights:
        return self + -1 * other

    def __rmul__(self, times: int) -> _Weights:
        return _Weights(times * self.matrix, times * self.vector)

    def stored(self, storage: Storage) -> float:
        return self.matrix * storage.matrix + self.vector * storage.vector


def weight_costs(checkpoint: Checkpoint, storage: Storage = PARAMETERS) -> Costs:
    """What the weights take, exactly: the module's parameters, tied ones counted once, each with its bytes in storage.

    Raises:
        InputError: an architecture that is not in the anatomy table.
    """
    model = checkpoint.model
    anatomy = anatomy_of(model)
    shapes = shapes_of(model)
    layers, inside = [], _Weights()
    for layer, shape in zip(anatomy.layers(model), shapes.layers, strict=True):
        shared = shape.heads // shape.key_value_heads
        group, channel = _of_group(anatomy, layer, shared, shapes.head_size), _of_channel(anatomy, layer)
        whole = _count(layer.parameters())
        inside = inside + whole
        base = whole - shape.key_value_heads * group - shape.ffn * channel
        heads = _linear(group.stored(storage) / shared)
        layers.append(LayerCosts(base.stored(storage), heads, _linear(channel.stored(storage))))
    column = _of_bias_column(model, anatomy)
    rest = _count(checkpoint.module.parameters()) - inside - shapes.layers[0].heads * column
    return Costs(rest.stored(storage), tuple(layers), column.stored(storage))


@torch.no_grad()
def flop_costs(checkpoint: Checkpoint, sequence: int, batch: int = 1) -> Costs:
    """Floating-point operations of one call on [batch, sequence] tokens: a multiplication and an addition of a matrix
    product count as two, everything else (biases, norms, softmax, activations) as nothing, which is how
    `torch.utils.flop_counter` counts. What lies outside the layers is counted in one run of the model.

    Raises:
        InputError: an architecture that is not in the anatomy table.
    """
    model = checkpoint.model
    anatomy = anatomy_of(model)
    shapes = shapes_of(model)
    tokens, layers = batch * sequence, []
    for layer, shape in zip(anatomy.layers(model), shapes.layers, strict=True):
        shared = shape.heads // shape.key_value_heads
        # Scores and the sum of values: sequence x sequence products over the head size, both for each query head.
        attention = 4 * batch * sequence**2 * shapes.head_size
        per_head = 2 * tokens * _of_group(anatomy, layer, shared, shapes.head_size).matrix / shared + attention
        layers.append(LayerCosts(0.0, _linear(per_head), _linear(2 * tokens * _of_channel(anatomy, layer).matrix)))
    inside = sum(costs.of(shape) for costs, shape in zip(layers, shapes.layers, strict=True))
    return Costs(counted_flops(checkpoint, sequence, batch) - inside, tuple(layers))


def counted_flops(checkpoint: Checkpoint, sequence: int, batch: int = 1) -> int:
    """FLOPs of one call on [batch, sequence] tokens, as torch counts them while the model runs.

    Attention is written out for it: torch has no count for the fused kernel of the CPU.
    """
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    named = {"attention_mask": torch.ones_like(ids)}
    with showing_attention(checkpoint.model), FlopCounterMode(display=False) as counter:
        checkpoint.run({name: named.get(name, ids) for name in checkpoint.input_names})
    return int(counter.get_total_flops())


def _linear(slope: float) -> Curve:
    return lambda count: slope * count


def _of_group(anatomy: Anatomy, layer: nn.Module, shared: int, size: int) -> _Weights:
    """Weights of one key-value head and of the `shared` query heads that read it."""
    if anatomy.qkv is not None:
        into = 3 * _of_outputs(layer, anatomy.qkv)
    else:
        query, key, value = (_of_outputs(layer, str(name)) for name in (anatomy.query, anatomy.key, anatomy.value))
        into = shared * query + key + value
    return size * (into + shared * _of_inputs(layer, anatomy.output))


def _of_channel(anatomy: Anatomy, layer: nn.Module) -> _Weights:
    """Weights of one feed-forward channel."""
    up = (2 if anatomy.fused_gate else 1) * _of_outputs(layer, anatomy.up)
    gate = _of_outputs(layer, anatomy.gate) if anatomy.gate is not None else _Weights()
    return up + gate + _of_inputs(layer, anatomy.down)


def _of_outputs(layer: nn.Module, name: str) -> _Weights:
    """Weights that belong to one output of a linear layer."""
    module = layer.get_submodule(name)
    return _Weights(in_features(module), 0 if module.bias is None else 1)  # type: ignore[arg-type]


def _of_inputs(layer: nn.Module, name: str) -> _Weights:
    """Weights that belong to one input of a linear layer."""
    module = layer.get_submodule(name)
    return _Weights(module.weight.numel() // in_features(module))  # type: ignore[arg-type, operator]


def _of_bias_column(model: PreTrainedModel, anatomy: Anatomy) -> _Weights:
    """Weights that a head has in the table that all layers share."""
    if anatomy.relative_bias is None:
        return _Weights()
    return _Weights(model.base_model.get_parameter(f"{anatomy.relative_bias}.weight").shape[0])


def _count(parameters: Iterator[torch.Tensor]) -> _Weights:
    total = _Weights()
    for parameter in parameters:
        weights = parameter.numel()
        total = total + (_Weights(matrix=weights) if parameter.dim() > 1 else _Weights(vector=weights))
    return total
