"""What a narrower student inherits: the parts of the teacher that matter most by what training text sends through them
(`activation` in `models/importance`), or by their weights where there is no text (`magnitude`).

Where heads get narrower, the channels inside them are ranked here:

| part | by text | by weights |
|---|---|---|
| channel of queries and keys | `mean q_c^2 * mean k_c^2` | `|query_c|^2 * |key_c|^2` |
| channel of values | `mean o_c^2 * |output_c|^2` | `|value_c|^2 * |output_c|^2` |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn

from ..models.anatomy import Anatomy, anatomy_of
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.importance import Calibration, Scores, get_importance
from ..models.importance.activations import Moments, Observer, See
from ..models.importance.weights import output_projection, projection

SAMPLES = 256
"""Rows of the training text that are looked at: some thousand tokens, after which ranks hardly move."""


class Inheritance:
    """Scores for the parts of a teacher, measured once and when they are first asked for: the higher, the more is lost
    without the part. Tensors are float64.

    Args:
        data: training text; scores come from the weights alone when not given.

    Raises:
        InputError: (by the methods) an architecture that is not in the anatomy table, or rows without text.
    """

    def __init__(self, teacher: Checkpoint, data: Data | None) -> None:
        self._teacher = teacher
        self.data = data

    def layers(self) -> torch.Tensor:
        """Block influence [layers]; needs data."""
        assert self.data is not None and self._scores.layers is not None
        return self._scores.layers.clone()

    def ffn(self, layer: int) -> torch.Tensor:
        """[channels] of that layer's feed-forward block."""
        assert self._scores.ffn is not None
        return self._scores.ffn[layer]

    def heads(self, layer: int) -> torch.Tensor:
        """[heads] of that layer, as shares of their sum (so that layers can be added up)."""
        assert self._scores.heads is not None
        return self._scores.heads[layer] / self._scores.heads[layer].sum()

    def channels(self) -> torch.Tensor:
        """[width] of the residual stream."""
        assert self._scores.width is not None
        return self._scores.width

    def score_channels(self, layer: int) -> torch.Tensor:
        """[heads, head size]: channels of queries and keys, in a family whose heads share none."""
        query, key = (self._squares(layer, kind) for kind in ("query", "key"))
        return query * key

    def value_channels(self, layer: int) -> torch.Tensor:
        """[heads, head size]: channels of values, in a family whose heads share none."""
        written = output_projection(self._teacher.model, layer).square().sum(dim=0)
        return written * self._squares(layer, "value")

    def _squares(self, layer: int, kind: str) -> torch.Tensor:
        """[heads, head size]: of a projection's output where there is text, of its rows where there is none."""
        rows = projection(self._teacher.model, layer, kind)
        if self.data is None:
            return rows.square().sum(dim=2)
        return self._inside_heads[f"{kind}.{layer}"].view(rows.shape[:2])

    @cached_property
    def _calibration(self) -> Calibration | None:
        """Rows spread evenly over the training text."""
        data, teacher = self.data, self._teacher
        if data is None:
            return None
        step = max(1, len(data) // SAMPLES)
        rows = Data(data.rows.select(range(0, len(data), step)[:SAMPLES]), data.source, data.columns)
        return Calibration(teacher.task.examples(rows, teacher.tokenizer, teacher.max_length, teacher.model.config))

    @cached_property
    def _scores(self) -> Scores:
        importance = get_importance("magnitude" if self._calibration is None else "activation")
        return importance.scores(self._teacher, importance.structures, self._calibration)

    @cached_property
    def _inside_heads(self) -> Moments:
        """Mean squares of queries, keys and what the output projection reads."""
        assert self._calibration is not None
        observer, anatomy = Observer(), anatomy_of(self._teacher.model)
        for index, layer in enumerate(anatomy.layers(self._teacher.model)):
            for kind, module, part in _projections(anatomy, layer):
                observer.watch(module, f"{kind}.{index}", _squares_of(part))
            observer.watch(layer.get_submodule(anatomy.output), f"value.{index}", lambda x, _: x.square())
        return observer.run(self._teacher, self._calibration)


def _squares_of(part: Callable[[torch.Tensor], torch.Tensor]) -> See:
    return lambda _, output: part(output).square()


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
