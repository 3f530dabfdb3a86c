"""Text from programs without a cache: that it is what a cache gives, and that what has ended is read no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.backends.rereading import Rereading, decoder_of
from limbeck.backends.torch_eager import EagerRunner
from limbeck.backends.writing import Writer, WritingSettings
from limbeck.models.checkpoint import Checkpoint, load_checkpoint

TOKENS = 10
SETTINGS = WritingSettings(max_new_tokens=TOKENS)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint(request.param, task="text-generation"))


def prompts_of(checkpoint: Checkpoint, texts: list[str]) -> list[list[int]]:
    return [checkpoint.tokenizer(text)["input_ids"] for text in texts[:5]]


def test_text_is_that_of_the_cache(checkpoint: Checkpoint, texts: list[str]) -> None:
    runner, prompts = EagerRunner(checkpoint, 1), prompts_of(checkpoint, texts)
    assert len({len(prompt) for prompt in prompts}) > 1
    kept, read = (
        Writer(decoder, checkpoint.tokenizer, checkpoint.max_length).texts(prompts, SETTINGS)
        for decoder in (runner.decoder(), Rereading(checkpoint.run))
    )
    assert kept == read


def test_a_text_that_has_ended_is_run_no_more(checkpoint: Checkpoint, texts: list[str]) -> None:
    sizes: list[int] = []

    def run(batch: Mapping[str, torch.Tensor]) -> Any:
        sizes.append(len(batch["input_ids"]))
        return checkpoint.run(batch)

    prompts = prompts_of(checkpoint, texts)
    writer = Writer(decoder_of(run), checkpoint.tokenizer, checkpoint.max_length)
    whole = writer.texts(prompts, SETTINGS)
    assert all(len(text) == TOKENS for text in whole) and sizes == [5] * TOKENS
    sizes.clear()
    cut = writer.texts(prompts, SETTINGS, lambda place, written: len(written) == place + 1)
    assert cut == [text[: place + 1] for place, text in enumerate(whole)]
    assert sizes == [5, 4, 3, 2, 1]


def test_a_program_with_a_cache_writes_by_it(checkpoint: Checkpoint) -> None:
    assert not isinstance(decoder_of(EagerRunner(checkpoint, 1)), Rereading)
    assert isinstance(decoder_of(checkpoint.run), Rereading)
