"""Factors on a model's parts while it runs: 1 leaves a part as it is, 0 is as if it had been cut out by `surgery`.

The gradient with respect to a gate says to first order what the part is worth (`importance/gradients.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .anatomy import Anatomy, Linear, anatomy_of, out_features

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Hook = Callable[..., Any]


@dataclass(frozen=True)
class Gates:
    """Factors by the number of the layer, floating point, [units] for all examples or [batch, units] for each its own.
    What is not named runs as it is."""

    heads: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """On what each head gives to the output projection."""
    ffn: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """On each feed-forward channel, as it enters the down projection."""
    layers: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """[] or [batch], on what the layer adds: `x + gate * (layer(x) - x)`."""
    width: torch.Tensor | None = None
    """On each channel of the residual stream wherever a norm reads it; a channel's share in the norms' mean and
    variance is its gate too. The same on what the task's head and pooler make of as many channels."""


@contextmanager
def gated(model: PreTrainedModel, gates: Gates) -> Iterator[None]:
    """Let the model run with these gates inside the block, whatever module it is called through. The batch must come
    first in what it computes (all 13 families do so), and it is computed in the model's type.

    Raises:
        InputError: an architecture that is not in the anatomy table.
    """
    anatomy = anatomy_of(model)
    layers = anatomy.layers(model)
    with ExitStack() as hooks:

        def after(module: nn.Module, hook: _Hook) -> None:
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

        for place, parts in ((anatomy.output, gates.heads), (anatomy.down, gates.ffn)):
            for index, gate in parts.items():
                hooks.callback(layers[index].get_submodule(place).register_forward_pre_hook(_on_input(gate)).remove)
        for index, gate in gates.layers.items():
            after(layers[index], _on_layer(gate))
        if gates.width is not None:
            for norm in residual_norms(model, model):
                after(norm, _on_norm(norm, gates.width))
            for linear in _linear_outside_layers(model, anatomy):
                after(linear, _on_output(gates.width))
        yield


def residual_norms(model: PreTrainedModel, within: nn.Module) -> list[Any]:
    """Every norm over the residual stream's channels inside `within`: the model, or its `base_model` without the task's
    head. The norms inside heads are none of them."""
    width = int(model.config.hidden_size)
    return [
        module
        for name, module in within.named_modules()
        if "norm" in type(module).__name__.lower()
        and not name.endswith((".q_norm", ".k_norm"))
        and getattr(module, "weight", torch.empty(0)).shape == (width,)
    ]


def _linear_outside_layers(model: PreTrainedModel, anatomy: Anatomy) -> list[Linear]:
    """What gives the residual stream's channels beside the layers: ELECTRA's projection after the embeddings, poolers
    and the dense parts of heads, which surgery cuts by the same channels. (Logits of as many labels are left alone.)"""
    width = int(model.config.hidden_size)
    inside = set(anatomy.layers(model).modules())
    return [
        module
        for module in model.modules()
        if isinstance(module, Linear)
        and module not in inside
        and out_features(module) == width != getattr(model.config, "num_labels", 0)
    ]


def _over(gate: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A gate [units] or [batch, units] in the shape and on the device of values [batch, ..., units]."""
    if gate.dim() == 2:
        gate = gate.view(len(gate), *(1 for _ in range(values.dim() - 2)), -1)
    return gate.to(values.device)


def _on_input(gate: torch.Tensor) -> _Hook:
    """A gate for each channel, or for each run of channels where there are fewer gates (heads)."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        values = args[0]
        each = values.shape[-1] // max(gate.shape[-1], 1)
        return (values * _over(gate.repeat_interleave(each, dim=-1), values).to(values.dtype), *args[1:])

    return hook


def _on_output(gate: torch.Tensor) -> _Hook:
    return lambda _, args, kwargs, output: output * _over(gate, output).to(output.dtype)


def _on_layer(gate: torch.Tensor) -> _Hook:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, torch.Tensor) else output[0]
        factor = gate.to(after.device, after.dtype).view(-1, *(1 for _ in range(after.dim() - 1)))
        after = torch.lerp(before, after, factor)  # exact at both ends
        return after if isinstance(output, torch.Tensor) else (after, *output[1:])

    return hook


def _on_norm(norm: Any, gate: torch.Tensor) -> _Hook:
    """The norm anew, with statistics over what the gates let in."""
    centred = isinstance(norm, nn.LayerNorm)
    epsilon = norm.eps if centred else norm.variance_epsilon

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        values = args[0] if args else kwargs["hidden_states"]
        values = values.to(torch.promote_types(values.dtype, torch.float32))  # as norms themselves do
        factor = _over(gate, values).to(values.dtype)
        share = factor / factor.sum(dim=-1, keepdim=True)
        if centred:
            values = values - (share * values).sum(dim=-1, keepdim=True)
        values = values * torch.rsqrt((share * values.square()).sum(dim=-1, keepdim=True) + epsilon) * norm.weight
        if getattr(norm, "bias", None) is not None:
            values = values + norm.bias
        result: torch.Tensor = (values * factor).to(output.dtype)
        return result

    return hook
