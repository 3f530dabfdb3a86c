"""Where layers, attention and feed-forward blocks live in each architecture family: one table, and what reads it.

A family's names are relative to a layer, so that one entry serves every layer and every head on top. They were checked
against the modeling files of transformers 5.23; `tests/models/test_anatomy.py` checks them against the installed ones.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Linear = nn.Linear | Conv1D
"""A matrix product with an optional bias: `nn.Linear` holds its weight as [out, in], GPT-2's `Conv1D` as [in, out]."""


def reduction_axis(module: Linear) -> int:
    """The axis of the weight that is summed over: 1 for `nn.Linear` [out, in], 0 for `Conv1D` [in, out]."""
    return 0 if isinstance(module, Conv1D) else 1


def in_features(module: Linear) -> int:
    """Channels that go in."""
    return int(module.weight.shape[reduction_axis(module)])


def out_features(module: Linear) -> int:
    """Channels that come out."""
    return int(module.weight.shape[1 - reduction_axis(module)])


@dataclass(frozen=True)
class FfnBlock:
    """One layer's feed-forward block: `down(act(up(x)))`, or `down(act(gate(x)) * up(x))` where it is gated.

    With `fused` one matrix computes both halves: its first `width` output channels are the gate (they go through the
    activation), the next `width` are the up projection; `up` is that matrix and `gate` is `None`.
    """

    layer: str
    """The layer's name in the model; `up_name`, `gate_name` and `down_name` are qualified likewise."""
    up: Linear
    up_name: str
    down: Linear
    down_name: str
    gate: Linear | None = None
    gate_name: str | None = None
    fused: bool = False

    @property
    def width(self) -> int:
        """Intermediate channels."""
        return in_features(self.down)


@dataclass(frozen=True)
class Anatomy:
    """One architecture family. Names of modules are relative to a layer, `layer_list` to the model without its head."""

    family: str
    layer_list: str
    up: str
    """The up projection; where `fused_gate` is set, the matrix that computes gate and up together."""
    down: str
    output: str
    """The attention's output projection."""
    norms: tuple[str, ...]
    gate: str | None = None
    fused_gate: bool = False
    query: str | None = None
    key: str | None = None
    value: str | None = None
    qkv: str | None = None
    """One matrix for query, key and value, in families that fuse them; the three are `None` then."""
    transposed: bool = False
    """Weights are [in, out] (`Conv1D`) instead of [out, in]."""
    layer_count: str = "num_hidden_layers"
    """The configuration's name for the number of layers; `heads` and `ffn_width` likewise."""
    heads: str = "num_attention_heads"
    ffn_width: str = "intermediate_size"
    key_value_heads: str | None = None
    """The configuration's name for the number of key-value heads, in families where several heads may share one."""
    head_size: str | None = None
    """The configuration's name for the channels of a head; without one it is width / heads."""
    rotary: bool = False
    """Positions are rotated into queries and keys, each channel at the speed of its place in the head."""
    relative_bias: str | None = None
    """The table [distances, heads] that adds to all layers' attention scores, named as `layer_list` is."""

    @property
    def attention(self) -> str:
        """The module that computes attention: it holds the query's projection."""
        return (self.query or self.qkv or "").rpartition(".")[0]

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The list of layers itself, of a bare model or of one with a head."""
        layers = model.base_model.get_submodule(self.layer_list)
        if not isinstance(layers, nn.ModuleList):
            raise InputError(f"{type(model).__name__} has no list of layers at {self.layer_list}.")
        return layers

    def prefix(self, model: PreTrainedModel) -> str:
        """What stands before the names of the model without its head in the state dict: `bert.`, or nothing."""
        return "" if model.base_model is model else f"{model.base_model_prefix}."

    def layers_name(self, model: PreTrainedModel) -> str:
        """The qualified name of the list of layers, as it stands in the model's state dict."""
        return f"{self.prefix(model)}{self.layer_list}"

    def head_size_of(self, model: PreTrainedModel) -> int:
        """Channels of one attention head; the same in every layer."""
        attention = self.layers(model)[0].get_submodule(self.attention)
        return int(getattr(attention, "attention_head_size", None) or getattr(attention, "head_dim"))  # noqa: B009

    def heads_of(self, layer: nn.Module, size: int) -> int:
        """Query heads of a layer whose heads have `size` channels."""
        return in_features(_linear(layer, self.output)) // size

    def key_value_heads_of(self, layer: nn.Module, size: int) -> int:
        """Key-value heads of a layer; as many as query heads where none are shared."""
        return out_features(_linear(layer, self.key)) // size if self.key else self.heads_of(layer, size)

    def ffn(self, model: PreTrainedModel) -> list[FfnBlock]:
        """The feed-forward block of every layer, first layer first."""
        return [
            self._ffn_of(layer, f"{self.layers_name(model)}.{index}") for index, layer in enumerate(self.layers(model))
        ]

    def _ffn_of(self, layer: nn.Module, name: str) -> FfnBlock:
        return FfnBlock(
            layer=name,
            up=_linear(layer, self.up),
            up_name=f"{name}.{self.up}",
            down=_linear(layer, self.down),
            down_name=f"{name}.{self.down}",
            gate=_linear(layer, self.gate) if self.gate else None,
            gate_name=f"{name}.{self.gate}" if self.gate else None,
            fused=self.fused_gate,
        )

    def linear_layers(self, model: PreTrainedModel) -> Iterator[tuple[str, Linear]]:
        """Every matrix product inside the layers with its qualified name, in the model's order. Embeddings, poolers
        and heads (and with them tied weights) are outside."""
        for name, module in self.layers(model).named_modules(prefix=self.layers_name(model)):
            if isinstance(module, Linear):
                yield name, module


