"""What a narrower student inherits: how much each part of the teacher matters, by what training text sends through it,
or by its weights where there is no text.

| part | by text | by weights |
|---|---|---|
| layer | block influence, `1 - mean cos(in, out)` (ShortGPT, Men et al. 2024) | none |
| feed-forward channel | the energy that it writes, `mean a_c^2 * |down_c|^2` | `|up_c|^2 + |gate_c|^2 + |down_c|^2` |
| head | the energy that it writes, `mean |W_h o_h|^2` | `|query_h|^2 + |output_h|^2` |
| residual channel | `sum over norms of mean |norm(x)_c|` (Minitron) | `sum over norms of gain_c^2 + bias_c^2` |
| channel of queries and keys | `mean q_c^2 * mean k_c^2` | `|query_c|^2 * |key_c|^2` |
| channel of values | `mean o_c^2 * |output_c|^2` | `|value_c|^2 * |output_c|^2` |

A norm gives `gain * z + bias` with z of unit variance, so `gain^2 + bias^2` is what the mean square of its output would
be: Minitron's measure without text. (The norm of all the weights along a residual channel was tried and is worse than
chance on MiniLM: trained models write large values where they carry little.)

Importance from activations alone: Minitron (Muralidharan et al. 2024, "Compact Language Models via Pruning and
Knowledge Distillation"); times the weights that read them: Wanda (Sun et al. 2024). Coupled norms: DepGraph
(Fang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models.anatomy import Anatomy, Linear, anatomy_of, reduction_axis
from ..models.batching import batches_by_length
from ..models.checkpoint import Checkpoint
from ..models.data import Data

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 256
"""Rows of the training text that are looked at: some thousand tokens, after which ranks hardly move."""
_BATCH = 16

Moments = dict[str, torch.Tensor]
"""Means over the tokens of the training text, float64, by the names that `_Observer` gives them."""


class Importance:
    """Scores for the parts of a model: the higher, the more is lost without it. Tensors are float64.

    Args:
        data: training text; scores come from the weights alone when not given.

    Raises:
        InputError: an architecture that is not in the anatomy table, or rows without text.
    """

    def __init__(self, teacher: Checkpoint, data: Data | None) -> None:
        self._model = teacher.model
        self._anatomy = anatomy_of(teacher.model)
        self._seen = _moments(teacher, data) if data is not None else None

    def layers(self) -> torch.Tensor:
        """Block influence [layers]; needs data."""
        assert self._seen is not None
        depth = len(self._anatomy.layers(self._model))
        return torch.stack([1 - self._seen[f"cosine.{index}"] for index in range(depth)])

    def ffn(self, layer: int) -> torch.Tensor:
        """[channels] of that layer's feed-forward block."""
        block = self._anatomy.ffn(self._model)[layer]
        written = _squares(block.down, over=1 - reduction_axis(block.down))
        if self._seen is not None:
            return self._seen[f"ffn.{layer}"] * written
        read = _squares(block.up, over=reduction_axis(block.up))
        if block.fused:
            read = read.view(2, block.width).sum(dim=0)
        elif block.gate is not None:
            read = read + _squares(block.gate, over=reduction_axis(block.gate))
        return read + written

    def heads(self, layer: int) -> torch.Tensor:
        """[heads] of that layer, as shares of their sum (so that layers can be added up)."""
        output = self._output(layer)
        if self._seen is not None:
            scores = torch.einsum("whi,hij,whj->h", output, self._seen[f"context.{layer}"], output)
        else:
            scores = self._rows(layer, "query").square().sum(dim=(1, 2)) + output.square().sum(dim=(0, 2))
        return scores / scores.sum()

    def score_channels(self, layer: int) -> torch.Tensor:
        """[heads, head size]: channels of queries and keys, in a family whose heads share none."""
        sides = []
        for kind in ("query", "key"):
            seen = None if self._seen is None else self._seen[f"{kind}.{layer}"]
            rows = self._rows(layer, kind)
            sides.append(rows.square().sum(dim=2) if seen is None else seen.view(rows.shape[:2]))
        return sides[0] * sides[1]

    def value_channels(self, layer: int) -> torch.Tensor:
        """[heads, head size]: channels of values, in a family whose heads share none."""
        written = self._output(layer).square().sum(dim=0)
        if self._seen is not None:
            return written * self._seen[f"context.{layer}"].diagonal(dim1=1, dim2=2)
        return written * self._rows(layer, "value").square().sum(dim=2)

    def channels(self) -> torch.Tensor:
        """[width] of the residual stream."""
        if self._seen is not None:
            return self._seen["channels"]
        norms = _residual_norms(self._model)
        squares = [_floats(norm.weight).square() + _bias_squares(norm) for norm in norms]
        return torch.stack(squares).sum(dim=0)

    def _output(self, layer: int) -> torch.Tensor:
        """The output projection [width, heads, head size]."""
        weight = _weight(self._anatomy.layers(self._model)[layer].get_submodule(self._anatomy.output))
        return weight.view(len(weight), -1, self._anatomy.head_size_of(self._model))

    def _rows(self, layer: int, kind: str) -> torch.Tensor:
        """The projection that makes queries, keys or values [heads, head size, width]."""
        anatomy = self._anatomy
        name = anatomy.qkv or {"query": anatomy.query, "key": anatomy.key, "value": anatomy.value}[kind]
        weight = _weight(anatomy.layers(self._model)[layer].get_submodule(str(name)))
        if anatomy.qkv is not None:
            weight = weight.chunk(3)[("query", "key", "value").index(kind)]
        return weight.view(-1, anatomy.head_size_of(self._model), weight.shape[1])


