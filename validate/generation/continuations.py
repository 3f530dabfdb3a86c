"""What a teacher writes after a prompt, and whether a candidate would write the same.

The teacher writes once, greedily; a candidate is then shown prompt and continuation in one plain forward (teacher
forcing) and scored on the continuation alone. No candidate has to generate, and up to the first token that differs this
is what it would have written itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...models.batching import IGNORED_LABEL, Examples, Feature
from ...models.checkpoint import Checkpoint
from ..metrics.drafts import MetricDraft, by_bootstrap, by_wilson
from ..predictions import Predictions
from .greedy import greedy

NEW_TOKENS = 32


def continued(teacher: Checkpoint, prompts: Sequence[str], limit: int) -> Examples:
    """Each prompt with the teacher's greedy continuation of at most 32 tokens, which alone is scored. A prompt is cut
    so that both fit into `limit` tokens (at least half of which are the prompt's)."""
    room = min(NEW_TOKENS, limit // 2)
    encoded = teacher.tokenizer(list(prompts), truncation=True, max_length=limit - room, padding=False)["input_ids"]
    features: list[Feature] = []
    for prompt, new in zip(encoded, greedy(teacher, encoded, room), strict=True):
        whole, labels = [*prompt, *new], [IGNORED_LABEL] * len(prompt) + new
        features.append({"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels})
    return Examples(features)


def continuation_drafts(teacher: Predictions, candidate: Predictions) -> Iterator[MetricDraft]:
    """`same_continuation`, the share of prompts after which the candidate writes what the teacher wrote, to the last
    token; and `tokens_until_divergence`, how many it writes alike before it leaves."""
    alike = [ours == theirs for ours, theirs in zip(candidate["top_token"], teacher["top_token"], strict=True)]
    whole, n = np.array([bool(row.all()) for row in alike]), len(alike)
    told = "share of prompts whose greedy continuation is the teacher's, token for token"
    yield MetricDraft("same_continuation", told, whole, _mean, by_wilson, n)
    until = np.array([len(row) if row.all() else int(np.argmin(row)) for row in alike], dtype=float)
    told = f"tokens that are the teacher's before the first that is not, mean over prompts, of at most {NEW_TOKENS}"
    yield MetricDraft("tokens_until_divergence", told, until[:, None], _mean, by_bootstrap, n, unit="tokens")


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean(dtype=np.float64))
