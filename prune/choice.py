"""Which heads, channels and layers stay: scores and shares in, positions out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from ..models.anatomy import anatomy_of
from ..models.shapes import LayerShape, shapes_of
from ..models.surgery import HeadSelection, strongest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH_MULTIPLE = 8
"""Widths are rounded to this: matrix kernels work on tiles, and an odd width is padded up to the next one or falls to a
slow path (tensor cores want 16 bytes, which is 8 values of float16; NVIDIA, "Matrix Multiplication Background")."""


def kept_width(width: int, share: float) -> int:
    """The number of channels that stay: the multiple of `WIDTH_MULTIPLE` nearest to `share * width`, at least one such
    multiple and at most `width`; with a share of 1 the width as it is."""
    if share == 1:
        return width
    nearest = int(share * width / WIDTH_MULTIPLE + 0.5) * WIDTH_MULTIPLE
    return min(width, max(WIDTH_MULTIPLE, nearest))


def choose_channels(scores: Sequence[torch.Tensor], shares: Sequence[float]) -> list[torch.Tensor]:
    """The best channels of every layer, a share [0, 1] each; positions int64, ascending."""
    pairs = zip(scores, shares, strict=True)
    return [strongest(score, kept_width(len(score), share)) for score, share in pairs]


def choose_channels_globally(
    scores: Sequence[torch.Tensor], share: float, protect: Sequence[int]
) -> list[torch.Tensor]:
    """The best channels of the whole model: layers keep as many as reach the common threshold, rounded as
    `kept_width` rounds."""
    free = [index for index in range(len(scores)) if index not in protect]
    if not free:
        return [torch.arange(len(score)) for score in scores]
    everything = torch.cat([scores[index] for index in free])
    threshold = everything.sort(descending=True).values[max(1, round(share * len(everything))) - 1]
    return [
        strongest(score, kept_width(len(score), float((score >= threshold).double().mean())))
        if index in free
        else torch.arange(len(score))
        for index, score in enumerate(scores)
    ]


def choose_heads(
    model: PreTrainedModel, scores: Sequence[torch.Tensor], shares: Sequence[float]
) -> list[HeadSelection]:
    """The best heads of every layer. Where heads share keys and values, whole groups go, or as many of each group,
    whichever keeps more; layers of the same sizes and share do the same, so that one configuration can say it.

    Raises:
        UsageError: a share that leaves no head.
    """
    layers = shapes_of(model).layers
    if anatomy_of(model).relative_bias is not None:  # the layers share a bias for each head: they keep the same heads
        if len(set(shares)) > 1:
            kind = model.config.model_type
            raise UsageError(f"The layers of a {kind} share a position bias for each head: they must keep as many.")
        scores = [torch.stack([score / score.sum() for score in scores]).sum(dim=0)] * len(layers)
    alike: dict[tuple[int, int, float], list[int]] = defaultdict(list)
    for index, (shape, share) in enumerate(zip(layers, shares, strict=True)):
        alike[shape.heads, shape.key_value_heads, share].append(index)
    chosen: dict[int, HeadSelection] = {}
    for (heads, groups, share), members in alike.items():
        options = _options(heads, groups, share)
        best = max(
            options, key=lambda option: sum(_kept_score(scores[index], layers[index], option) for index in members)
        )
        chosen |= {index: _best_heads(scores[index], layers[index], best) for index in members}
    return [chosen[index] for index in range(len(layers))]


def choose_heads_globally(
    model: PreTrainedModel, scores: Sequence[torch.Tensor], share: float, protect: Sequence[int]
) -> list[HeadSelection]:
    """The best heads (groups of heads, where they share keys and values) of the whole model; every layer keeps one at
    least.

    Raises:
        UsageError: a family whose layers must keep the same heads.
    """
    if anatomy_of(model).relative_bias is not None:
        kind = model.config.model_type
        raise UsageError(f"The layers of a {kind} share a position bias for each head: allocation must be uniform.")
    layers = shapes_of(model).layers
    groups = [score.view(shape.key_value_heads, -1).sum(dim=1) for score, shape in zip(scores, layers, strict=True)]
    free = [group for index, group in enumerate(groups) if index not in protect]
    everything = torch.cat(free) if free else torch.zeros(1)
    threshold = everything.sort(descending=True).values[max(1, round(share * len(everything))) - 1]
    chosen = []
    for index, (group, shape) in enumerate(zip(groups, layers, strict=True)):
        kept = len(group) if index in protect else max(1, int((group >= threshold).sum()))
        chosen.append(_best_heads(scores[index], shape, (kept, shape.heads // shape.key_value_heads)))
    return chosen


def _options(heads: int, groups: int, share: float) -> list[tuple[int, int]]:
    """(groups kept, heads kept of each) with as many heads together as comes nearest to the share."""
    asked = share * heads
    if asked < 0.5:
        raise UsageError(
            f"keep is {share:g}, which leaves none of {heads} heads (in {groups} groups that share keys and values).",
            f"The least is one head: --keep {1 / heads:.3g}.",
        )
    every = [(kept, each) for kept in range(1, groups + 1) for each in range(1, heads // groups + 1)]
    nearest = min(abs(kept * each - asked) for kept, each in every)
    return [(kept, each) for kept, each in every if abs(kept * each - asked) == nearest]


def _best_heads(scores: torch.Tensor, shape: LayerShape, option: tuple[int, int]) -> HeadSelection:
    """The `option[0]` best groups and the `option[1]` best heads of each, by scores [heads]."""
    kept, each = option
    shared = shape.heads // shape.key_value_heads
    by_group = scores.view(-1, shared)
    key_value = strongest(by_group.topk(each, dim=1).values.sum(dim=1), kept)
    query = torch.cat([group * shared + strongest(by_group[group], each) for group in key_value])
    return HeadSelection(query, key_value)


def _kept_score(scores: torch.Tensor, shape: LayerShape, option: tuple[int, int]) -> float:
    return float(scores[_best_heads(scores, shape, option).query].sum() / scores.sum().clamp_min(1e-300))


def choose_layers(model: PreTrainedModel, scores: torch.Tensor, share: float, protect: Sequence[int]) -> list[int]:
    """The best layers, in order.

    Raises:
        UsageError: a share that leaves none, or less than are protected.
    """
    depth = len(scores)
    count = int(share * depth + 0.5)
    if count < 1:
        raise UsageError(f"keep is {share:g}, which leaves none of {depth} layers.", f"Use --keep {1 / depth:.3g}.")
    scores = scores.clone()
    fixed = {
        *protect,
        *([0] if model.config.model_type == "modernbert" else []),
    }  # its first layer is unlike the others
    if len(fixed) > count:
        raise UsageError(
            f"keep leaves {count} of {depth} layers, and {len(fixed)} are to be left whole: {sorted(fixed)}."
        )
    scores[sorted(fixed)] = torch.inf
    return [int(layer) for layer in strongest(scores, count)]
