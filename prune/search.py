"""Budgeted search: which heads and feed-forward channels each layer keeps, and which layers go whole, so that the least
importance is lost within a budget.

A knapsack with one choice of heads and one of channels for each layer that stays: the form is that of Kurtić et al.
2023, "ZipLM: Inference-Aware Structured Pruning of Language Models", who solve it by dynamic programming over rounded
costs. Here it is a mixed-integer linear program, and HiGHS rounds nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import LimbeckError, UsageError
from ..models.anatomy import anatomy_of
from ..models.importance import Scores
from ..models.shapes import LayerShape, shapes_of
from ..models.surgery import HeadSelection, Selection, strongest
from .costs import Costs, LayerCosts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Losses = Mapping[int, float]
"""How many heads or channels stay -> the importance of those that go."""

FFN_STEP = 32
"""Feed-forward widths are multiples of this: kernels work on tiles of 16 or 32 columns, and pad up to the next."""
_MOST_WIDTHS = 64
_SLACK = 1e-6
"""The solver holds a constraint to within about this share of the budget; as much is kept free."""
_GAP = 1e-6
_SECONDS = 120.0

_Kind = Literal["layer", "heads", "ffn", "shared"]


@dataclass(frozen=True)
class LayerOptions:
    """What one layer may keep, and what that loses."""

    shape: LayerShape
    """Its size now."""
    heads: Losses
    ffn: Losses
    dropped: float | None
    """What is lost when the layer goes whole; `None` where it must stay."""

    def shaped(self, heads: int, ffn: int) -> LayerShape:
        """The layer at another size; heads keep sharing keys and values as they did."""
        shared = self.shape.heads // self.shape.key_value_heads
        return LayerShape(heads=heads, key_value_heads=heads // shared, ffn=ffn)


@dataclass(frozen=True)
class SearchSpace:
    """What a whole model may keep."""

    layers: Sequence[LayerOptions]
    same_heads: bool = False
    """Every layer that stays must keep as many heads as the others (MPNet, whose layers share a position bias)."""

    @property
    def whole(self) -> dict[int, LayerShape]:
        """The model with nothing cut."""
        return {index: options.shape for index, options in enumerate(self.layers)}

    def lost(self, shapes: Mapping[int, LayerShape]) -> float:
        """The importance that these sizes (of the layers that stay) lose."""
        return sum(
            options.heads[shapes[index].heads] + options.ffn[shapes[index].ffn]
            if index in shapes
            else options.dropped or 0.0
            for index, options in enumerate(self.layers)
        )

    @property
    def total(self) -> float:
        """The importance of everything that may be cut at all: the most that each layer can lose."""
        return sum(
            max(options.dropped or 0.0, max(options.heads.values()) + max(options.ffn.values()))
            for options in self.layers
        )


def search_space(model: PreTrainedModel, scores: Scores, protect: Collection[int] = ()) -> SearchSpace:
    """Every size that a layer may have: heads in steps of a key-value head with all that share it, channels in steps of
    `FFN_STEP` (of more where the layer is very wide), the least important first, and the layer gone.

    Args:
        scores: of heads and channels, and of layers where they are known; a layer is worth no less than what is in it.
        protect: layers, from 0, that are left as they are.

    Raises:
        UsageError: a protected layer that the model does not have.
    """
    anatomy, shapes = anatomy_of(model), shapes_of(model)
    check_protected(protect, len(shapes.layers))
    ranked = _ranked_heads(model, scores)
    layers = []
    for index, shape in enumerate(shapes.layers):
        heads, ffn = _lost_heads(scores, index, shape, ranked[index]), _lost_channels(scores, index, shape)
        dropped: float | None = float(_heads_of(scores, index).sum() + _ffn_of(scores, index).sum())
        if scores.layers is not None:
            dropped = max(float(dropped or 0.0), float(scores.layers[index]))
        if index in protect:
            heads, ffn = {shape.heads: 0.0}, {shape.ffn: 0.0}
        if index in protect or (index == 0 and anatomy.family == "modernbert"):
            dropped = None  # ModernBERT's first layer has no attention norm: no other can take its place
        layers.append(LayerOptions(shape, heads, ffn, dropped))
    return SearchSpace(layers, anatomy.relative_bias is not None)


def check_protected(protect: Collection[int], depth: int) -> None:
    """Refuse protected layers that are not there.

    Raises:
        UsageError: there is one; the message says which are valid.
    """
    if unknown := sorted(set(protect) - set(range(depth))):
        raise UsageError(f"The layer {unknown[0]} cannot be protected: the model has layers 0 to {depth - 1}.")


def widths(ffn: int) -> list[int]:
    """The widths that a feed-forward block of `ffn` channels may be cut to, ascending, its own last."""
    step = FFN_STEP * -(-ffn // (FFN_STEP * _MOST_WIDTHS))
    return [*range(step, ffn, step), ffn]


def _heads_of(scores: Scores, layer: int) -> torch.Tensor:
    assert scores.heads is not None
    return scores.heads[layer]


def _ffn_of(scores: Scores, layer: int) -> torch.Tensor:
    assert scores.ffn is not None
    return scores.ffn[layer]


def _group_scores(scores: Scores, layer: int, shape: LayerShape) -> torch.Tensor:
    """What each key-value head is worth with all the heads that share it, float64 [key-value heads]."""
    return _heads_of(scores, layer).view(shape.key_value_heads, -1).sum(dim=1)


def _ranked_heads(model: PreTrainedModel, scores: Scores) -> list[torch.Tensor]:
    """What each layer's key-value heads are ranked by: their own worth, or that of all layers' where they must keep the
    same ones."""
    own = [_group_scores(scores, index, shape) for index, shape in enumerate(shapes_of(model).layers)]
    if anatomy_of(model).relative_bias is None:
        return own
    return [torch.stack(own).sum(dim=0)] * len(own)


def _lost_heads(scores: Scores, layer: int, shape: LayerShape, ranked: torch.Tensor) -> Losses:
    own, shared = _group_scores(scores, layer, shape), shape.heads // shape.key_value_heads
    order = torch.sort(ranked, descending=True, stable=True).indices
    lost = own.sum() - torch.cumsum(own[order], dim=0)
    return {count * shared: max(float(lost[count - 1]), 0.0) for count in range(1, shape.key_value_heads + 1)}


def _lost_channels(scores: Scores, layer: int, shape: LayerShape) -> Losses:
    own = _ffn_of(scores, layer).sort(descending=True).values
    lost = own.sum() - torch.cumsum(own, dim=0)
    return {width: max(float(lost[width - 1]), 0.0) for width in widths(shape.ffn)}


def selection_of(model: PreTrainedModel, scores: Scores, shapes: Mapping[int, LayerShape]) -> Selection:
    """The most important parts that make these sizes, for `models/surgery.select`."""
    before, ranked = shapes_of(model).layers, _ranked_heads(model, scores)
    heads, ffn = [], []
    for index in sorted(shapes):
        shared = before[index].heads // before[index].key_value_heads
        groups = strongest(ranked[index], shapes[index].key_value_heads)
        query = (groups.unsqueeze(1) * shared + torch.arange(shared)).flatten()
        heads.append(HeadSelection(query=query, key_value=groups))
        ffn.append(strongest(_ffn_of(scores, index), shapes[index].ffn))
    return Selection(layers=sorted(shapes), heads=heads, ffn=ffn)


def search(space: SearchSpace, costs: Costs, budget: float, depth: int | None = None) -> dict[int, LayerShape]:
    """The sizes of the layers that stay (by their number, at least one) that lose least and cost at most `budget`.

    The result is the best one to within a millionth of all importance.

    Args:
        depth: how many layers stay; as many as is best where not given.

    Raises:
        UsageError: nothing costs as little as the budget; the message says what the least is.
    """
    if costs.of(space.whole) <= budget and depth in (None, len(space.layers)):
        return space.whole
    smallest = least(space, costs)
    if (lowest := costs.of(smallest)) > budget * (1 - 2 * _SLACK):
        raise UsageError(
            f"The budget of {budget:.4g} cannot be reached: the least that is possible is {lowest * 1.001:.4g}, "
            f"with {_described(smallest)}.",
            "Relax the budget, or protect fewer layers.",
        )
    return _Program(space, costs).solved(budget, depth)


def least(space: SearchSpace, costs: Costs) -> dict[int, LayerShape]:
    """The sizes that cost least: every layer gone that may go (one has to stay), the others as small as they may be."""
    small = {}
    for index, options in enumerate(space.layers):
        layer = costs.layers[index]
        heads = min(options.heads, key=layer.heads)
        small[index] = options.shaped(heads, min(options.ffn, key=layer.ffn))
    if space.same_heads:  # a protected layer keeps all of its heads, and so the others must
        heads = max(shape.heads for shape in small.values())
        small = {index: space.layers[index].shaped(heads, shape.ffn) for index, shape in small.items()}
    forced = {index: shape for index, shape in small.items() if space.layers[index].dropped is None}
    if forced:
        return forced
    cheapest = min(small, key=lambda index: costs.layers[index].of(small[index]))
    return {cheapest: small[cheapest]}


def _described(shapes: Mapping[int, LayerShape]) -> str:
    layers = f"{len(shapes)} layer" + ("s" if len(shapes) > 1 else "")
    heads, ffn = (sorted({getattr(shape, name) for shape in shapes.values()}) for name in ("heads", "ffn"))
    return f"{layers} of {_range(heads)} heads and {_range(ffn)} channels"


def _range(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


@dataclass(frozen=True)
class _Column:
    """A yes-or-no variable: the layer stays, or keeps so many heads or channels."""

    kind: _Kind
    layer: int
    """-1 for what all layers share."""
    count: int
    lost: float
    cost: float
    required: bool = False


class _Program:
    """The knapsack as HiGHS takes it: minimise what is lost, in shares of all importance, at a cost in shares of the
    budget."""

    def __init__(self, space: SearchSpace, costs: Costs) -> None:
        self._space, self._costs = space, costs
        self._columns = list(self._made())
        self._at = {(column.kind, column.layer, column.count): at for at, column in enumerate(self._columns)}

    def _made(self) -> Iterator[_Column]:
        for index, options in enumerate(self._space.layers):
            layer: LayerCosts = self._costs.layers[index]
            yield _Column("layer", index, 0, -(options.dropped or 0.0), layer.base, required=options.dropped is None)
            for count, lost in options.heads.items():
                yield _Column("heads", index, count, lost, layer.heads(count))
            for count, lost in options.ffn.items():
                yield _Column("ffn", index, count, lost, layer.ffn(count))
        if self._space.same_heads:
            for count in sorted({count for options in self._space.layers for count in options.heads}):
                yield _Column("shared", -1, count, 0.0, self._costs.shared_head * count)

    def solved(self, budget: float, depth: int | None = None) -> dict[int, LayerShape]:
        """The best choice within the budget, which must be reachable at some depth.

        Raises:
            UsageError: not at this depth.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        costs = np.array([column.cost for column in self._columns]) / budget
        lost = np.array([column.lost for column in self._columns]) / (self._space.total or 1.0)
        constraints = [
            LinearConstraint(costs[None, :], ub=1 - self._costs.rest / budget - _SLACK),
            LinearConstraint(self._row("layer", None), lb=depth or 1, ub=depth or np.inf),
            *self._choices(),
        ]
        lower = np.array([float(column.required) for column in self._columns])
        found = milp(
            lost,
            integrality=np.ones(len(lost)),
            bounds=Bounds(lower, np.ones(len(lost))),
            constraints=constraints,
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
        if found.x is None and depth is not None:
            raise UsageError(f"The budget of {budget:.4g} cannot be reached with {depth} layers.")
        if found.x is None:
            raise LimbeckError(f"The solver found no choice within the budget of {budget:.4g}: {found.message}")
        return self._shapes(found.x > 0.5)

    def _choices(self) -> Iterator[object]:
        """A layer that stays makes one choice of heads and one of channels; where heads are shared, the shared one."""
        from scipy.optimize import LinearConstraint

        for index in range(len(self._space.layers)):
            for kind in ("heads", "ffn"):
                row = self._row(kind, index) - self._row("layer", index)
                yield LinearConstraint(row, lb=0, ub=0)
        if not self._space.same_heads:
            return
        yield LinearConstraint(self._row("shared", -1), lb=1, ub=1)
        for (kind, _, count), at in self._at.items():
            if kind == "heads":
                row = np.zeros((1, len(self._columns)))
                row[0, at], row[0, self._at["shared", -1, count]] = 1.0, -1.0
                yield LinearConstraint(row, ub=0)

    def _row(self, kind: str, layer: int | None) -> NDArray[np.float64]:
        """1 for every variable of that kind and layer (of all layers for `None`), [1, variables]."""
        return np.array(
            [[float(column.kind == kind and layer in (None, column.layer)) for column in self._columns]], np.float64
        )

    def _shapes(self, chosen: NDArray[np.bool_]) -> dict[int, LayerShape]:
        pairs = zip(self._columns, chosen, strict=True)
        taken = {(column.kind, column.layer): column.count for column, on in pairs if on}
        return {
            index: options.shaped(taken["heads", index], taken["ffn", index])
            for index, options in enumerate(self._space.layers)
            if ("layer", index) in taken
        }
