"""Sizes that differ by layer, or that a configuration has no words for: kept in `config.json` under one key, `limbeck`.

A configuration of transformers has one number of heads and one feed-forward width for all layers, and in most families
the size of a head is the width divided by the heads. What a model of other sizes needs beside it is

    "limbeck": {"head_size": 32, "layers": [{"heads": 8, "key_value_heads": 8, "ffn": 512}, ...]}

and a class that gives its layers these sizes when it is built: `class_for`. Where a configuration can say the sizes,
nothing is added, and plain `from_pretrained` loads the model.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, UsageError
from .anatomy import Anatomy, anatomy_of, in_features, out_features

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KEY = "limbeck"
_LARGEST = 2**20
"""No layer is wider than this: a folder from elsewhere must not make us allocate what it likes."""


class LayerShape(BaseModel):
    """What one layer has of what pruning takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: int = Field(ge=1, le=_LARGEST)
    key_value_heads: int = Field(ge=1, le=_LARGEST)
    ffn: int = Field(ge=1, le=_LARGEST)
    """Feed-forward channels."""


class Shapes(BaseModel):
    """The sizes of all layers, as they stand in `config.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    head_size: int = Field(ge=1, le=_LARGEST)
    """Channels of a head, in every layer."""
    layers: list[LayerShape] = Field(min_length=1)


def shapes_of(model: PreTrainedModel) -> Shapes:
    """The sizes that a model has, read off its matrices.

    Raises:
        InputError: an architecture that is not in the anatomy table.
    """
    anatomy = anatomy_of(model)
    size = anatomy.head_size_of(model)
    layers = [
        LayerShape(
            heads=anatomy.heads_of(layer, size),
            key_value_heads=anatomy.key_value_heads_of(layer, size),
            ffn=block.width,
        )
        for layer, block in zip(anatomy.layers(model), anatomy.ffn(model), strict=True)
    ]
    return Shapes(head_size=size, layers=layers)


def uniform_shapes_of(model: PreTrainedModel) -> LayerShape:
    """The sizes that all layers of a model have.

    Raises:
        UsageError: they differ by layer.
    """
    shapes = shapes_of(model)
    if any(layer != shapes.layers[0] for layer in shapes.layers):
        raise UsageError(
            f"The layers of this {model.config.model_type} differ in size, so no one size can be cut from all of them.",
            "Draw whole layers only, or start from the model before it was pruned.",
        )
    return shapes.layers[0]


def describe(config: PretrainedConfig, shapes: Shapes, anatomy: Anatomy) -> None:
    """Let a configuration say these sizes, in its own words where it has them and under `KEY` where not."""
    first = shapes.layers[0]
    if hasattr(config, KEY):
        delattr(config, KEY)
    setattr(config, anatomy.ffn_width, first.ffn)
    width, heads, groups = int(config.hidden_size), first.heads, first.key_value_heads
    own_size = anatomy.head_size is not None
    fits = width % heads == 0 if own_size else width == heads * shapes.head_size
    if not fits:  # classes insist on heads that divide the width; how many there really are, the key says
        heads = _divisor(width, heads)
        groups = math.gcd(heads, groups)
    setattr(config, anatomy.heads, heads)
    if anatomy.key_value_heads is not None:
        setattr(config, anatomy.key_value_heads, groups)
    if anatomy.head_size is not None:
        setattr(config, anatomy.head_size, shapes.head_size)
    if not fits or any(layer != first for layer in shapes.layers):
        setattr(config, KEY, shapes.model_dump())
        if anatomy.rotary and not own_size:
            config.head_dim = shapes.head_size  # ModernBERT's rotary embedding asks for it


def _divisor(width: int, most: int) -> int:
    return next(count for count in range(most, 0, -1) if width % count == 0)


def class_for(model_class: type[PreTrainedModel], config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that builds a model of this configuration: the one given, or one of the same name whose layers get the
    sizes under `KEY`."""
    if not hasattr(config, KEY) or issubclass(model_class, _Shaped):
        return model_class
    return _shaped(model_class)  # type: ignore[arg-type]  # classes can be hashed


class _Shaped:
    """Marks the classes that `_shaped` makes."""


