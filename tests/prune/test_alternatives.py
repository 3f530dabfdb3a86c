"""Choices near the best one: each within the budget and of sizes that the space has, none twice."""

from __future__ import annotations

import pytest

from limbeck.errors import UsageError
from limbeck.models.shapes import LayerShape
from limbeck.prune.alternatives import alternatives
from limbeck.prune.costs import Costs, LayerCosts
from limbeck.prune.search import LayerOptions, SearchSpace, search

DEPTH = 3
COSTS = Costs(1.0, (LayerCosts(0.5, lambda heads: 0.5 * heads, lambda ffn: ffn / 32),) * DEPTH)


def space_of(droppable: bool = True) -> SearchSpace:
    """Three layers of four heads and four widths; the later, the more every part is worth."""

    def of(layer: int) -> LayerOptions:
        heads = {count: (layer + 1.0) * (4 - count) for count in range(1, 5)}
        ffn = {32 * count: (layer + 0.5) * (4 - count) for count in range(1, 5)}
        shape = LayerShape(heads=4, key_value_heads=4, ffn=128)
        return LayerOptions(shape, heads, ffn, 9.0 * (layer + 1) if droppable else None)

    return SearchSpace([of(layer) for layer in range(DEPTH)])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_alternatives_keep_to_the_budget(share: float) -> None:
    space = space_of()
    budget = share * COSTS.of(space.whole)
    found = alternatives(space, COSTS, budget)
    assert found[0] == search(space, COSTS, budget)
    assert len(found) > 2 and all(found.count(shapes) == 1 for shapes in found)
    for shapes in found:
        assert COSTS.of(shapes) <= budget
        assert space.lost(shapes) >= space.lost(found[0]) - 1e-5 * space.total
        assert all(
            shape.heads in space.layers[layer].heads and shape.ffn in space.layers[layer].ffn
            for layer, shape in shapes.items()
        )


def test_other_depths_and_even_sizes_are_among_them() -> None:
    space = space_of()
    found = alternatives(space, COSTS, 0.6 * COSTS.of(space.whole))
    depths = {len(shapes) for shapes in found}
    assert len(found[0]) in depths and len(depths) > 1
    assert any(len(set(map(str, shapes.values()))) == 1 and len(shapes) == len(found[0]) for shapes in found)


def test_layers_that_must_stay_do_and_what_cannot_be_reached_is_refused() -> None:
    space = space_of(droppable=False)
    assert {len(shapes) for shapes in alternatives(space, COSTS, 0.5 * COSTS.of(space.whole))} == {DEPTH}
    with pytest.raises(UsageError, match="cannot be reached"):
        alternatives(space, COSTS, 1.5)


def test_a_model_within_the_budget_has_no_alternative() -> None:
    space = space_of()
    assert alternatives(space, COSTS, COSTS.of(space.whole)) == [space.whole]
