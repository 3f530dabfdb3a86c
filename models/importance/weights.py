"""Reading a model's matrices for scores: float64 on the CPU, whichever way and wherever they are held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..anatomy import FfnBlock, anatomy_of, reduction_axis

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def floats(parameter: Any) -> torch.Tensor:
    """A parameter's values, float64."""
    values: torch.Tensor = parameter.detach().cpu().double()
    return values


def matrix(module: Any) -> torch.Tensor:
    """The weight of a linear layer, [out, in]."""
    weight = floats(module.weight)
    return weight if reduction_axis(module) == 1 else weight.T


def projection(model: PreTrainedModel, layer: int, kind: str) -> torch.Tensor:
    """The matrix that makes a layer's `query`, `key` or `value`, [heads, head size, width]; of keys and values
    [key-value heads, ...]."""
    anatomy = anatomy_of(model)
    name = anatomy.qkv or {"query": anatomy.query, "key": anatomy.key, "value": anatomy.value}[kind]
    weight = matrix(anatomy.layers(model)[layer].get_submodule(str(name)))
    if anatomy.qkv is not None:
        weight = weight.chunk(3)[("query", "key", "value").index(kind)]
    return weight.reshape(-1, anatomy.head_size_of(model), weight.shape[1])


def output_projection(model: PreTrainedModel, layer: int) -> torch.Tensor:
    """The matrix through which a layer's heads write, [width, heads, head size]."""
    anatomy = anatomy_of(model)
    weight = matrix(anatomy.layers(model)[layer].get_submodule(anatomy.output))
    return weight.reshape(len(weight), -1, anatomy.head_size_of(model))


def written_squares(block: FfnBlock) -> torch.Tensor:
    """`|down_c|^2` of each feed-forward channel, [channels]."""
    return matrix(block.down).square().sum(dim=0)


def read_squares(block: FfnBlock) -> torch.Tensor:
    """`|up_c|^2 + |gate_c|^2` of each feed-forward channel, [channels]."""
    read = matrix(block.up).square().sum(dim=1)
    if block.fused:
        return read.view(2, block.width).sum(dim=0)
    return read if block.gate is None else read + matrix(block.gate).square().sum(dim=1)
