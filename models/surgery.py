"""Taking parts of a model: layers, attention heads, feed-forward channels, channels of the residual stream.

What comes out is a new model of the same class. Nothing is masked: matrices get smaller. Where its configuration can
say the new sizes plain `from_pretrained` loads it; where it cannot (see `shapes.py`), `load_checkpoint` does.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, UsageError
from .anatomy import Anatomy, anatomy_of
from .shapes import LayerShape, Shapes, class_for, describe, shapes_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_Cuts = dict[str, dict[int, torch.Tensor]]
"""Name of a parameter to axis to the indices that stay of it."""


@dataclass(frozen=True)
class HeadSelection:
    """What stays of one layer's attention."""

    query: torch.Tensor
    """Which heads, int64 [heads], ascending."""
    key_value: torch.Tensor
    """Which key-value heads, int64 [groups], ascending; the same as `query` where heads share none. Each must keep as
    many query heads as the others."""
    score_channels: torch.Tensor | None = None
    """Which channels of the queries and keys, int64 [heads, head size], one row for each head that stays; all when not
    given. Only where positions are not rotated in: a rotation's speed goes with the channel's place."""
    value_channels: torch.Tensor | None = None
    """The same for the values."""


@dataclass(frozen=True)
class Selection:
    """What stays of a model; `None` stands for everything. Lists have one entry for each layer that stays, in order;
    their entries may differ in length."""

    layers: Sequence[int] | None = None
    """Which layers, from 0, each once, in order."""
    channels: torch.Tensor | None = None
    """Which channels of the residual stream, int64 [width], ascending. The norms then take their mean and variance
    over these only."""
    heads: Sequence[HeadSelection] | None = None
    ffn: Sequence[torch.Tensor] | None = None
    """Which feed-forward channels, int64 [channels] a layer, ascending."""


def strongest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The positions of the `count` highest scores [width], ascending, int64; of equal scores the first ones."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


@torch.no_grad()
def select(model: PreTrainedModel, selection: Selection) -> PreTrainedModel:
    """A new model that has only these parts, with copies of their weights, in evaluation mode; the model itself is left
    as it was. Parts that contributed nothing can go without a change of the outputs, with one exception: a norm takes
    its statistics over the channels that it still sees.

    Where heads get narrower, queries are scaled by `sqrt(new size / old size)`, because attention divides its scores by
    the square root of the head size.

    Raises:
        UsageError: layers that are not there, twice or out of order, or parts that cannot be without each other.
        InputError: an architecture that is not in the anatomy table.
    """
    anatomy = anatomy_of(model)
    layers = _checked_layers(model, anatomy, selection.layers)
    smaller = _empty(model, _config_of(model, anatomy, layers, selection))
    state = _state_of_layers(model, anatomy, layers)
    target = smaller.state_dict()
    if state.keys() != target.keys():  # ModernBERT's first layer alone has no attention norm
        raise UsageError(
            f"The layers {layers} cannot be drawn: layer 0 of a {model.config.model_type} is unlike the others, so it "
            "must be the first."
        )
    cuts = _cuts_of(model, anatomy, selection, layers)
    width = int(model.config.hidden_size)
    for name, tensor in state.items():
        for axis, kept in cuts[name].items():
            tensor = tensor.index_select(axis, kept.to(tensor.device))
        for axis, size in enumerate(target[name].shape):
            if tensor.shape[axis] == size:
                continue
            # What still differs follows the residual stream: the class itself says so by building it smaller.
            if selection.channels is None or tensor.shape[axis] != width:
                raise InputError(
                    f"{name} of a {model.config.model_type} model cannot be cut to {list(target[name].shape)}."
                )
            tensor = tensor.index_select(axis, selection.channels.to(tensor.device))
        state[name] = tensor
    smaller.load_state_dict(state)
    _rescale_queries(model, smaller, anatomy, layers)
    return smaller.eval()


def _checked_layers(model: PreTrainedModel, anatomy: Anatomy, layers: Sequence[int] | None) -> list[int]:
    depth = len(anatomy.layers(model))
    if layers is None:
        return list(range(depth))
    chosen = list(layers)
    if not chosen or chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise UsageError(
            f"The layers {chosen} cannot be drawn: name layers between 0 and {depth - 1}, each once, in order."
        )
    return chosen