def _linear(layer: nn.Module, name: str) -> Linear:
    module = layer.get_submodule(name)
    if not isinstance(module, Linear):
        raise InputError(f"{name} of a {type(layer).__name__} is a {type(module).__name__}, not a plain linear layer.")
    return module


_BERT = Anatomy(
    family="bert",
    layer_list="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
)
_MPNET = replace(
    _BERT,
    family="mpnet",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    output="attention.attn.o",
    norms=("attention.LayerNorm", "output.LayerNorm"),
    relative_bias="encoder.relative_attention_bias",
)
_DISTILBERT = Anatomy(
    family="distilbert",
    layer_list="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    norms=("sa_layer_norm", "output_layer_norm"),
    ffn_width="hidden_dim",
)
_MODERNBERT = Anatomy(
    family="modernbert",
    layer_list="layers",
    qkv="attn.Wqkv",
    output="attn.Wo",
    up="mlp.Wi",
    down="mlp.Wo",
    norms=("attn_norm", "mlp_norm"),  # the first layer's attn_norm is an identity
    fused_gate=True,
    rotary=True,
)
_GPT2 = Anatomy(
    family="gpt2",
    layer_list="h",
    qkv="attn.c_attn",
    output="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    norms=("ln_1", "ln_2"),
    transposed=True,
    ffn_width="n_inner",  # None in a configuration stands for 4 * n_embd
)
_LLAMA = Anatomy(
    family="llama",
    layer_list="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    up="mlp.up_proj",
    gate="mlp.gate_proj",
    down="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    key_value_heads="num_key_value_heads",
    head_size="head_dim",
    rotary=True,
)
_QWEN3 = replace(_LLAMA, family="qwen3", norms=(*_LLAMA.norms, "self_attn.q_norm", "self_attn.k_norm"))

ANATOMIES: dict[str, Anatomy] = {
    "bert": _BERT,
    "roberta": replace(_BERT, family="roberta"),
    "camembert": replace(_BERT, family="roberta"),
    "xlm-roberta": replace(_BERT, family="roberta"),
    "electra": replace(_BERT, family="electra"),
    "mpnet": _MPNET,
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, family="mistral"),
    "qwen2": replace(_LLAMA, family="qwen2"),
    "qwen3": _QWEN3,
}
"""The configuration's `model_type` to its anatomy."""


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a bare model or of one with a head.

    Raises:
        InputError: an architecture that is not in the table; the message lists those that are.
    """
    kind = str(model.config.model_type)
    if kind not in ANATOMIES:
        raise InputError(
            f"limbeck does not know where the layers of a {kind!r} model are; it knows {', '.join(ANATOMIES)}.",
            "Add an entry to ANATOMIES in limbeck/models/anatomy.py: it is names only.",
        )
    return ANATOMIES[kind]


MATRIX_KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate+up", "down")
"""What the matrices of a layer are for, in the order in which a layer uses them."""
_IN_A_LAYER = re.compile(r"(?:^|\.)(?P<layer>\d{1,6})\.(?P<part>.+)$")


@dataclass(frozen=True)
class Place:
    """Where a matrix stands in a model."""

    layer: int
    """Counted from 0."""
    kind: str
    """One of `MATRIX_KINDS`, or the module's own name within the layer in an architecture that is not in the table."""


def place_of(name: str) -> Place | None:
    """The place of a module, read off its qualified name alone, so that it serves graphs too; `None` outside the
    layers (embeddings, poolers, heads)."""
    found = _IN_A_LAYER.search(name)
    return Place(int(found["layer"]), _kinds().get(found["part"], found["part"])) if found else None


@functools.cache
def _kinds() -> dict[str, str]:
    """A matrix's name within its layer to its kind, over all families: no two of them disagree."""
    kinds: dict[str | None, str] = {}
    for anatomy in ANATOMIES.values():
        names = (anatomy.query, anatomy.key, anatomy.value, anatomy.qkv, anatomy.output, anatomy.gate)
        kinds |= dict(zip(names, MATRIX_KINDS[:6], strict=True))
        kinds |= {anatomy.up: "gate+up" if anatomy.fused_gate else "up", anatomy.down: "down"}
    return {name: kind for name, kind in kinds.items() if name is not None}
