"""What happens inside a model while it runs, by name: embeddings, hidden states, attention maps, queries, keys, values.

| name | what | shape |
|---|---|---|
| `embeddings` | what enters the first layer | [batch, sequence, width] |
| `hidden.I` | what leaves layer I (counted from 0; before a decoder's last norm) | [batch, sequence, width] |
| `attention.I` | attention probabilities of layer I | [batch, heads, sequence, sequence] |
| `query.I`, `key.I`, `value.I` | projections, before any rotary embedding | [batch, sequence, heads * head size] |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError
from .anatomy import Anatomy, anatomy_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = "embeddings"


def hidden(layer: int) -> str:
    """The name of what leaves a layer."""
    return f"hidden.{layer}"


def attention(layer: int) -> str:
    """The name of a layer's attention probabilities."""
    return f"attention.{layer}"


class FeatureRecorder(nn.Module):
    """A task's module that returns some of its model's features beside its outputs, all under their names."""

    def __init__(self, module: nn.Module, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(names)
        self._model = (model,)  # in a tuple, so that it is not registered twice

    @property
    def config(self) -> Any:
        """The model's configuration (transformers' exporters read it)."""
        return self._model[0].config

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """int64 [batch, sequence] inputs by name -> the module's tensors and the recorded features by name."""
        with recording(self._model[0], self.names) as features:
            outputs = self.module(**inputs)
        named = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        return {**named, **{name: features[name] for name in self.names}}


@contextmanager
def recording(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect these features of whatever runs inside the block, with their gradients.

    Raises:
        InputError: an architecture that is not in the anatomy table, or one that does not give its attention maps.
    """
    seen: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        anatomy = anatomy_of(model)
        for name in names:
            hooks.callback(_record(model, anatomy, name, seen).remove)
        yield seen


@contextmanager
def showing_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model compute attention so that its maps can be seen (fused kernels never form them)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _record(model: PreTrainedModel, anatomy: Anatomy, name: str, seen: dict[str, torch.Tensor]) -> Any:
    """Hook the module that makes a feature."""
    layers = anatomy.layers(model)
    if name == EMBEDDINGS:
        return layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.update({name: args[0] if args else kwargs["hidden_states"]}), with_kwargs=True
        )
    kind, _, index = name.partition(".")
    layer = layers[int(index)]
    if kind == "hidden":
        return layer.register_forward_hook(lambda _m, _i, output: seen.update({name: _first(output)}))
    if kind == "attention":
        return layer.get_submodule(anatomy.attention).register_forward_hook(
            lambda _m, _i, output: seen.update({name: _attention_of(output, model)})
        )
    module, part = _projection(anatomy, kind)
    return layer.get_submodule(module).register_forward_hook(lambda _m, _i, output: seen.update({name: part(output)}))


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _attention_of(output: Any, model: PreTrainedModel) -> torch.Tensor:
    maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if maps is None:
        raise InputError(
            f"A {model.config.model_type} model does not give its attention maps.",
            "Match attention relations instead: they need queries, keys and values only.",
        )
    return maps  # type: ignore[no-any-return]


def _projection(anatomy: Anatomy, kind: str) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The module that makes queries, keys or values, and how to take them out of its output."""
    if anatomy.qkv is not None:
        third = ("query", "key", "value").index(kind)
        return anatomy.qkv, lambda output: output.chunk(3, dim=-1)[third]
    module = {"query": anatomy.query, "key": anatomy.key, "value": anatomy.value}[kind]
    assert module is not None  # a family has either the three or one for all
    return module, lambda output: output
