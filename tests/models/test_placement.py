"""Models go to the GPU to be looked at where one has room; here there need be none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from limbeck.models import placement
from limbeck.models.batching import Examples
from limbeck.models.checkpoint import hash_of_model, load_checkpoint
from limbeck.models.importance import Calibration, get_importance
from limbeck.models.placement import has_room, placed
from limbeck.models.tasks.base import tokenize

TinyCheckpoint = Callable[..., Path]


def test_a_gpu_needs_room_for_twice_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 4000))
    assert has_room(500) and not has_room(501)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not has_room(1)


def test_without_room_it_is_the_checkpoint_itself(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "has_room", lambda size: False)
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    assert placed(checkpoint) is checkpoint


def test_what_is_looked_at_there_is_a_copy(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    examples = Examples(tokenize(texts[:8], checkpoint.tokenizer, 64))
    expected = get_importance("fisher").scores(checkpoint, ["heads"], Calibration(examples))
    moved: list[str] = []

    def to_gpu(thing: torch.Tensor | torch.nn.Module) -> torch.Tensor | torch.nn.Module:
        moved.append(type(thing).__name__)
        return thing.clone() if isinstance(thing, torch.Tensor) else thing

    monkeypatch.setattr(placement, "has_room", lambda size: True)
    monkeypatch.setattr(torch.Tensor, "cuda", to_gpu)
    monkeypatch.setattr(torch.nn.Module, "cuda", to_gpu)
    found = get_importance("fisher").scores(checkpoint, ["heads"], Calibration(examples))
    assert moved.count("Tensor") == len(list(checkpoint.model.parameters())) and moved[-1] == "BertModel"
    assert expected.heads is not None and found.heads is not None
    assert all(torch.equal(*pair) for pair in zip(expected.heads, found.heads, strict=True))
    assert hash_of_model(checkpoint.model) == checkpoint.hash


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_scores_on_a_gpu_are_those_on_the_cpu(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    looked_at = Calibration(Examples(tokenize(texts, checkpoint.tokenizer, 64)))
    there = get_importance("activation").scores(checkpoint, ["ffn"], looked_at)
    monkeypatch.setattr(placement, "has_room", lambda size: False)
    here = get_importance("activation").scores(checkpoint, ["ffn"], looked_at)
    assert there.ffn is not None and here.ffn is not None
    for pair in zip(there.ffn, here.ffn, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-6)
