"""Least-squares repair: the formula, what it may read, and that it is kept only where it helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from limbeck.errors import InputError
from limbeck.models.batching import Batch, Examples, pad
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.models.importance import Calibration, get_importance
from limbeck.models.surgery import select
from limbeck.models.tasks.base import tokenize
from limbeck.prune import repair
from limbeck.prune.nearness import MOST_HELD_OUT, parted
from limbeck.prune.pruning import prune
from limbeck.prune.settings import PruneSettings
from limbeck.prune.structured import choose

TinyCheckpoint = Callable[..., Path]
WriteRows = Callable[[Path, Iterable[dict[str, Any]]], Path]


def batch_of(checkpoint: Checkpoint, texts: list[str]) -> Batch:
    return checkpoint.model_inputs(pad(tokenize(texts, checkpoint.tokenizer, 64), checkpoint.tokenizer))


@torch.inference_mode()
def hidden_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model.eval()(**batch).last_hidden_state


def tiny_data(checkpoint: Checkpoint, texts: list[str], write_jsonl: WriteRows, folder: Path) -> Data:
    return checkpoint.read(write_jsonl(folder / "rows.jsonl", [{"text": text} for text in texts]))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert"])
@pytest.mark.parametrize("structure", ["heads", "ffn"])
def test_repair_comes_nearer_to_the_whole(
    family: str,
    structure: str,
    tiny_checkpoint: TinyCheckpoint,
    texts: list[str],
    write_jsonl: WriteRows,
    tmp_path: Path,
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    data = tiny_data(checkpoint, texts, write_jsonl, tmp_path)
    batch = batch_of(checkpoint, texts)
    real = batch["attention_mask"].bool()
    whole = hidden_of(checkpoint.model, batch)[real]

    def error(fitted: bool) -> float:
        wanted = PruneSettings(structure=structure, keep=0.5, repair=fitted)  # type: ignore[arg-type]
        pruned = prune(checkpoint, wanted, data)
        return float((hidden_of(pruned.model, batch)[real] - whole).square().mean())

    assert error(fitted=True) < 0.95 * error(fitted=False)


@pytest.mark.parametrize(("family", "structure"), [("bert", "heads"), ("gpt2", "ffn"), ("modernbert", "ffn")])
def test_a_repaired_model_reads_nothing_of_what_goes(
    family: str,
    structure: str,
    tiny_checkpoint: TinyCheckpoint,
    texts: list[str],
    write_jsonl: WriteRows,
    tmp_path: Path,
) -> None:
    """Of the old sizes and repaired, it computes what it computes when the parts have been cut out."""
    checkpoint = load_checkpoint(tiny_checkpoint(family))
    wanted = PruneSettings(structure=structure, keep=0.5)  # type: ignore[arg-type]
    scores = get_importance("magnitude").scores(checkpoint, [structure])
    selection = choose(checkpoint.model, wanted, scores)
    data = tiny_data(checkpoint, texts, write_jsonl, tmp_path)
    examples = checkpoint.task.examples(data, checkpoint.tokenizer, 64, checkpoint.model.config)
    repaired_model = repair.repaired(checkpoint, selection, Calibration(examples)).model
    batch = batch_of(checkpoint, texts)
    torch.testing.assert_close(
        hidden_of(repaired_model, batch), hidden_of(select(repaired_model, selection), batch), rtol=0, atol=1e-5
    )


def test_repair_is_the_least_squares_solution(
    tiny_checkpoint: TinyCheckpoint,
    texts: list[str],
    write_jsonl: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first layer's output projection, against numpy's solver on what a hook saw of the examples not held out."""
    damping = 1e-3
    monkeypatch.setattr(repair, "DAMPINGS", (damping,))
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    data = tiny_data(checkpoint, texts, write_jsonl, tmp_path)
    wanted = PruneSettings(structure="heads", keep=0.5, repair=True)
    output = checkpoint.model.get_submodule("encoder.layer.0.attention.output.dense")
    seen: list[torch.Tensor] = []
    examples = checkpoint.task.examples(data, checkpoint.tokenizer, 64, checkpoint.model.config)
    fitted_to, _ = parted(Calibration(examples))
    batch = checkpoint.model_inputs(pad(fitted_to.examples.features, checkpoint.tokenizer))
    hook = output.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][batch["attention_mask"].bool()].double())
    )
    hidden_of(checkpoint.model, batch)
    hook.remove()
    selection = choose(checkpoint.model, wanted, get_importance("magnitude").scores(checkpoint, ["heads"]))
    assert selection.heads is not None
    kept = (selection.heads[0].query.unsqueeze(1) * 8 + torch.arange(8)).flatten()
    inputs, weight = seen[0], output.weight.detach().double()
    gone = torch.tensor([channel for channel in range(32) if channel not in kept.tolist()])
    scale = 1 / inputs.norm(dim=1, keepdim=True)
    mean = (scale**2 * inputs).sum(dim=0) / (scale**2).sum()
    drawn = (damping * (scale * (inputs - mean)[:, kept]).square().sum(dim=0)).sqrt()
    ones = torch.cat([scale, torch.zeros(len(kept), 1, dtype=torch.float64)])
    rows = torch.cat([torch.cat([scale * inputs[:, kept], drawn.diag()]), ones], dim=1)
    lost = torch.cat([scale * (inputs[:, gone] @ weight[:, gone].T), torch.zeros(len(kept), 32, dtype=torch.float64)])
    solution = torch.linalg.lstsq(rows, lost).solution
    expected = weight[:, kept] + solution[:-1].T
    pruned = prune(checkpoint, wanted, data).model.get_submodule("encoder.layer.0.attention.output.dense")
    assert torch.allclose(pruned.bias.double(), output.bias.double() + solution[-1], atol=1e-3)
    assert torch.allclose(pruned.weight.double(), expected, atol=1e-4)


