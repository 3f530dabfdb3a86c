"""Choices near the best one by importance, for whoever can tell which of them is really best.

Importance adds up what single parts are worth while all the others are there. How much heads weigh against channels, or
a whole layer against parts of several, is what it says least surely; so these are varied, and the budget is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..errors import UsageError
from ..models.shapes import LayerShape
from .costs import Costs
from .search import Losses, SearchSpace, search

Shapes = Mapping[int, LayerShape]
"""The layers that stay, by their number, and their sizes."""
_HEADS_WEIGH = (0.5, 2.0)
_POWERS = (0.5, 2.0)


def alternatives(space: SearchSpace, costs: Costs, budget: float) -> list[Shapes]:
    """Different choices within the budget, the one that loses least importance first. The others: heads that weigh half
    or twice as much; losses raised to a power, below 1 so that a few parts are cut deep and above it so that all are
    cut alike; one layer fewer or more; and the same sizes in every layer that stays. Where nothing has to be cut there
    are none.

    Raises:
        UsageError: nothing costs as little as the budget.
    """
    best = search(space, costs, budget)
    found: list[Shapes] = [best]
    if best == space.whole:
        return found
    for shapes in _others(space, costs, budget, best):
        if shapes not in found:
            found.append(shapes)
    return found


def _others(space: SearchSpace, costs: Costs, budget: float, best: Shapes) -> Iterator[Shapes]:
    for weight in _HEADS_WEIGH:
        yield search(_changed(space, heads=weight), costs, budget)
    for power in _POWERS:
        yield search(_changed(space, power=power), costs, budget)
    by_depth = {len(best): best}
    for depth in (len(best) - 1, len(best) + 1):
        if 1 <= depth <= len(space.layers):
            try:
                by_depth[depth] = search(space, costs, budget, depth)
            except UsageError:  # so many do not fit, or more are protected
                continue
    for shapes in by_depth.values():
        yield shapes
        yield from _even(space, costs, budget, sorted(shapes))


def _changed(space: SearchSpace, heads: float = 1.0, power: float = 1.0) -> SearchSpace:
    """The space with all of its losses raised to a power, those of heads multiplied first."""

    def raised(losses: Losses, weight: float) -> Losses:
        return {count: (weight * lost) ** power for count, lost in losses.items()}

    layers = [
        replace(
            options,
            heads=raised(options.heads, heads),
            ffn=raised(options.ffn, 1.0),
            dropped=None if options.dropped is None else options.dropped**power,
        )
        for options in space.layers
    ]
    return replace(space, layers=layers)


def _even(space: SearchSpace, costs: Costs, budget: float, stay: Sequence[int]) -> Iterator[Shapes]:
    """The best choice with the same numbers of heads and of channels in all of these layers; none where none fits."""
    heads = set.intersection(*(set(space.layers[index].heads) for index in stay))
    ffn = set.intersection(*(set(space.layers[index].ffn) for index in stay))
    every = [{index: space.layers[index].shaped(*size) for index in stay} for size in itertools.product(heads, ffn)]
    fitting = [shapes for shapes in every if costs.of(shapes) <= budget]
    if fitting:
        yield min(fitting, key=space.lost)
