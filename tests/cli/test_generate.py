"""`limbeck generate`: text to standard output as it is written, what it took to standard error, what cannot write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck import export, load_checkpoint
from limbeck.exporters.settings import ExportSettings

Limbeck = Callable[..., Any]
TinyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", task="text-generation")


@pytest.fixture(scope="module")
def artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "artifact"
    export(load_checkpoint(llama), ExportSettings(backend="onnx"), folder)
    return folder


def test_an_artifact_writes_what_its_checkpoint_writes(artifact: Path, llama: Path, limbeck: Limbeck) -> None:
    told = [limbeck("generate", folder, "--prompt", "Rain fell", "--max-new-tokens", 9) for folder in (artifact, llama)]
    assert [outcome.code for outcome in told] == [0, 0]
    assert told[0].out == told[1].out
    assert told[0].out.startswith("Rain fell") and len(told[0].out) > len("Rain fell\n")
    assert "9 tokens: the first after" in told[0].err and "tokens a second" in told[0].err


def test_what_streams_is_what_is_told_at_once(artifact: Path, limbeck: Limbeck) -> None:
    words = ("generate", artifact, "--prompt", "Rain fell", "--max-new-tokens", 9)
    answer = json.loads(limbeck(*words, "--json").out)
    (text,) = answer["continuations"]
    assert limbeck(*words).out == f"{text['prompt']}{text['text']}\n"
    assert text["tokens"] == 9 and not text["ended"]
    assert answer["cache_bytes"] > 0 and answer["first_token_ms"] > 0


def test_several_prompts_are_one_batch(artifact: Path, limbeck: Limbeck) -> None:
    prompts = ("Rain", "The kettle whistled long before")
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    together = json.loads(limbeck("generate", artifact, *words, "--max-new-tokens", 7, "--json").out)
    for prompt, found in zip(prompts, together["continuations"], strict=True):
        alone = limbeck("generate", artifact, "--prompt", prompt, "--max-new-tokens", 7, "--json")
        assert json.loads(alone.out)["continuations"] == [found]


def test_a_sampled_text_depends_on_its_seed(artifact: Path, limbeck: Limbeck) -> None:
    words = ("generate", artifact, "--prompt", "Rain", "--max-new-tokens", 12, "--temperature", 1.5, "--seed")
    assert limbeck(*words, 1).out == limbeck(*words, 1).out != limbeck(*words, 2).out


def test_what_cannot_write_says_why(
    artifact: Path, llama: Path, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, limbeck: Limbeck
) -> None:
    limbeck("generate", tiny_checkpoint("bert"), "--prompt", "x").assert_refused(4, "sentence-similarity", "no text")
    limbeck("generate", tmp_path / "none", "--prompt", "x").assert_refused(4, "none does not exist")
    limbeck("generate", artifact, "--prompt", "").assert_refused(4, "prompt without tokens")
    limbeck("generate", artifact, "--prompt", "rain " * 80).assert_refused(4, "longer than the 64", "--sequence")
    limbeck("generate", artifact, "--prompt", "x", "--top-k", 3).assert_refused(2, "temperature 0")
    limbeck("generate", artifact, "--prompt", "x", "--top-p", 3).assert_refused(2, "--top-p", "given: 3")
    limbeck("generate", artifact).assert_refused(2, "--prompt")
    scores = tmp_path / "scores"
    export(load_checkpoint(llama), ExportSettings(backend="onnx", kv_cache=False), scores)
    limbeck("generate", scores, "--prompt", "x").assert_refused(2, "writes no text", "--no-kv-cache")


def test_a_tokenizer_without_an_end_token(llama: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    endless = Path(shutil.copytree(llama, tmp_path / "endless"))
    file = endless / "tokenizer_config.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({**known, "eos_token": None, "pad_token": None}))
    outcome = limbeck("generate", endless, "--prompt", "Rain", "--max-new-tokens", 5)
    assert outcome.code == 0 and "has no end token" in outcome.err
    words = ("--prompt", "Rain", "--prompt", "Rain fell on the harbour")
    limbeck("generate", endless, *words).assert_refused(4, "neither a padding token nor an end token")


def test_a_reader_who_leaves_changes_nothing(artifact: Path, limbeck_child: Limbeck) -> None:
    before = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1)"
    outcome = limbeck_child("generate", artifact, "--prompt", "Rain", "--max-new-tokens", 5, before=before)
    assert outcome.code == 0 and "Traceback" not in outcome.err