def _weight(module: nn.Module) -> torch.Tensor:
    """A linear layer's weight as float64 [out, in], whichever way it is held."""
    weight = _floats(module.weight)
    return weight if reduction_axis(module) == 1 else weight.T  # type: ignore[arg-type]


def _floats(parameter: Any) -> torch.Tensor:
    values: torch.Tensor = parameter.detach().double().cpu()
    return values


def _squares(module: Linear, over: int) -> torch.Tensor:
    return _floats(module.weight).square().sum(dim=over)


def _residual_norms(model: PreTrainedModel) -> list[Any]:
    """Every norm over the residual stream (not the norms inside heads), of the model without its task's head."""
    width = int(model.config.hidden_size)
    return [
        module
        for module in model.base_model.modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", torch.empty(0)).shape == (width,)
    ]


def _bias_squares(norm: Any) -> torch.Tensor:
    bias = getattr(norm, "bias", None)
    return torch.zeros(len(norm.weight)) if bias is None else _floats(bias).square()


def _moments(teacher: Checkpoint, data: Data) -> Moments:
    """Run the teacher over rows spread evenly over the training text."""
    step = max(1, len(data) // SAMPLES)
    rows = Data(data.rows.select(range(0, len(data), step)[:SAMPLES]), data.source, data.columns)
    examples = teacher.task.examples(rows, teacher.tokenizer, teacher.max_length, teacher.model.config)
    observer = _Observer(teacher.model)
    with torch.inference_mode(), ExitStack() as hooks:
        observer.watch(hooks)
        for _, batch in batches_by_length(examples, teacher.tokenizer, _BATCH):
            batch = {name: value.to(teacher.model.device) for name, value in batch.items()}
            observer.real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            teacher.module(**teacher.model_inputs(batch), **teacher.task.forward_flags())
            observer.tokens += int(observer.real.sum())
    return {name: total / observer.tokens for name, total in observer.sums.items()}


class _Observer:
    """Sums over real tokens of what passes through a model's parts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.sums: Moments = {}
        self.tokens = 0
        self.real = torch.empty(0)
        self._model = model
        self._anatomy = anatomy_of(model)

    def watch(self, hooks: ExitStack) -> None:
        """Hook the model until the stack closes."""
        anatomy, size = self._anatomy, self._anatomy.head_size_of(self._model)
        for index, layer in enumerate(anatomy.layers(self._model)):
            down, output = layer.get_submodule(anatomy.down), layer.get_submodule(anatomy.output)
            self._hook(hooks, layer, f"cosine.{index}", lambda x, y: _cosine(x, y)[self.real])
            self._hook(hooks, down, f"ffn.{index}", lambda x, _: x[self.real].square())
            self._hook(hooks, output, f"context.{index}", lambda x, _: _products(x[self.real], size))
            for kind, module, part in _projections(anatomy, layer):
                self._hook(hooks, module, f"{kind}.{index}", lambda _, y, part=part: part(y)[self.real].square())
        for norm in _residual_norms(self._model):
            self._hook(hooks, norm, "channels", lambda _, y: y[self.real].abs())

    def _hook(self, hooks: ExitStack, module: nn.Module, name: str, see: Callable[..., torch.Tensor]) -> None:
        """Add up what `see` makes, [tokens, ...], of a module's input and output [batch, sequence, width]."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, torch.Tensor) else output[0]
            total = see(before, after).sum(dim=0, dtype=torch.float64).cpu()  # a batch in float32, the whole in float64
            self.sums[name] = self.sums.get(name, torch.zeros(())) + total

        hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)


def _cosine(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(before, after, dim=-1)


def _products(values: torch.Tensor, size: int) -> torch.Tensor:
    """[tokens, heads * size] -> the products of each head's channels [1, heads, size, size], summed over the tokens."""
    by_head = values.view(len(values), -1, size)
    return torch.einsum("thi,thj->hij", by_head, by_head).unsqueeze(0)


def _projections(
    anatomy: Anatomy, layer: nn.Module
) -> list[tuple[str, nn.Module, Callable[[torch.Tensor], torch.Tensor]]]:
    """The modules that make queries and keys, each with how to take them out of what it gives."""
    if anatomy.qkv is not None:
        fused = layer.get_submodule(anatomy.qkv)
        return [("query", fused, lambda y: y.chunk(3, dim=-1)[0]), ("key", fused, lambda y: y.chunk(3, dim=-1)[1])]
    return [
        ("query", layer.get_submodule(str(anatomy.query)), lambda y: y),
        ("key", layer.get_submodule(str(anatomy.key)), lambda y: y),
    ]
