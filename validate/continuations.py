"""What a teacher writes after a prompt, and whether a candidate would write the same.

The teacher writes once, greedily; a candidate is then shown prompt and continuation in one plain forward (teacher
forcing) and scored on the continuation alone. No candidate has to generate, and up to the first token that differs this
is what it would have written itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..models.batching import IGNORED_LABEL, Examples, Feature, padding_id
from ..models.checkpoint import Checkpoint
from .drafts import MetricDraft, by_bootstrap, by_wilson
from .predictions import Predictions

NEW_TOKENS = 32
_AT_ONCE = 8


def continued(teacher: Checkpoint, prompts: Sequence[str], limit: int) -> Examples:
    """Each prompt with the teacher's greedy continuation of at most 32 tokens, which alone is scored. A prompt is cut
    so that both fit into `limit` tokens (at least half of which are the prompt's)."""
    room = min(NEW_TOKENS, limit // 2)
    encoded = teacher.tokenizer(list(prompts), truncation=True, max_length=limit - room, padding=False)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    features: list[Feature] = [{} for _ in encoded]
    for start in range(0, len(order), _AT_ONCE):
        rows = order[start : start + _AT_ONCE]
        prompt_ids = [encoded[row] for row in rows]
        for row, prompt, new in zip(rows, prompt_ids, _greedy(teacher, prompt_ids, room), strict=True):
            whole = [*prompt, *new]
            labels = [IGNORED_LABEL] * len(prompt) + new
            features[row] = {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels}
    return Examples(features)


@torch.inference_mode()
def _greedy(teacher: Checkpoint, prompts: Sequence[list[int]], room: int) -> list[list[int]]:
    """What the model finds likeliest, token by token, up to its end token, and with it."""
    from transformers import GenerationConfig

    model, fill = teacher.model, padding_id(teacher.tokenizer)
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else teacher.tokenizer.eos_token_id
    width = max(map(len, prompts))
    ids = [[fill] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    # its penalties and samplers would fill what is left open, and what is written would not be what it finds likeliest
    model.generation_config = GenerationConfig()
    try:
        written = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=GenerationConfig(
                max_new_tokens=room, do_sample=False, pad_token_id=fill, eos_token_id=ends
            ),
        )
    finally:
        model.generation_config = own
    return [_to_the_end(row[width:].tolist(), ends) for row in written]


def _to_the_end(tokens: list[int], ends: int | list[int] | None) -> list[int]:
    known = ends if isinstance(ends, list) else [ends]
    first = next((place for place, token in enumerate(tokens) if token in known), len(tokens))
    return tokens[: first + 1]


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
