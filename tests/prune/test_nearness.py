"""How far two models' outputs are apart, and which examples say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from limbeck.models.batching import Examples, pad
from limbeck.models.checkpoint import load_checkpoint
from limbeck.models.importance import Calibration
from limbeck.models.mapped import copy_of
from limbeck.models.tasks.base import tokenize
from limbeck.prune.nearness import distances

TinyCheckpoint = Callable[..., Path]


@pytest.mark.parametrize("task", ["sentence-similarity", "text-classification", "fill-mask"])
def test_distances_are_relative_to_the_whole_models_outputs(
    task: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    whole = load_checkpoint(tiny_checkpoint("bert", task=task))
    features = tokenize(texts[:7], whole.tokenizer, 64)
    model = copy_of(whole.model, lambda weight: weight.detach() + 0.02)
    changed = replace(whole, model=model)
    same, off = distances(whole, [whole, changed], Calibration(Examples(features), batch_size=3))
    batch = pad(features, whole.tokenizer)
    before, after = (torch.from_numpy(each.run(batch)[whole.task.output]) for each in (whole, changed))
    if whole.task.output == "logits":
        before, after = before - before.mean(-1, keepdim=True), after - after.mean(-1, keepdim=True)
    if before.dim() == 3:
        before, after = before[batch["attention_mask"].bool()], after[batch["attention_mask"].bool()]
    assert same == 0
    assert off == pytest.approx(float((after - before).square().sum() / before.square().sum()), rel=1e-4)
    if task == "sentence-similarity":
        cosine = torch.nn.functional.cosine_similarity(before, after).mean()
        assert off == pytest.approx(float(2 * (1 - cosine)), rel=1e-3)


def test_what_softmax_does_not_see_counts_for_nothing(tiny_checkpoint: TinyCheckpoint, texts: list[str]) -> None:
    whole = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    model = copy_of(whole.model, lambda weight: weight.detach().clone())
    with torch.no_grad():
        model.get_parameter("classifier.bias").add_(3.0)
    looked_at = Calibration(Examples(tokenize(texts[:4], whole.tokenizer, 64)))
    assert distances(whole, [replace(whole, model=model)], looked_at)[0] == pytest.approx(0, abs=1e-9)
