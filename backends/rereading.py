"""Text from whatever computes logits of whole texts, with a cache or without one."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch

from ..errors import UsageError
from ..models.batching import Run
from .base import Runner
from .decoder import Decoder


def decoder_of(run: Run) -> Decoder:
    """The decoder of a program that keeps what it has read; of anything else one that reads it again every time."""
    if isinstance(run, Runner):
        with suppress(UsageError):
            return run.decoder()
    return Rereading(run)


class Rereading(Decoder):
    """Every step runs the whole texts again: for programs without a cache, at as many times the cost as a text has
    tokens. Texts are padded on the right here, where a program without positions among its inputs expects padding; one
    that has ended, of which a step reads padding alone, is left out."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._ids = np.empty((0, 0), dtype=np.int64)

    def start(self, rows: int) -> None:
        self._ids = np.empty((rows, 0), dtype=np.int64)

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self._ids = np.concatenate([self._ids, ids], axis=1)
        going = np.flatnonzero(mask[:, -ids.shape[1] :].any(axis=1))
        texts = [self._ids[row][mask[row] > 0] for row in going]
        lengths = np.array([len(text) for text in texts])
        whole, seen = (np.zeros((len(texts), lengths.max()), dtype=np.int64) for _ in range(2))
        for row, text in enumerate(texts):
            whole[row, : len(text)], seen[row, : len(text)] = text, 1
        batch = {"input_ids": torch.from_numpy(whole), "attention_mask": torch.from_numpy(seen)}
        found = np.asarray(self._run(batch)["logits"])[np.arange(len(texts)), lengths - 1]
        logits = np.zeros((len(ids), found.shape[-1]), dtype=np.float32)
        logits[going] = found
        return logits

    def cache_bytes(self) -> int:
        return self._ids.nbytes
