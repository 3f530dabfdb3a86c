"""A program that writes text: it keeps keys and values of what it has read, and says what comes next."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np


class Decoder(ABC):
    """One batch of texts at a time. The first step after `start` reads the prompts, every other one goes on from there.

    Texts of unequal length are padded on the left, so that all of them end at the same place.
    """

    @abstractmethod
    def start(self, rows: int) -> None:
        """Forget what was read; so many texts come next."""

    @abstractmethod
    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Read some more of every text.

        Args:
            ids: int64 [rows, tokens], the new tokens.
            mask: int64 [rows, read before + tokens], 0 where a text has padding.
            positions: int64 [rows, tokens], the place of each new token in its text.

        Returns:
            float32 [rows, vocabulary], the logits of the token that follows each text; the next call may overwrite it.
        """

    @abstractmethod
    def cache_bytes(self) -> int:
        """What is kept of the texts now, in bytes."""
