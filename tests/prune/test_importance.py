"""What the importances say, held against the definition they quote."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from limbeck.errors import InputError, UsageError
from limbeck.models.anatomy import ANATOMIES, anatomy_of, reduction_axis
from limbeck.models.batching import Examples, pad
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.prune.importance import IMPORTANCES, Calibration, get_importance
from limbeck.prune.settings import PruneSettings

TinyCheckpoint = Callable[..., Path]
WriteRows = Callable[[Path, Iterable[dict[str, Any]]], Path]


@pytest.fixture
def rows_file(texts: list[str], write_jsonl: WriteRows, tmp_path: Path) -> Path:
    """16 rows that serve every task: a text, a label, its words and their tags."""
    rows = [
        {"text": text, "label": index % 3, "tokens": text.split(), "tags": [len(word) % 3 for word in text.split()]}
        for index, text in enumerate(texts[:16])
    ]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def examples_of(checkpoint: Checkpoint, path: Path) -> Examples:
    return checkpoint.task.examples(
        checkpoint.read(path), checkpoint.tokenizer, checkpoint.max_length, checkpoint.model.config
    )


def taylor(checkpoint: Checkpoint, examples: Examples, batch_size: int = 4, seed: int = 0) -> list[torch.Tensor]:
    return get_importance("taylor").ffn_scores(checkpoint, Calibration(examples, batch_size, seed))


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert"])
def test_a_channel_whose_weights_are_zero_ranks_last(
    family: str, method: str, tiny_checkpoint: TinyCheckpoint, rows_file: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    block = anatomy_of(checkpoint.model).ffn(checkpoint.model)[1]
    with torch.no_grad():
        block.down.weight.select(reduction_axis(block.down), 7).zero_()
        if method == "magnitude":
            halves = [7, 7 + block.width] if block.fused else [7]
            for module in (block.up, block.gate):
                if module is not None:
                    module.weight.index_fill_(1 - reduction_axis(module), torch.tensor(halves), 0.0)
    calibration = Calibration(examples_of(checkpoint, rows_file), batch_size=4)
    scores = get_importance(method).ffn_scores(checkpoint, calibration)[1]
    assert scores.argmin() == 7 and scores[7] == 0 and (scores > 0).sum() == 63


@pytest.mark.parametrize("family", sorted(ANATOMIES))
def test_taylor_is_the_squared_sum_of_activation_times_gradient(
    family: str, tiny_checkpoint: TinyCheckpoint, rows_file: Path
) -> None:
    """The gates' gradients against the definition, with activations and gradients taken apart, an example at a time."""
    task = "text-classification"
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task=task)
    examples = examples_of(checkpoint, rows_file)
    blocks = anatomy_of(checkpoint.model).ffn(checkpoint.model)
    expected = [torch.zeros(block.width) for block in blocks]
    inputs: list[torch.Tensor] = []
    handles = [block.down.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in blocks]
    for feature in examples.features:
        inputs.clear()
        batch = pad([feature], checkpoint.tokenizer)
        loss = checkpoint.task.loss(checkpoint.module(**checkpoint.model_inputs(batch)), batch)
        for score, value, gradient in zip(expected, inputs, torch.autograd.grad(loss, inputs), strict=True):
            score.add_((value * gradient).sum(dim=(0, 1)).detach().square() / len(examples))
    for handle in handles:
        handle.remove()
    for got, wanted in zip(taylor(checkpoint, examples, batch_size=5), expected, strict=True):
        torch.testing.assert_close(got, wanted.double(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama"])
def test_magnitude_is_the_norm_of_what_would_be_cut(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    for block, scores in zip(
        anatomy_of(checkpoint.model).ffn(checkpoint.model),
        get_importance("magnitude").ffn_scores(checkpoint, None),
        strict=True,
    ):
        total = sum(
            module.weight.double().square().sum() for module in (block.up, block.gate, block.down) if module is not None
        )
        assert scores.dtype == torch.float64
        torch.testing.assert_close(scores.square().sum(), total)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("distilbert", "sentence-similarity"),
        ("roberta", "text-classification"),
        ("bert", "token-classification"),
        ("mpnet", "fill-mask"),
        ("llama", "text-generation"),
    ],
)
def test_taylor_repeats_and_leaves_the_model_alone(
    family: str, task: str, tiny_checkpoint: TinyCheckpoint, rows_file: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task=task)
    examples = examples_of(checkpoint, rows_file)
    before = torch.random.get_rng_state()
    first, second = taylor(checkpoint, examples), taylor(checkpoint, examples)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) and (a > 0).any() for a, b in zip(first, second, strict=True))
    assert all(parameter.grad is None for parameter in checkpoint.model.parameters())
    assert not any(block.down._forward_pre_hooks for block in anatomy_of(checkpoint.model).ffn(checkpoint.model))


def test_without_labels_the_seed_draws_the_directions(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: WriteRows, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    examples = examples_of(checkpoint, write_jsonl(tmp_path / "bare.jsonl", [{"text": text} for text in texts]))
    one, same, other = (taylor(checkpoint, examples, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    order = torch.corrcoef(torch.stack([one.argsort().argsort(), other.argsort().argsort()]).double())
    assert order[0, 1] > 0.8  # different directions, nearly the same ranking


def test_tokens_without_tags_count_by_the_output_and_not_by_a_made_up_label(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: WriteRows, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="token-classification"))
    bare = examples_of(checkpoint, write_jsonl(tmp_path / "bare.jsonl", [{"tokens": t.split()} for t in texts[:8]]))
    one, other = taylor(checkpoint, bare, seed=1)[0], taylor(checkpoint, bare, seed=2)[0]
    assert bare.references is None and not torch.equal(one, other)


def test_a_loss_that_is_not_a_number_is_an_error(tiny_checkpoint: TinyCheckpoint, rows_file: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    with torch.no_grad():
        checkpoint.model.get_parameter("classifier.weight").fill_(float("inf"))
    with pytest.raises(InputError, match="loss"):
        taylor(checkpoint, examples_of(checkpoint, rows_file))


def test_an_unknown_importance_is_named_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"magnitude, taylor.*Did you mean 'taylor'"):
        get_importance("tailor")


def test_taylor_without_examples_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(UsageError, match="examples"):
        get_importance("taylor").ffn_scores(load_checkpoint(tiny_checkpoint("bert")), None)


def test_settings_name_every_importance() -> None:
    assert set(get_args(PruneSettings.model_fields["method"].annotation)) == set(IMPORTANCES)