def _config_of(model: PreTrainedModel, anatomy: Anatomy, layers: list[int], selection: Selection) -> PretrainedConfig:
    """The configuration with the sizes of what stays."""
    config = copy.deepcopy(model.config)
    if len(layers) != len(anatomy.layers(model)):
        setattr(config, anatomy.layer_count, len(layers))
        if getattr(config, "layer_types", None):  # families that alternate kinds of attention
            config.layer_types = [config.layer_types[index] for index in layers]
    if selection.channels is not None:
        _set_width(config, len(selection.channels))
    describe(config, _shapes_after(shapes_of(model), layers, selection), anatomy)
    return config


def _shapes_after(before: Shapes, layers: list[int], selection: Selection) -> Shapes:
    """The sizes of what stays, layer by layer."""
    kept = [before.layers[index] for index in layers]
    if selection.ffn is not None:
        pairs = zip(kept, selection.ffn, strict=True)
        kept = [shape.model_copy(update={"ffn": len(channels)}) for shape, channels in pairs]
    size = before.head_size
    if selection.heads is not None:
        pairs_of_heads = zip(kept, selection.heads, strict=True)
        kept = [
            LayerShape(heads=len(heads.query), key_value_heads=len(heads.key_value), ffn=shape.ffn)
            for shape, heads in pairs_of_heads
        ]
        sizes = {heads.score_channels.shape[1] for heads in selection.heads if heads.score_channels is not None}
        if len(sizes) > 1:
            raise UsageError(f"Heads have to be of one size in every layer; asked for were {sorted(sizes)} channels.")
        size = sizes.pop() if sizes else size
    return Shapes(head_size=size, layers=kept)


def _set_width(config: PretrainedConfig, width: int) -> None:
    if getattr(config, "embedding_size", None) is not None:  # ELECTRA projects only where the two differ
        if config.embedding_size == config.hidden_size:
            config.embedding_size = width
        elif config.embedding_size == width:
            raise UsageError(
                f"A {config.model_type} of width {width}, the width of its embeddings, has no projection after them, "
                "and the teacher's cannot be left out.",
                "Choose another hidden_size.",
            )
    config.hidden_size = width


