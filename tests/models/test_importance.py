"""What the importances say, held against the definitions they quote and against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from limbeck.errors import InputError, UsageError
from limbeck.models.anatomy import ANATOMIES, anatomy_of, reduction_axis
from limbeck.models.batching import IGNORED_LABEL, Examples, pad
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.gates import Gates, gated
from limbeck.models.importance import IMPORTANCES, STRUCTURES, Calibration, Scores, get_importance
from limbeck.models.surgery import HeadSelection, Selection, select
from limbeck.models.tasks import TextClassification

TinyCheckpoint = Callable[..., Path]
WriteRows = Callable[[Path, Iterable[dict[str, Any]]], Path]

every_family = pytest.mark.parametrize("family", sorted(ANATOMIES))
WITH_DATA = sorted(name for name, importance in IMPORTANCES.items() if importance.needs_data)


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


def scores_of(
    name: str, checkpoint: Checkpoint, examples: Examples | None, batch_size: int = 4, seed: int = 0
) -> Scores:
    """Of all that this importance can score."""
    importance = get_importance(name)
    calibration = Calibration(examples, batch_size, seed) if examples is not None else None
    return importance.scores(checkpoint, importance.structures, calibration)


def tensors(scores: Scores) -> list[torch.Tensor]:
    single = [tensor for tensor in (scores.layers, scores.width) if tensor is not None]
    return [*(scores.heads or []), *(scores.ffn or []), *single]


class _FirstLogit(TextClassification):
    """A loss that is linear in the output."""

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        first: torch.Tensor = outputs["logits"][:, 0]
        return first.mean()


# The definitions.


@every_family
def test_taylor_and_fisher_are_means_over_the_gradients_of_single_examples(
    family: str, tiny_checkpoint: TinyCheckpoint, rows_file: Path
) -> None:
    """Activations and gradients are taken apart, an example at a time and without gates: the gradient of a gate on what
    a head or channel gives, or a layer adds, is the sum over tokens of that times its gradient."""
    task = "text-classification"
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task=task)
    examples = examples_of(checkpoint, rows_file)
    anatomy = anatomy_of(checkpoint.model)
    layers = anatomy.layers(checkpoint.model)
    seen: dict[tuple[str, int], Any] = {}
    handles = []
    for index, layer in enumerate(layers):
        for name, module in (("heads", anatomy.output), ("ffn", anatomy.down)):
            hook = lambda _, args, key=(name, index): seen.update({key: args[0]})  # noqa: E731
            handles.append(layer.get_submodule(module).register_forward_pre_hook(hook))

        def see(_: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            after = output if isinstance(output, torch.Tensor) else output[0]
            before = args[0] if args else kwargs["hidden_states"]
            seen.update({("layers", index): after, ("into", index): before.detach()})

        handles.append(layer.register_forward_hook(see, with_kwargs=True))
    gradients: dict[tuple[str, int], list[torch.Tensor]] = {}
    for feature in examples.features:
        batch = pad([feature], checkpoint.tokenizer)
        loss = checkpoint.task.loss(checkpoint.module(**checkpoint.model_inputs(batch)), batch)
        keys = [key for key in seen if key[0] != "into"]
        for key, gradient in zip(keys, torch.autograd.grad(loss, [seen[key] for key in keys]), strict=True):
            given = seen[key] - seen["into", key[1]] if key[0] == "layers" else seen[key]
            parts = (given * gradient).detach().double().sum(dim=(0, 1))
            units = {"heads": 4, "ffn": 64, "layers": 1}[key[0]]
            gradients.setdefault(key, []).append(parts.view(units, -1).sum(dim=1))
    for handle in handles:
        handle.remove()
    taylor, fisher = (scores_of(name, checkpoint, examples, batch_size=5) for name in ("taylor", "fisher"))
    for (structure, layer), each in gradients.items():
        stacked = torch.stack(each)
        for scores, wanted in ((taylor, stacked.abs().mean(dim=0)), (fisher, stacked.square().mean(dim=0) / 2)):
            got = getattr(scores, structure)[layer].reshape(-1)
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("family", ["bert", "gpt2", "electra"])
def test_the_width_s_gradients_are_differences_of_the_loss(
    family: str, tiny_checkpoint: TinyCheckpoint, rows_file: Path
) -> None:
    task = "text-classification"
    checkpoint = replace(load_checkpoint(tiny_checkpoint(family, task=task), task=task), task=_FirstLogit())
    checkpoint.model.double()
    every = examples_of(checkpoint, rows_file)
    examples = Examples(every.features[:3])

    @torch.no_grad()
    def losses(channel: int, gate: float) -> torch.Tensor:
        width = torch.ones(32, dtype=torch.float64).index_fill(0, torch.tensor([channel]), gate)
        with gated(checkpoint.model, Gates(width=width)):
            batches = [pad([feature], checkpoint.tokenizer) for feature in examples.features]
            loss = checkpoint.task.loss
            return torch.stack([loss(checkpoint.module(**checkpoint.model_inputs(b)), b) for b in batches])

    taylor, fisher = (scores_of(name, checkpoint, examples).width for name in ("taylor", "fisher"))
    assert taylor is not None and fisher is not None
    for channel in (0, 7, 31):
        differences = (losses(channel, 1.001) - losses(channel, 0.999)) / 0.002
        assert float(taylor[channel]) == pytest.approx(float(differences.abs().mean()), rel=1e-4)
        assert float(fisher[channel]) == pytest.approx(float(differences.square().mean() / 2), rel=1e-4)


# Numbers worked out by hand.


@torch.no_grad()
def linear_gpt2(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    """A GPT-2 whose first layer adds constants and whose second adds nothing. Every token enters as 3 on channel 0;
    the heads write 1, 2, 3, 4 on channel 1 and two feed-forward channels, both at 10, write 5 and -2.5 on channel 2.
    The first logit is channel 1 plus twice channel 2."""
    task = "text-classification"
    checkpoint = load_checkpoint(tiny_checkpoint("gpt2", task=task), task=task)
    model: Any = checkpoint.model
    for parameter in model.parameters():
        parameter.zero_()
    model.transformer.wte.weight[:, 0] = 3
    model.transformer.set_submodule("ln_f", nn.Identity())
    first, second = model.transformer.h
    for head in range(4):
        first.attn.c_attn.bias[64 + 8 * head] = head + 1  # values
        first.attn.c_proj.weight[8 * head, 1] = 1
    first.mlp.c_fc.bias[:2] = 10
    first.mlp.c_proj.weight[0, 2], first.mlp.c_proj.weight[1, 2] = 0.5, -0.25
    model.score.weight[0, 1], model.score.weight[0, 2] = 1, 2
    # Norms of no gain give their bias; channel 7 is 0 after them, so what reads it adds to norms of weights only.
    first.ln_1.bias[5], second.ln_2.bias[5], second.ln_2.bias[6] = -2, 1, 1
    first.attn.c_attn.weight[7, 0], first.attn.c_attn.weight[7, 32], first.attn.c_attn.weight[7, 64] = 2, 2, 4
    first.mlp.c_fc.weight[7, 0] = 1.2
    return replace(checkpoint, task=_FirstLogit())


@dataclass(frozen=True)
class _Worked:
    heads: list[float] | None
    ffn: list[float] | None
    """Of the first two channels; the others' are 0."""
    layers: list[float]