def test_a_repair_that_does_harm_is_dropped_and_one_that_helps_is_kept(
    tiny_checkpoint: TinyCheckpoint,
    texts: list[str],
    write_jsonl: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every fit of the first layer is turned the wrong way round: that layer alone is cut without one."""
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    data = tiny_data(checkpoint, texts, write_jsonl, tmp_path)
    wanted = PruneSettings(structure="ffn", keep=0.5, repair=True)
    good = prune(checkpoint, wanted, data)
    assert "Repair kept in 2 of 2 layers" in str(good.lineage.steps[-1].note)
    fits, layers = repair.fits, iter((True, False))

    def harmful_once(*args: Any) -> Iterator[repair.Fit]:
        harmful = next(layers)
        return ((-weight, bias) if harmful else (weight, bias) for weight, bias in fits(*args))

    monkeypatch.setattr(repair, "fits", harmful_once)
    guarded = prune(checkpoint, wanted, data)
    assert "Repair kept in 1 of 2 layers" in str(guarded.lineage.steps[-1].note)
    plain = prune(checkpoint, wanted.model_copy(update={"repair": False}))
    down = "encoder.layer.{}.output.dense.weight"
    weights = [[model.model.get_parameter(down.format(i)) for i in (0, 1)] for model in (guarded, plain)]
    assert torch.equal(weights[0][0], weights[1][0])
    assert not torch.equal(weights[0][1], weights[1][1])


def test_repair_judges_by_examples_that_it_was_not_fitted_to(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: WriteRows, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    pairs = [{"sentence1": text, "sentence2": f"{text} Indeed."} for text in texts]
    data = checkpoint.read(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    examples = checkpoint.task.examples(data, checkpoint.tokenizer, 64, checkpoint.model.config)

    def rows(calibration: Calibration) -> set[int]:
        return {examples.features.index(feature) % len(texts) for feature in calibration.examples.features}

    fitted_to, held_out = parted(Calibration(examples))
    assert len(rows(held_out)) == round(0.2 * len(texts)) and len(held_out.examples) == 2 * len(rows(held_out))
    assert not rows(fitted_to) & rows(held_out) and rows(fitted_to) | rows(held_out) == set(range(len(texts)))
    many = Calibration(Examples(examples.features * 10))
    assert len(parted(many)[1].examples) <= MOST_HELD_OUT
    one = checkpoint.read(write_jsonl(tmp_path / "one.jsonl", [{"text": texts[0]}]))
    with pytest.raises(InputError, match="held out to judge by, and there is one alone"):
        prune(checkpoint, PruneSettings(structure="ffn", keep=0.5, repair=True), one)
