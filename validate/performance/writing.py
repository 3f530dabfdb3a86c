"""Text written for a stopwatch: prompts of random tokens, and so many tokens after each, whatever they are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ...exporters.inputs import random_ids

if TYPE_CHECKING:
    from ...backends.decoder import Decoder

_WAKING_TOKENS = 8
_WAKING_SECONDS = 0.02


class TextShape(BaseModel):
    """So many texts at once, the tokens of each one's prompt, and how many are written after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(ge=1)
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=2)
    """The first comes of reading the prompt, every other one of a step."""

    @property
    def length(self) -> int:
        """Tokens of a whole text."""
        return self.prompt_tokens + self.new_tokens

    @property
    def words(self) -> str:
        """`batch 8, 32 tokens after prompts of 256`."""
        return f"batch {self.batch_size}, {self.new_tokens} tokens after prompts of {self.prompt_tokens}"


@dataclass(frozen=True)
class TextTimes:
    """What one batch of texts took, in milliseconds."""

    first_ms: float
    """From the prompts to what follows them."""
    steps_ms: list[float]
    """Of every further token, all texts together: the likeliest token chosen, and read."""

    @property
    def total_ms(self) -> float:
        return self.first_ms + math.fsum(self.steps_ms)


class TimedWriter:
    """Writes one batch of texts again and again. A text does not stop at its end token, so that all take as long."""

    def __init__(self, decoder: Decoder, shape: TextShape, vocabulary: int, seed: int) -> None:
        self._decoder = decoder
        self._shape = shape
        prompt = random_ids(vocabulary, shape.batch_size, shape.prompt_tokens, seed)
        self._prompt = prompt.numpy()

    def write(self, first_token: Callable[[], object] | None = None) -> TextTimes:
        """One batch.

        Args:
            first_token: called once the first token is there; the time that it takes is nobody's.
        """
        shape = self._shape
        first_ms, logits = self._read(shape.prompt_tokens)
        if first_token is not None:
            first_token()
        clock, steps = time.perf_counter_ns, [0] * (shape.new_tokens - 1)
        for index in range(shape.new_tokens - 1):
            length = shape.prompt_tokens + index
            mask = np.ones((shape.batch_size, length + 1), dtype=np.int64)
            positions = np.full((shape.batch_size, 1), length, dtype=np.int64)
            start = clock()
            logits = self._decoder.step(logits.argmax(axis=-1)[:, None], mask, positions)
            steps[index] = clock() - start
        return TextTimes(first_ms, [step / 1e6 for step in steps])

    def _read(self, tokens: int) -> tuple[float, np.ndarray]:
        """Milliseconds of reading the first tokens of the prompts, and the logits of what follows."""
        ids = np.ascontiguousarray(self._prompt[:, :tokens])
        mask, positions = np.ones_like(ids), np.arange(tokens, dtype=np.int64)[None].repeat(len(ids), axis=0)
        start = time.perf_counter_ns()
        self._decoder.start(len(ids))
        logits = self._decoder.step(ids, mask, positions)
        return (time.perf_counter_ns() - start) / 1e6, logits

    def wake(self) -> None:
        """Read the beginning of the prompts for a moment, so that threads which slept are there."""
        woken = time.perf_counter() + _WAKING_SECONDS
        while True:
            self._read(min(self._shape.prompt_tokens, _WAKING_TOKENS))
            if time.perf_counter() >= woken:
                return

    def warm_up(self, longest_seconds: float, tolerance: float) -> tuple[bool, TextTimes]:
        """Write until the median steps of two batches in a row agree within `tolerance` (a share), for
        `longest_seconds` about.

        Returns:
            Whether they came to agree, and the times of the last batch.
        """
        deadline, previous = time.perf_counter() + longest_seconds, math.nan
        while True:
            times = self.write()
            median = float(np.median(times.steps_ms))
            if abs(median - previous) <= tolerance * median:
                return True, times
            if time.perf_counter() > deadline:
                return False, times
            previous = median

    def cache_bytes(self) -> int:
        """What is kept of the texts, in bytes; of all but their last token, after `write`."""
        return self._decoder.cache_bytes()