_TURN = 1 - 3 / (9 + 100 + 6.25) ** 0.5  # from (3, 0, 0) to (3, 10, 2.5)


@pytest.mark.parametrize(
    ("name", "worked"),
    [
        ("magnitude", _Worked([5, 1, 1, 1], [1.3, 0.25], [1, 0])),
        ("taylor", _Worked([1, 2, 3, 4], [10, 5], [15, 0])),
        ("fisher", _Worked([0.5, 2, 4.5, 8], [50, 12.5], [112.5, 0])),
        ("activation", _Worked([1, 4, 9, 16], [25, 6.25], [_TURN, 0])),
        ("block-influence", _Worked(None, None, [_TURN, 0])),
    ],
)
def test_scores_worked_out_by_hand(
    name: str, worked: _Worked, tiny_checkpoint: TinyCheckpoint, rows_file: Path
) -> None:
    checkpoint = linear_gpt2(tiny_checkpoint)
    scores = scores_of(name, checkpoint, examples_of(checkpoint, rows_file))
    for got, wanted, units in ((scores.heads, worked.heads, 4), (scores.ffn, worked.ffn, 64)):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            padded = torch.tensor(wanted + [0.0] * (units - len(wanted)), dtype=torch.float64)
            torch.testing.assert_close(got, [padded, torch.zeros_like(padded)], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.layers, torch.tensor(worked.layers, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    if name in ("magnitude", "activation"):
        assert scores.width is not None
        on_five = {"magnitude": 5**0.5, "activation": 3}[name]
        wide = torch.zeros(32, dtype=torch.float64)
        wide[5], wide[6] = on_five, 1
        torch.testing.assert_close(scores.width, wide)


def test_keys_and_values_that_heads_share_count_once(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama"))
    model: Any = checkpoint.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        attention = model.layers[1].self_attn
        attention.q_proj.weight[0, 3], attention.o_proj.weight[3, 0] = 1, 2
        attention.k_proj.weight[0, 3], attention.v_proj.weight[7, 9] = 2, 2
    heads = get_importance("magnitude").scores(checkpoint, ["heads"]).heads
    assert heads is not None and heads[0].tolist() == [0] * 4
    assert heads[1].tolist() == [3, 2, 0, 0]  # half of 2^2 + 2^2 to each of the two that share


# What holds for all of them.


@pytest.mark.parametrize("method", sorted(set(IMPORTANCES) - {"block-influence"}))
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert"])
def test_parts_that_do_nothing_rank_last(
    family: str, method: str, tiny_checkpoint: TinyCheckpoint, rows_file: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    anatomy = anatomy_of(checkpoint.model)
    block, layer = anatomy.ffn(checkpoint.model)[1], anatomy.layers(checkpoint.model)[1]
    head = slice(16, 24)  # the third
    with torch.no_grad():
        output: Any = layer.get_submodule(anatomy.output)
        output.weight.index_fill_(reduction_axis(output), torch.arange(32)[head], 0.0)
        block.down.weight.select(reduction_axis(block.down), 7).zero_()
        if method == "magnitude":
            for module, gone in ((block.up, [7, 7 + block.width] if block.fused else [7]), (block.gate, [7])):
                if module is not None:
                    module.weight.index_fill_(1 - reduction_axis(module), torch.tensor(gone), 0.0)
    scores = scores_of(method, checkpoint, examples_of(checkpoint, rows_file))
    assert scores.heads is not None and scores.ffn is not None
    assert scores.ffn[1].argmin() == 7 and scores.ffn[1][7] == 0 and (scores.ffn[1] > 0).sum() == 63
    assert scores.heads[1].argmin() == 2 and (scores.heads[1] > 0).sum() >= 3
    assert method == "magnitude" or scores.heads[1][2] == 0


@pytest.mark.parametrize("method", WITH_DATA)
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
def test_scores_do_not_depend_on_the_batches_or_their_padding(
    family: str, task: str, method: str, tiny_checkpoint: TinyCheckpoint, rows_file: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task=task)
    examples = examples_of(checkpoint, rows_file)
    before, state = checkpoint.hash, torch.random.get_rng_state()
    alone, same, few, whole = (tensors(scores_of(method, checkpoint, examples, size)) for size in (1, 1, 5, 16))
    for a, b, c, d in zip(alone, same, few, whole, strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b) and (a > 0).any()
        torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-3 * float(a.max()))
        torch.testing.assert_close(d, a, rtol=1e-3, atol=1e-3 * float(a.max()))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert hash_of_model(checkpoint.model) == before
    assert all(parameter.grad is None for parameter in checkpoint.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in checkpoint.model.modules())


@every_family
def test_layers_of_different_sizes_have_scores_of_different_sizes(
    family: str, tiny_checkpoint: TinyCheckpoint, rows_file: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    shared = ANATOMIES[family].key_value_heads is not None
    kept = [[0, 2], [0, 2]] if family == "mpnet" else [[0, 1, 2, 3], [0, 2]] if shared else [[0, 1, 3], [2]]
    heads = [HeadSelection(torch.tensor(some), torch.tensor([0, 1] if shared else some)) for some in kept]
    ffn = [torch.arange(24), torch.arange(40)]
    smaller = replace(checkpoint, model=select(checkpoint.model, Selection(heads=heads, ffn=ffn)))
    for name in IMPORTANCES:
        scores = scores_of(name, smaller, examples_of(smaller, rows_file))
        assert scores.layers is not None and scores.layers.shape == (2,)
        if name != "block-influence":
            assert scores.heads is not None and scores.ffn is not None and scores.width is not None
            assert [len(each) for each in scores.heads] == [len(some) for some in kept]
            assert [len(each) for each in scores.ffn] == [24, 40] and scores.width.shape == (32,)
        assert all(tensor.isfinite().all() and tensor.device.type == "cpu" for tensor in tensors(scores))


def test_only_what_is_asked_for_is_scored_and_progress_is_told(
    tiny_checkpoint: TinyCheckpoint, rows_file: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    for name in WITH_DATA:
        told: list[tuple[int, int]] = []
        calibration = Calibration(
            examples_of(checkpoint, rows_file), 5, progress=lambda done, total, told=told: told.append((done, total))
        )
        scores = get_importance(name).scores(checkpoint, ["layers"], calibration)
        assert scores.heads is None and scores.ffn is None and scores.width is None and scores.layers is not None
        assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


# Losses.


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_without_labels_the_seed_draws_the_directions(
    task: str, tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: WriteRows, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task=task), task=task)
    rows = [{"text": text, "tokens": text.split()} for text in texts]
    examples = examples_of(checkpoint, write_jsonl(tmp_path / "bare.jsonl", rows))
    assert examples.references is None
    one, same, other = (tensors(scores_of("fisher", checkpoint, examples, seed=seed))[2] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    order = torch.corrcoef(torch.stack([one.argsort().argsort(), other.argsort().argsort()]).double())
    assert order[0, 1] > 0.8  # different directions, nearly the same ranking


def test_rows_of_which_nothing_is_scored_do_not_count(tiny_checkpoint: TinyCheckpoint, rows_file: Path) -> None:
    task = "token-classification"
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task=task), task=task)
    examples = examples_of(checkpoint, rows_file)
    mute = [{**feature, "labels": [IGNORED_LABEL] * len(feature["labels"])} for feature in examples.features[:5]]
    wanted = tensors(scores_of("taylor", checkpoint, examples))
    got = tensors(scores_of("taylor", checkpoint, Examples([*examples.features, *mute])))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    with pytest.raises(InputError, match="No example has anything that token-classification scores"):
        scores_of("taylor", checkpoint, Examples(mute))


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_a_loss_that_is_not_a_number_is_an_error(method: str, tiny_checkpoint: TinyCheckpoint, rows_file: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    with torch.no_grad():
        checkpoint.model.get_parameter("classifier.weight").fill_(float("inf"))
    with pytest.raises(InputError, match=r"The loss of .* is nan; nothing can be ranked by it"):
        scores_of(method, checkpoint, examples_of(checkpoint, rows_file))


# What is refused.


def test_an_unknown_importance_is_named_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"magnitude, taylor, fisher.*Did you mean 'taylor'"):
        get_importance("tailor")


def test_what_cannot_be_scored_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    with pytest.raises(UsageError, match="'block-influence' scores layers, not heads"):
        get_importance("block-influence").scores(checkpoint, ["heads"], None)
    with pytest.raises(UsageError, match=f"valid are {', '.join(STRUCTURES)}. Did you mean 'heads'"):
        get_importance("magnitude").scores(checkpoint, ["head"], None)


@pytest.mark.parametrize("method", WITH_DATA)
def test_nothing_to_look_at_is_refused(method: str, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    with pytest.raises(UsageError, match=f"Importance '{method}' needs examples"):
        scores_of(method, checkpoint, None)
    with pytest.raises(InputError, match="There are no examples"):
        scores_of(method, checkpoint, Examples([]))
