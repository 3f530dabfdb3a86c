"""Language modelling: fill-mask for encoders, text-generation (next token) for decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...errors import InputError
from ..batching import IGNORED_LABEL, Batch, Examples, Feature
from ..data import Data, Field
from .base import Task, texts_of, tokenize

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MASKED_SHARE = 0.15
"""BERT's share of masked tokens (Devlin et al. 2019)."""


class _LanguageModeling(Task):
    output = "logits"
    fields = (Field("text", ("sentence", "content", "review", "document")),)

    def predictions(self, outputs: Mapping[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
        """At every scored token of a row: its negative log-likelihood (nats), the top token and its probability."""
        logits = np.asarray(outputs[self.output], dtype=np.float32)
        columns = ("nll", "top_token", "confidence")
        kept: dict[str, np.ndarray] = {name: np.empty(len(logits), dtype=object) for name in columns}
        for i, (row, target) in enumerate(zip(*self._aligned(logits, batch["labels"].numpy()), strict=True)):
            scored = target != IGNORED_LABEL
            row, target = row[scored], target[scored]
            log_probabilities = row - _logsumexp(row)
            kept["nll"][i] = -log_probabilities[np.arange(len(target)), target]
            kept["top_token"][i] = row.argmax(axis=-1)
            kept["confidence"][i] = np.exp(log_probabilities.max(axis=-1, initial=-np.inf))
        return kept

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        logits, targets = self._aligned(outputs[self.output].float(), batch["labels"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _aligned(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        return logits, labels


class FillMask(_LanguageModeling):
    """Masks 15 % of each row's tokens, the same ones at every run, and scores only those."""

    name = "fill-mask"
    auto_class = "AutoModelForMaskedLM"

    def examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        if tokenizer.mask_token_id is None:
            raise InputError("fill-mask needs a tokenizer with a mask token; this one has none.")
        special = set(tokenizer.all_special_ids)
        features = tokenize(texts_of(data, "text"), tokenizer, max_length)
        return Examples([_masked(feature, i, tokenizer.mask_token_id, special) for i, feature in enumerate(features)])


def _masked(feature: Feature, seed: int, mask_id: int, special: set[int]) -> Feature:
    ids = np.asarray(feature["input_ids"])
    open_to_masking = np.flatnonzero([token not in special for token in ids])
    count = min(len(open_to_masking), max(1, round(MASKED_SHARE * len(open_to_masking))))
    chosen = np.random.default_rng(seed).choice(open_to_masking, size=count, replace=False)
    labels = np.full(len(ids), IGNORED_LABEL)
    labels[chosen] = ids[chosen]
    ids[chosen] = mask_id
    return {**feature, "input_ids": ids.tolist(), "labels": labels.tolist()}


class TextGeneration(_LanguageModeling):
    """Long texts are cut into windows of `max_length` tokens, none of them dropped."""

    name = "text-generation"
    auto_class = "AutoModelForCausalLM"

    def forward_flags(self) -> dict[str, Any]:
        return {"use_cache": False}

    def examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        features: list[Feature] = []
        encoded = tokenizer(texts_of(data, "text"), padding=False, verbose=False)["input_ids"]
        for ids in encoded:
            for start in range(0, len(ids), max_length):
                window = ids[start : start + max_length]
                if len(window) > 1:  # a single token predicts nothing
                    features.append({"input_ids": window, "attention_mask": [1] * len(window), "labels": window})
        if not features:
            raise InputError(f"{data.source} holds no text of at least two tokens.")
        return Examples(features)

    def _aligned(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        """Position t predicts token t + 1."""
        return logits[:, :-1], labels[:, 1:]


def _logsumexp(values: np.ndarray) -> np.ndarray:
    top = values.max(axis=-1, keepdims=True, initial=-np.inf)
    return np.asarray(top + np.log(np.exp(values - top).sum(axis=-1, keepdims=True)))
