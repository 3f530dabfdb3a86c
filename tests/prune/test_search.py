"""The search finds what brute force finds, within the budget and by the rules of each architecture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from limbeck.errors import UsageError
from limbeck.models.checkpoint import load_checkpoint
from limbeck.models.importance import Scores
from limbeck.models.shapes import LayerShape, shapes_of
from limbeck.models.surgery import select
from limbeck.prune.budget_settings import Budget
from limbeck.prune.costs import Costs, LayerCosts, weight_costs
from limbeck.prune.search import LayerOptions, SearchSpace, least, search, search_space, selection_of, widths

TinyCheckpoint = Callable[..., Path]
Shapes = dict[int, LayerShape]


def every_choice(space: SearchSpace) -> Iterator[Shapes]:
    def of(options: LayerOptions) -> Iterator[LayerShape | None]:
        if options.dropped is not None:
            yield None
        for heads, ffn in itertools.product(options.heads, options.ffn):
            yield options.shaped(heads, ffn)

    for chosen in itertools.product(*(list(of(options)) for options in space.layers)):
        shapes = {index: shape for index, shape in enumerate(chosen) if shape is not None}
        if shapes and not (space.same_heads and len({shape.heads for shape in shapes.values()}) > 1):
            yield shapes


@st.composite
def instances(draw: st.DrawFn) -> tuple[SearchSpace, Costs]:
    """Two or three layers of up to three heads and three widths, losses that fall and costs that rise with size."""
    number = st.floats(0.01, 10)
    layers, costs = [], []
    same_heads = draw(st.booleans())
    most = draw(st.integers(1, 3))
    for _ in range(draw(st.integers(2, 3))):
        heads, channels = most if same_heads else draw(st.integers(1, 3)), draw(st.integers(1, 3))
        falling = [
            sorted(draw(st.lists(number, min_size=n - 1, max_size=n - 1)), reverse=True) for n in (heads, channels)
        ]
        shape = LayerShape(heads=heads, key_value_heads=heads, ffn=channels)
        lost = [dict(zip(range(1, len(each) + 2), [*each, 0.0], strict=True)) for each in falling]
        dropped = draw(st.none() | st.floats(0.01, 30))
        layers.append(LayerOptions(shape, lost[0], lost[1], dropped))
        rising = [list(itertools.accumulate(draw(st.lists(number, min_size=n, max_size=n)))) for n in (heads, channels)]
        costs.append(LayerCosts(draw(number), *(lambda count, of=each: of[count - 1] for each in rising)))
    return SearchSpace(layers, same_heads), Costs(draw(number), tuple(costs), 0.5 if same_heads else 0.0)


@settings(max_examples=60)
@given(instance=instances(), share=st.floats(0, 1))
def test_the_search_loses_no_more_than_brute_force(instance: tuple[SearchSpace, Costs], share: float) -> None:
    space, costs = instance
    choices = [(costs.of(shapes), space.lost(shapes)) for shapes in every_choice(space)]
    cheapest, dearest = min(cost for cost, _ in choices), costs.of(space.whole)
    budget = cheapest + share * (dearest - cheapest)
    slack = 1e-5 * budget
    assume(cheapest <= budget - slack)
    found = search(space, costs, budget)
    assert found in list(every_choice(space))
    assert costs.of(found) <= budget
    best = min(lost for cost, lost in choices if cost <= budget - slack)  # the solver keeps a millionth free
    assert space.lost(found) <= best + 1e-5 * space.total


@settings(max_examples=40)
@given(instance=instances())
def test_the_least_is_what_brute_force_finds_and_less_is_refused(instance: tuple[SearchSpace, Costs]) -> None:
    space, costs = instance
    cheapest = min(costs.of(shapes) for shapes in every_choice(space))
    assert costs.of(least(space, costs)) == pytest.approx(cheapest, rel=1e-9)
    if cheapest < costs.of(space.whole):
        with pytest.raises(UsageError, match=r"the least that is possible is [\d.e+]+, with \d+ layer"):
            search(space, costs, cheapest * 0.99)


@given(ffn=st.integers(1, 20_000))
def test_widths_are_few_multiples_of_32_and_the_width_itself(ffn: int) -> None:
    found = widths(ffn)
    assert found == sorted(set(found)) and found[-1] == ffn and len(found) <= 65
    assert all(width % 32 == 0 for width in found[:-1])


def scores_of(folder: Path, layers: torch.Tensor | None = None) -> Scores:
    """Random ones of the right sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(load_checkpoint(folder).model).layers

    def drawn(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    return Scores([drawn(shape.heads) for shape in shapes], [drawn(shape.ffn) for shape in shapes], layers)


def test_what_is_lost_is_the_worth_of_the_least_important_units(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("bert")
    model, scores = load_checkpoint(folder).model, scores_of(folder)
    assert scores.heads is not None and scores.ffn is not None
    options = search_space(model, scores).layers[0]
    heads, channels = scores.heads[0].sort().values, scores.ffn[0].sort().values
    assert options.heads == pytest.approx({kept: float(heads[: 4 - kept].sum()) for kept in range(1, 5)})
    assert options.ffn == pytest.approx({32: float(channels[:32].sum()), 64: 0.0})
    assert options.dropped == pytest.approx(float(heads.sum() + channels.sum()))
    worth_more = scores_of(folder, layers=torch.tensor([1e3, 0.0], dtype=torch.float64))
    dropped = [options.dropped for options in search_space(model, worth_more).layers]
    assert dropped[0] == 1e3
    assert dropped[1] == search_space(model, scores).layers[1].dropped


def test_the_most_important_units_are_the_ones_that_stay(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")  # two heads share one key-value head
    model, scores = load_checkpoint(folder).model, scores_of(folder)
    assert scores.heads is not None and scores.ffn is not None
    scores.heads[1] = torch.tensor([0.9, 0.0, 0.5, 0.6], dtype=torch.float64)  # the best head is in the worse pair
    shapes = {1: LayerShape(heads=2, key_value_heads=1, ffn=32)}
    selection = selection_of(model, scores, shapes)
    assert selection.layers == [1] and selection.heads is not None and selection.ffn is not None
    assert selection.heads[0].query.tolist() == [2, 3] and selection.heads[0].key_value.tolist() == [1]
    assert set(selection.ffn[0].tolist()) == set(scores.ffn[1].topk(32).indices.tolist())
    assert list(search_space(model, scores).layers[1].heads) == [2, 4]


def test_layers_that_share_a_position_bias_keep_the_same_heads(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("mpnet")
    checkpoint, scores = load_checkpoint(folder), scores_of(folder)
    space, costs = search_space(checkpoint.model, scores), weight_costs(checkpoint)
    budget = costs.rest + 0.5 * (costs.of(space.whole) - costs.rest)
    found = search(space, costs, budget)
    assert len({shape.heads for shape in found.values()}) == 1
    smaller = select(checkpoint.model, selection_of(checkpoint.model, scores, found))
    assert list(found.values()) == shapes_of(smaller).layers


def test_what_is_protected_stays_whole(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("bert")
    checkpoint, scores = load_checkpoint(folder), scores_of(folder)
    space, costs = search_space(checkpoint.model, scores, protect=[1]), weight_costs(checkpoint)
    assert least(space, costs) == {1: shapes_of(checkpoint.model).layers[1]}
    with pytest.raises(UsageError, match="layer 2 cannot be protected: the model has layers 0 to 1"):
        search_space(checkpoint.model, scores, protect=[2])


def test_the_first_layer_of_modernbert_stays(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("modernbert")
    checkpoint, scores = load_checkpoint(folder), scores_of(folder)
    space = search_space(checkpoint.model, scores)
    assert [options.dropped is None for options in space.layers] == [True, False]
    assert set(least(space, weight_costs(checkpoint))) == {0}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "exactly one of latency_ms, size_mb, flops; given were none"),
        ({"size_mb": 3, "flops": 0.5}, "given were size_mb, flops"),
        ({"flops": 1.5}, "flops is 1.5; it must be more than 0 and at most 1"),
        ({"size_mb": 0}, "size_mb is 0; it must be more than 0"),
        ({"latency_ms": float("nan"), "backend": "onnx"}, "latency_ms is nan"),
        ({"latency_ms": 2.0}, "needs the backend that it is measured on"),
        ({"size_mb": 3, "threads": 2}, "counted, not timed"),
        ({"flops": 0.5, "precision": "int8"}, "the same on every backend and in every precision"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Budget.model_validate(values)
    with pytest.raises(ValidationError):
        Budget.model_validate({"size_mb": 3, "batch_size": 0})
