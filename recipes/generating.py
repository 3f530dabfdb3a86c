"""Text written by an artifact or a checkpoint, for whoever wants to try it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..backends.base import Runner
from ..backends.registry import load_runner
from ..backends.torch_eager import EagerRunner
from ..backends.writing import Writer, WritingSettings, require_text
from ..exporters.artifact import MANIFEST_FILE, read_manifest
from ..models.checkpoint import load_checkpoint, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TextStreamer

Told = Callable[[str], None]


@dataclass(frozen=True)
class Continuation:
    """What was written after one prompt."""

    prompt: str
    text: str
    tokens: int
    ended: bool
    """Whether it came to its end token, and not just to the number of tokens."""


@dataclass(frozen=True)
class Generated:
    """The texts of one batch, and how long they took."""

    continuations: list[Continuation]
    prompt_tokens: int
    """Of the longest prompt."""
    first_token_ms: float
    """From the prompts to their first token."""
    tokens_per_second: float | None
    """Of all texts together, after the first token; `None` where there was no second."""
    cache_bytes: int
    """What was kept of the texts in the end."""


@dataclass(frozen=True)
class LanguageProgram:
    """An artifact or a checkpoint that writes text."""

    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @classmethod
    def open(cls, source: str, threads: int | None = None, trust_remote_code: bool = False) -> LanguageProgram:
        """Open an artifact on its runtime, or a checkpoint (a folder or hub id) in eager torch.

        Raises:
            InputError: neither, or one for another task.
            BackendUnavailable: the artifact's runtime or device is not here.
        """
        folder = Path(source)
        if not (folder / MANIFEST_FILE).exists():
            checkpoint = load_checkpoint(source, trust_remote_code=trust_remote_code)
            require_text(checkpoint.task.name, source)
            return cls(EagerRunner(checkpoint, threads), checkpoint.tokenizer, checkpoint.max_length)
        require_text(read_manifest(folder).task, source)
        runner, manifest = load_runner(folder, threads)
        return cls(runner, load_tokenizer(folder), manifest.max_length)

    def writer(self) -> Writer:
        """Raises:
        UsageError: the program keeps no cache."""
        return Writer(self.runner.decoder(), self.tokenizer, self.max_length)


def generate(
    program: LanguageProgram, prompts: Sequence[str], settings: WritingSettings, told: Told | None = None
) -> Generated:
    """Go on with every prompt, as one batch.

    Args:
        told: called with the first prompt once it is accepted, and then with every piece of text as soon as it is
            whole.

    Raises:
        InputError: an empty prompt, one longer than the program holds, or unequal prompts without a padding token.
        UsageError: the program keeps no cache.
    """
    writer = program.writer()
    read = [prompt_tokens(text, program.tokenizer) for text in prompts]
    stream = _streamer(program.tokenizer, told) if told is not None else None
    written: list[list[int]] = [[] for _ in prompts]
    times = [time.perf_counter()]
    with closing(writer.write(read, settings)) as steps:
        for tokens in steps:
            times.append(time.perf_counter())
            for row, token in zip(written, tokens, strict=True):
                if token is not None:
                    row.append(token)
            if told is not None and len(times) == 2:
                told(prompts[0])
            if stream is not None:
                stream.put(torch.tensor(written[0][-1:]))
    if stream is not None:
        stream.end()
    later = sum(map(len, written)) - len(prompts)
    return Generated(
        continuations=[_continuation(*pair, writer) for pair in zip(prompts, written, strict=True)],
        prompt_tokens=max(map(len, read)),
        first_token_ms=(times[1] - times[0]) * 1e3,
        tokens_per_second=later / (times[-1] - times[1]) if later else None,
        cache_bytes=writer.decoder.cache_bytes(),
    )


def prompt_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A text's tokens without the end token that some tokenizers add."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _continuation(prompt: str, tokens: list[int], writer: Writer) -> Continuation:
    text = str(writer.tokenizer.decode(tokens, skip_special_tokens=True))
    return Continuation(prompt, text, len(tokens), ended=tokens[-1] in writer.end_tokens)


def _streamer(tokenizer: PreTrainedTokenizerBase, told: Told) -> TextStreamer:
    """Tokens as pieces of text that no later token changes, by transformers."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            told(text)

    return Streamer(tokenizer, skip_special_tokens=True)
