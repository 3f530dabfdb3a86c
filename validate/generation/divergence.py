"""How far a candidate's distributions of the next token are from its teacher's: both read the same batch, and what is
kept is one number a token, whatever the vocabulary and however many windows there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import log_softmax

from ...models.batching import IGNORED_LABEL, Run

_ROWS_AT_ONCE, _TOKENS_AT_ONCE = 4, 64
"""Of the teacher's logits that are held beside the candidate's, and of both in float64."""


@dataclass(frozen=True)
class BesideTeacher:
    """A language model that is asked with its teacher: its outputs have `kl` as well, float32 [batch, tokens], of the
    token after each that is scored, 0 elsewhere:

        KL(teacher || candidate) = sum over the vocabulary of p (log p - log q), in nats

    with p the teacher's probabilities and q the candidate's, both of the whole vocabulary and in float64. So defined by
    Kullback and Leibler (1951), and used for quantised models by llama.cpp (`llama-perplexity --kl-divergence`). A
    candidate of another vocabulary has none.
    """

    run: Run
    teacher: Run

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> Mapping[str, np.ndarray]:
        outputs = self.run(batch)
        logits, rows = outputs["logits"], len(batch["labels"])
        scored = (batch["labels"][:, 1:] != IGNORED_LABEL).numpy()
        divergences = np.zeros(logits.shape[:2], dtype=np.float32)
        for start in range(0, rows, _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            theirs = self.teacher({name: value[some] for name, value in batch.items()})["logits"]
            if theirs.shape[-1] != logits.shape[-1]:
                return outputs
            at = np.nonzero(scored[some])
            divergences[some][at] = divergence(theirs[at], logits[some][at])
        return {**outputs, "kl": divergences}


def divergence(teacher: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(teacher || candidate) of logits [tokens, vocabulary]: float64 [tokens], nats."""
    found = np.zeros(len(teacher))
    for start in range(0, len(teacher), _TOKENS_AT_ONCE):
        some = slice(start, start + _TOKENS_AT_ONCE)
        log_p, log_q = (log_softmax(side[some].astype(np.float64), axis=-1) for side in (teacher, candidate))
        likely = np.isfinite(log_p)  # of what the teacher rules out nothing is added
        found[some] = np.sum(np.exp(log_p) * np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=likely), axis=-1)
    return np.maximum(found, 0.0)  # rounding may leave less than nothing