@functools.cache
def _shaped(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def build(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        _give_shapes(self, _read(config))

    # Of the same name: `save_pretrained` writes it into config.json.
    names = {"__init__": build, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class, _Shaped), names)


def _read(config: PretrainedConfig) -> Shapes | None:
    """The sizes under `KEY`; `None` for a model whose configuration says all.

    Raises:
        InputError: they are not what limbeck writes, or not of this model's layers.
    """
    if not hasattr(config, KEY):
        return None
    try:
        shapes = Shapes.model_validate(getattr(config, KEY))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join([KEY, *map(str, problem["loc"])])
        raise InputError(f"config.json says what limbeck did not write: {where}: {problem['msg'].lower()}.") from error
    if len(shapes.layers) != config.num_hidden_layers:
        raise InputError(
            f"config.json has sizes for {len(shapes.layers)} layers under {KEY}, and {config.num_hidden_layers} layers."
        )
    if any(layer.heads % layer.key_value_heads for layer in shapes.layers):
        raise InputError(f"config.json has heads under {KEY} that its key-value heads cannot share evenly.")
    return shapes


def _give_shapes(model: PreTrainedModel, shapes: Shapes | None) -> None:
    """Replace the matrices of every layer by ones of these sizes, with new weights."""
    if shapes is None:
        return
    anatomy = anatomy_of(model)
    for layer, shape in zip(anatomy.layers(model), shapes.layers, strict=True):
        inner, groups = shape.heads * shapes.head_size, shape.key_value_heads * shapes.head_size
        if anatomy.qkv is not None:
            _resize(layer, anatomy.qkv, outputs=3 * inner)
        for name, outputs in ((anatomy.query, inner), (anatomy.key, groups), (anatomy.value, groups)):
            if name is not None:
                _resize(layer, name, outputs=outputs)
        _resize(layer, anatomy.output, inputs=inner)
        _resize(layer, anatomy.up, outputs=2 * shape.ffn if anatomy.fused_gate else shape.ffn)
        if anatomy.gate is not None:
            _resize(layer, anatomy.gate, outputs=shape.ffn)
        _resize(layer, anatomy.down, inputs=shape.ffn)
        _tell_attention(layer.get_submodule(anatomy.attention), shape, shapes.head_size)
    if anatomy.relative_bias is not None:
        table: Any = model.base_model.get_submodule(anatomy.relative_bias)
        heads = {layer.heads for layer in shapes.layers}
        if len(heads) != 1:
            raise InputError(f"The layers of a {model.config.model_type} share a position bias for each head, and "
                             f"config.json has layers of {sorted(heads)} heads.")  # fmt: skip
        model.base_model.set_submodule(anatomy.relative_bias, nn.Embedding(table.num_embeddings, heads.pop()))


def _resize(layer: nn.Module, name: str, inputs: int | None = None, outputs: int | None = None) -> None:
    old: Any = layer.get_submodule(name)
    rows, columns = outputs or out_features(old), inputs or in_features(old)
    if isinstance(old, Conv1D):
        layer.set_submodule(name, Conv1D(rows, columns))  # type: ignore[no-untyped-call]
    else:
        layer.set_submodule(name, nn.Linear(columns, rows, bias=old.bias is not None))


def _tell_attention(attention: Any, shape: LayerShape, size: int) -> None:
    """The numbers that families' attention modules keep beside their matrices. Reshapes infer the number of heads from
    the size of one in all of them; the scale, the splits of a fused matrix and the sharing of keys are kept."""
    names = {
        "attention_head_size": size,
        "head_dim": size,
        "num_attention_heads": shape.heads,
        "num_heads": shape.heads,
        "n_heads": shape.heads,
        "all_head_size": shape.heads * size,
        "split_size": shape.heads * size,
        "num_key_value_groups": shape.heads // shape.key_value_heads,
    }
    before = int(getattr(attention, "attention_head_size", 0) or getattr(attention, "head_dim", size))
    for name, value in names.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
    if hasattr(attention, "scaling") and getattr(attention, "scale_attn_weights", True):
        attention.scaling *= (before / size) ** 0.5  # GPT-2's holds more than the size: the layer's place
