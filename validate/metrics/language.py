"""What is measured on language models: perplexity, how often the top token is the teacher's, and how far the
distribution of the next token is from its."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..predictions import Predictions
from .drafts import MetricDraft, figure_of_sums, mean_figure, ratio, share_figure


def language_drafts(teacher: Predictions | None, candidate: Predictions) -> Iterator[MetricDraft]:
    """Windows are drawn whole: the tokens of one are no independent examples."""
    sides = [side["nll"] for side in (candidate, teacher) if side is not None]
    sums = [[*(np.sum(nll) for nll in ours), len(ours[0])] for ours in zip(*sides, strict=True)]
    rows = np.array(sums, dtype=float)
    tokens = int(rows[:, -1].sum())
    told = "exp of the mean negative log-likelihood a token"
    reached = float(_perplexity(rows.sum(axis=0), 1)) if teacher is not None else None
    yield figure_of_sums("perplexity", told, rows, _perplexity, tokens, teacher=reached)
    if teacher is None:
        return
    yield figure_of_sums(
        "perplexity_ratio",
        "perplexity over the teacher's",
        rows,
        lambda sums: ratio(_perplexity(sums), _perplexity(sums, 1)),
        tokens,
    )
    same = [ours == theirs for ours, theirs in zip(candidate["top_token"], teacher["top_token"], strict=True)]
    windows = np.repeat(np.arange(len(same)), [len(window) for window in same])
    told = "share of top tokens that are the teacher's"
    yield share_figure("token_agreement", told, np.concatenate(same), windows)
    if "kl" in candidate:
        told = "KL divergence of the candidate's next-token distribution from the teacher's, mean over tokens"
        yield mean_figure("next_token_kl", told, np.concatenate(list(candidate["kl"])), windows, unit="nats")


def _perplexity(sums: np.ndarray, side: int = 0) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinite where it overflows
        return np.asarray(np.exp(ratio(sums[..., side], sums[..., -1])))