def _empty(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class, device and type with that configuration; its weights mean nothing yet."""
    try:
        getattr(config, "validate", lambda: None)()
    except Exception as error:  # whatever kind the installed huggingface_hub raises, around the reason
        reason = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        raise UsageError(f"transformers refuses these sizes: {reason}") from error
    with torch.random.fork_rng():  # what it draws is overwritten: nobody's random numbers move
        smaller: PreTrainedModel = class_for(type(model), config)(config)
    if getattr(model, "pooler", None) is None and getattr(smaller, "pooler", None) is not None:
        setattr(smaller, "pooler", None)  # noqa: B010  # mypy knows modules and tensors only
    if getattr(model, "generation_config", None) is not None:
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(device=model.device, dtype=model.dtype)


def _state_of_layers(model: PreTrainedModel, anatomy: Anatomy, layers: list[int]) -> dict[str, torch.Tensor]:
    """The model's weights without those of other layers, under the names that they have once these layers are gone."""
    pattern = re.compile(rf"({re.escape(anatomy.layers_name(model))}\.)(\d+)(\..*)")
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        match = pattern.match(name)
        if match is None:
            state[name] = tensor
        elif int(match[2]) in layers:
            state[f"{match[1]}{layers.index(int(match[2]))}{match[3]}"] = tensor
    return state


def _cuts_of(model: PreTrainedModel, anatomy: Anatomy, selection: Selection, layers: list[int]) -> _Cuts:
    """What to cut along the axes that do not follow the residual stream."""
    cuts: _Cuts = defaultdict(dict)
    shapes = shapes_of(model)
    for index, source in enumerate(layers):
        prefix, shape = f"{anatomy.layers_name(model)}.{index}.", shapes.layers[source]
        if selection.ffn is not None:
            _cut_ffn(cuts, anatomy, prefix, selection.ffn[index], shape.ffn)
        if selection.heads is not None:
            _check_groups(selection.heads[index], shape)
            _cut_heads(cuts, anatomy, prefix, selection.heads[index], (shape.heads, shapes.head_size))
    if selection.heads is not None and anatomy.relative_bias is not None:
        kept = selection.heads[0].query
        if any(not torch.equal(kept, other.query) for other in selection.heads):
            raise UsageError(
                f"The layers of a {model.config.model_type} share a position bias for each head, so they must keep the "
                "same heads."
            )
        cuts[f"{anatomy.prefix(model)}{anatomy.relative_bias}.weight"][1] = kept
    return cuts


def _cut_ffn(cuts: _Cuts, anatomy: Anatomy, prefix: str, kept: torch.Tensor, width: int) -> None:
    # A fused matrix holds the gate's channels, then the up projection's: the same ones go from both halves.
    _cut_outputs(cuts, anatomy, prefix + anatomy.up, torch.cat([kept, kept + width]) if anatomy.fused_gate else kept)
    if anatomy.gate is not None:
        _cut_outputs(cuts, anatomy, prefix + anatomy.gate, kept)
    _cut_inputs(cuts, anatomy, prefix + anatomy.down, kept)


def _cut_heads(cuts: _Cuts, anatomy: Anatomy, prefix: str, kept: HeadSelection, before: tuple[int, int]) -> None:
    """`before`: how many heads the layer had, and their size."""
    size, inner = before[1], before[0] * before[1]
    query = _channels_of(kept.query, kept.score_channels, size)
    key = _channels_of(kept.key_value, kept.score_channels, size)
    value = _channels_of(kept.key_value, kept.value_channels, size)
    if anatomy.qkv is not None:
        _cut_outputs(cuts, anatomy, prefix + anatomy.qkv, torch.cat([query, key + inner, value + 2 * inner]))
    else:
        for name, rows in ((anatomy.query, query), (anatomy.key, key), (anatomy.value, value)):
            _cut_outputs(cuts, anatomy, f"{prefix}{name}", rows)
    _cut_inputs(cuts, anatomy, prefix + anatomy.output, _channels_of(kept.query, kept.value_channels, size))


def _check_groups(kept: HeadSelection, shape: LayerShape) -> None:
    """Refuse heads whose keys and values would be another group's once the groups are counted anew."""
    shared = shape.heads // shape.key_value_heads
    into = torch.repeat_interleave(kept.key_value, len(kept.query) // max(len(kept.key_value), 1))
    if not torch.equal(kept.query // shared, into):
        raise UsageError(
            f"The heads {kept.query.tolist()} cannot keep the key-value heads {kept.key_value.tolist()}: {shared} "
            "heads in a row share one, and every one that stays must keep as many heads as the others."
        )


def _channels_of(heads: torch.Tensor, channels: torch.Tensor | None, size: int) -> torch.Tensor:
    """Rows of a projection that belong to these heads, int64 [heads * channels]."""
    within = torch.arange(size).expand(len(heads), size) if channels is None else channels
    return (heads.unsqueeze(1) * size + within).flatten()


def _cut_outputs(cuts: _Cuts, anatomy: Anatomy, module: str, kept: torch.Tensor) -> None:
    cuts[f"{module}.weight"][1 if anatomy.transposed else 0] = kept
    cuts[f"{module}.bias"][0] = kept


def _cut_inputs(cuts: _Cuts, anatomy: Anatomy, module: str, kept: torch.Tensor) -> None:
    cuts[f"{module}.weight"][0 if anatomy.transposed else 1] = kept


def _rescale_queries(model: PreTrainedModel, smaller: PreTrainedModel, anatomy: Anatomy, layers: list[int]) -> None:
    """Let attention scores be what they were although the model now divides them by another number."""
    size, before = anatomy.head_size_of(smaller), anatomy.head_size_of(model)
    by_size = 1.0 if getattr(model.config, "scale_attn_weights", True) is False else (size / before) ** 0.5
    by_place = bool(getattr(model.config, "scale_attn_by_inverse_layer_idx", False))  # a GPT-2 that divides by it
    for index, source in enumerate(layers):
        factor = by_size * ((index + 1) / (source + 1) if by_place else 1.0)
        if factor == 1.0:
            continue
        name = anatomy.query or anatomy.qkv or ""
        module: Any = anatomy.layers(smaller)[index].get_submodule(name)
        rows = size * anatomy.heads_of(anatomy.layers(smaller)[index], size)
        (module.weight[:, :rows] if anatomy.transposed else module.weight[:rows]).mul_(factor)
        if module.bias is not None:
            module.bias[:rows].mul_(factor)
