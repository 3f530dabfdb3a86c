"""Importance by the weights alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..anatomy import anatomy_of
from ..checkpoint import Checkpoint
from ..gates import residual_norms
from .base import Calibration, Importance, Scores
from .weights import floats, matrix, output_projection, projection, read_squares, written_squares

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Magnitude(Importance):
    """The joint L2 norm of the weights that go with a part (biases left out). Needs no data.

    | part | score |
    |---|---|
    | head | `sqrt(|query_h|^2 + |output_h|^2 + (|key_g|^2 + |value_g|^2) / n)`, n heads sharing the keys and values g |
    | feed-forward channel | `sqrt(|up_c|^2 + |gate_c|^2 + |down_c|^2)` |
    | layer | the norm of all its matrices, as a share of the sum of the layers' norms |
    | residual channel | `sqrt(sum over norms of gain_c^2 + bias_c^2)` |

    A norm gives `gain * z + bias` with z of unit variance, so `gain^2 + bias^2` is what the mean square of its output
    would be. (The norm of all the weights along a residual channel was tried and is worse than chance on MiniLM:
    trained models write large values where they carry little.)

    The norm of a filter as its importance: Li et al. 2017, "Pruning Filters for Efficient ConvNets"; the norm over the
    whole coupled group: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning".
    """

    name = "magnitude"

    def _scores(self, checkpoint: Checkpoint, structures: frozenset[str], calibration: Calibration | None) -> Scores:
        model = checkpoint.model
        depth = len(anatomy_of(model).layers(model))
        return Scores(
            heads=[_heads(model, layer) for layer in range(depth)] if "heads" in structures else None,
            ffn=_ffn(model) if "ffn" in structures else None,
            layers=_layers(model) if "layers" in structures else None,
            width=_width(model) if "width" in structures else None,
        )


def _heads(model: PreTrainedModel, layer: int) -> torch.Tensor:
    own = projection(model, layer, "query").square().sum(dim=(1, 2))
    own = own + output_projection(model, layer).square().sum(dim=(0, 2))
    shared = sum(projection(model, layer, kind).square().sum(dim=(1, 2)) for kind in ("key", "value"))
    assert isinstance(shared, torch.Tensor)
    each = len(own) // len(shared)
    return (own + (shared / each).repeat_interleave(each)).sqrt()


def _ffn(model: PreTrainedModel) -> list[torch.Tensor]:
    return [(read_squares(block) + written_squares(block)).sqrt() for block in anatomy_of(model).ffn(model)]


def _layers(model: PreTrainedModel) -> torch.Tensor:
    anatomy = anatomy_of(model)
    squares: list[torch.Tensor] = [torch.zeros((), dtype=torch.float64) for _ in anatomy.layers(model)]
    start = len(anatomy.layers_name(model)) + 1
    for name, module in anatomy.linear_layers(model):
        squares[int(name[start:].split(".")[0])] += matrix(module).square().sum()
    norms = torch.stack(squares).sqrt()
    return norms / norms.sum()


def _width(model: PreTrainedModel) -> torch.Tensor:
    norms = residual_norms(model, model.base_model)
    return torch.stack([floats(norm.weight).square() + _bias_squares(norm) for norm in norms]).sum(dim=0).sqrt()


def _bias_squares(norm: Any) -> torch.Tensor:
    bias = getattr(norm, "bias", None)
    return torch.zeros(len(norm.weight), dtype=torch.float64) if bias is None else floats(bias).square()
