"""Text from a decoder: prompts are read at once, then it is one token after the other, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import InputError, UsageError
from ..models.batching import padding_id
from ..models.tasks.language_modeling import TextGeneration
from .decoder import Decoder

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase


def require_text(task: str, source: str = "It") -> None:
    """Refuse what serves another task than writing.

    Raises:
        InputError: it does.
    """
    if task != TextGeneration.name:
        raise InputError(f"{source} is for {task}, so it writes no text.", f"Give a model for {TextGeneration.name}.")


class WritingSettings(BaseModel):
    """How a text is gone on with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int | None = Field(None, ge=1)
    """What is left of the program's length, and 256 at most, where not given."""
    temperature: float = Field(0.0, ge=0, le=100)
    """0 is greedy: the likeliest token every time."""
    top_k: int | None = Field(None, ge=1)
    """Sample among so many of the likeliest tokens."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Sample among the likeliest tokens that hold this share of the probability (Holtzman et al. 2020,
    arXiv:1904.09751)."""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UsageError(
                "top_k and top_p say what is sampled among, and at temperature 0 nothing is.",
                "Add --temperature 0.8, say.",
            )
        return self

    def warpers(self) -> LogitsProcessorList:
        """transformers' own, in the order of its `generate`."""
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        chosen = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k is not None:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            chosen.append(TopPLogitsWarper(self.top_p))
        return chosen


DEFAULT_NEW_TOKENS = 256
GREEDY = WritingSettings()
Enough = Callable[[int, list[int]], bool]
"""Told a prompt's place and the tokens written after it so far: whether no more of them are wanted."""


@dataclass(frozen=True)
class Writer:
    """A decoder with the tokenizer that its model was made for."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens that a text may have, what is written included: the program's cache holds no more."""

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        settings: WritingSettings = GREEDY,
        enough: Enough = lambda place, written: False,
    ) -> Generator[list[int | None]]:
        """The next token of every text, again and again: `None` for one that its end token, or `enough`, has ended.
        Closing the iterator stops early.

        Args:
            prompts: token ids, at least one each.

        Raises:
            InputError: an empty prompt, one that leaves no room, or prompts of unequal length without a padding token.
        """
        count = self.room(prompts, settings.max_new_tokens)
        ids, mask = self._padded(prompts)
        positions = (mask.cumsum(axis=1) - 1).clip(min=0)
        self.decoder.start(len(prompts))
        logits, last = self.decoder.step(ids, mask, positions), positions[:, -1:]
        choose = _Choice(settings)
        written: list[list[int]] = [[] for _ in prompts]
        going = np.ones(len(prompts), dtype=bool)
        for number in range(1, count + 1):
            tokens = choose(ids, logits)
            yield [int(token) if more else None for token, more in zip(tokens, going, strict=True)]
            for place in np.flatnonzero(going):
                written[place].append(int(tokens[place]))
                going[place] = written[place][-1] not in self.end_tokens and not enough(int(place), written[place])
            if not going.any() or number == count:
                return
            # what would follow an ended text is padding, which nothing reads
            ids, last = tokens[:, None], last + 1
            mask = np.concatenate([mask, going[:, None].astype(np.int64)], axis=1)
            logits = self.decoder.step(ids, mask, last)

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        settings: WritingSettings = GREEDY,
        enough: Enough = lambda place, written: False,
    ) -> list[list[int]]:
        """What is written after every prompt, the end token with it where it came to that (see `write`)."""
        steps = list(self.write(prompts, settings, enough))
        return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]

    @property
    def end_tokens(self) -> list[int]:
        """What ends a text; none where the tokenizer has no end token."""
        return [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]

    def room(self, prompts: Sequence[Sequence[int]], wanted: int | None) -> int:
        """How many tokens are written after these prompts.

        Raises:
            InputError: an empty prompt, or one that leaves no room for what is wanted.
        """
        if not all(prompts):
            raise InputError("A prompt without tokens has nothing to go on from.", "Give it at least one word.")
        longest = max(len(prompt) for prompt in prompts)
        left = self.max_length - longest
        if left < (wanted or 1):
            asked = f" and {wanted} new ones" if wanted else ""
            raise InputError(
                f"A prompt of {longest} tokens{asked} is longer than the {self.max_length} that the program holds.",
                "Cut the prompt, ask for fewer --max-new-tokens, or export the model with a longer --sequence.",
            )
        return wanted or min(left, DEFAULT_NEW_TOKENS)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, int64 [prompts, longest], padded on the left."""
        longest = max(len(prompt) for prompt in prompts)
        uneven = any(len(prompt) < longest for prompt in prompts)
        fill = padding_id(self.tokenizer) if uneven else 0
        ids = np.full((len(prompts), longest), fill, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, (prompt, seen) in enumerate(zip(prompts, mask, strict=True)):
            ids[row, longest - len(prompt) :] = prompt
            seen[longest - len(prompt) :] = 1
        return ids, mask


class _Choice:
    """Which token comes next."""

    def __init__(self, settings: WritingSettings) -> None:
        self._sampled = settings.temperature > 0
        self._warpers = settings.warpers() if self._sampled else None
        self._random = torch.Generator().manual_seed(settings.seed)

    def __call__(self, ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Token ids, int64 [rows], by logits [rows, vocabulary]."""
        if self._warpers is None:
            return np.asarray(logits.argmax(axis=-1), dtype=np.int64)
        warped = self._warpers(torch.from_numpy(ids), torch.from_numpy(np.array(logits)))
        return torch.multinomial(warped.softmax(dim=-1), 1, generator=self._random)[:, 0].numpy()
