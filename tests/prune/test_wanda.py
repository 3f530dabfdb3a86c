"""Wanda's scores, and what they choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from limbeck.models.anatomy import ANATOMIES, anatomy_of, reduction_axis
from limbeck.models.batching import Examples
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.importance import Calibration
from limbeck.models.sparsity import is_semi_structured
from limbeck.prune.layerwise import Moments
from limbeck.prune.masks import SemiStructured, Share
from limbeck.prune.semi_structured import prune_semi_structured
from limbeck.prune.wanda import Wanda

TinyCheckpoint = Callable[..., Path]


def moments_of(inputs: torch.Tensor) -> Moments:
    """The sums that a layer-by-layer pass would make of these tokens [tokens, in]."""
    return Moments("a matrix", len(inputs), inputs.double().square().sum(dim=0))


def test_scores_are_weights_times_the_norms_of_their_inputs() -> None:
    inputs, weight = torch.randn(50, 6), torch.randn(3, 6)
    expected = weight.abs() * inputs.norm(dim=0) / 50**0.5
    torch.testing.assert_close(Wanda().scores(weight, moments_of(inputs)), expected)


def test_a_loud_input_keeps_small_weights() -> None:
    inputs = torch.tensor([[10.0, 1.0, 1.0, 1.0]])
    weight = torch.tensor([[0.3, 1.0, 2.0, 0.5], [0.01, 1.0, 2.0, 0.5]])
    found = Wanda().sparsify(weight, SemiStructured(2, 4), moments_of(inputs))
    assert found.tolist() == [[pytest.approx(0.3), 0, 2, 0], [0, 1, 2, 0]]


def test_every_output_loses_the_same_share() -> None:
    weight = torch.randn(5, 40) * torch.tensor([[0.01], [0.1], [1], [10], [100]])
    found = Wanda().sparsify(weight, Share(0.3, by_row=True), moments_of(torch.randn(20, 40)))
    assert (found == 0).sum(dim=1).tolist() == [12] * 5


@torch.no_grad()
def one_by_one(checkpoint: Checkpoint, examples: Examples) -> dict[str, torch.Tensor]:
    """2:4 by Wanda from the definition: layers in order, each by a forward of the whole model with the layers before it
    pruned, one example at a time."""
    model = checkpoint.model
    modules = dict(anatomy_of(model).linear_layers(model))
    for index in range(len(anatomy_of(model).layers(model))):
        inside = [name for name in modules if name.startswith(f"{anatomy_of(model).layers_name(model)}.{index}.")]
        squares = {name: torch.zeros(1) for name in inside}

        def see(name: str, inputs: torch.Tensor, squares: dict[str, torch.Tensor] = squares) -> None:
            squares[name] = squares[name] + inputs.flatten(0, -2).square().sum(dim=0)

        handles = [
            modules[name].register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
            for name in inside
        ]
        for feature in examples.features:
            model(**{name: torch.tensor([feature[name]]) for name in checkpoint.input_names})
        for handle in handles:
            handle.remove()
        for name in inside:
            weight = modules[name].weight.T if reduction_axis(modules[name]) == 0 else modules[name].weight
            if weight.shape[0] % 32 or weight.shape[1] % 32:
                continue
            scores = (weight.abs() * squares[name].sqrt()).unflatten(1, (-1, 4))
            weight.unflatten(1, (-1, 4)).scatter_(2, scores.topk(2, dim=2, largest=False).indices, 0)
    return {name: module.weight for name, module in modules.items()}


@pytest.mark.parametrize("family", sorted(ANATOMIES))
def test_a_model_is_pruned_layer_after_layer(family: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    examples = Examples([dict(checkpoint.tokenizer(text)) for text in texts[:12]])
    result = prune_semi_structured(checkpoint, "2:4", "wanda", Calibration(examples, batch_size=5))
    expected = one_by_one(checkpoint, examples)
    skipped = {name for name, _ in result.skipped}
    for name, module in anatomy_of(result.model).linear_layers(result.model):
        # A score may stand on the edge between two sums of floats: then another weight of the same size goes.
        same = (module.weight == expected[name]).float().mean()
        assert same > 0.999, name
        if name not in skipped:
            assert is_semi_structured(module.weight.detach().numpy(), reduction_axis(module))
