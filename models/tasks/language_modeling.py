"""Language modelling: fill-mask for encoders, text-generation (next token) for decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...errors import InputError
from ..batching import IGNORED_LABEL, Batch, Examples, Feature
from ..data import Data, Field
from .base import Task, has_content, texts_of, tokenize

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MASKED_SHARE = 0.15
"""BERT's share of masked tokens (Devlin et al. 2019)."""
OVERLAP = 4
"""Part of a window that the one before has scored: one over this."""


class _LanguageModeling(Task):
    output = "logits"
    fields = (Field("text", ("sentence", "content", "review", "document")),)

    def predictions(self, outputs: Mapping[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
        """At every scored token of a row: its negative log-likelihood (nats), the top token and its probability; and
        `kl` [batch, sequence], where the outputs have it."""
        logits = np.asarray(outputs[self.output], dtype=np.float32)
        columns, labels = ("nll", "top_token", "confidence"), batch["labels"].numpy()
        kept: dict[str, np.ndarray] = {name: np.empty(len(logits), dtype=object) for name in columns}
        for i, (row, target) in enumerate(zip(*self._aligned(logits, labels), strict=True)):
            scored = target != IGNORED_LABEL
            row, target = row[scored], target[scored]
            log_probabilities = row - _logsumexp(row)
            kept["nll"][i] = -log_probabilities[np.arange(len(target)), target]
            kept["top_token"][i] = row.argmax(axis=-1)
            kept["confidence"][i] = np.exp(log_probabilities.max(axis=-1, initial=-np.inf))
        if "kl" in outputs:
            kept["kl"] = np.empty(len(logits), dtype=object)
            for i, (row, target) in enumerate(zip(*self._aligned(outputs["kl"], labels), strict=True)):
                kept["kl"][i] = row[target != IGNORED_LABEL]
        return kept

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        logits, targets = self._aligned(outputs[self.output].float(), batch["labels"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _aligned(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        return logits, labels


class FillMask(_LanguageModeling):
    """Masks 15 % of each row's tokens, the same ones at every run, and scores only those; in training every epoch masks
    others (as RoBERTa does: Liu et al. 2019)."""

    name = "fill-mask"
    auto_class = "AutoModelForMaskedLM"

    def examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        features = self.training_examples(data, tokenizer, max_length, config).features
        return Examples([_masked(feature, i, tokenizer) for i, feature in enumerate(features)])

    def training_examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        """The rows without masks, which `at_epoch` draws."""
        if tokenizer.mask_token_id is None:
            raise InputError("fill-mask needs a tokenizer with a mask token; this one has none.")
        return Examples(tokenize(texts_of(data, "text"), tokenizer, max_length))

    def at_epoch(self, feature: Feature, row: int, epoch: int, tokenizer: PreTrainedTokenizerBase) -> Feature:
        """Masks that depend on row and epoch alone: a run that is resumed draws the same."""
        return _masked(feature, (epoch, row), tokenizer)


def _masked(feature: Feature, seed: int | tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> Feature:
    mask_id = tokenizer.mask_token_id
    ids = np.array(feature["input_ids"])
    open_to_masking = np.flatnonzero(~np.isin(ids, tokenizer.all_special_ids))
    count = min(len(open_to_masking), max(1, round(MASKED_SHARE * len(open_to_masking))))
    chosen = np.random.default_rng(seed).choice(open_to_masking, size=count, replace=False)
    labels = np.full(len(ids), IGNORED_LABEL)
    labels[chosen] = ids[chosen]
    ids[chosen] = mask_id
    return {**feature, "input_ids": ids.tolist(), "labels": labels.tolist()}


class TextGeneration(_LanguageModeling):
    """Long texts are cut into windows of `max_length` tokens that overlap by a quarter: every token but a text's first
    is scored, once, and with a quarter of a window before it at least. Windows that only met would score the first
    tokens of each with next to no context, and overstate the perplexity; overlapping by more costs more (by a quarter,
    a third more tokens are computed) and changes it little.

    Sliding windows: https://huggingface.co/docs/transformers/perplexity, whose stride is three quarters here.
    """

    name = "text-generation"
    auto_class = "AutoModelForCausalLM"

    def forward_flags(self) -> dict[str, Any]:
        return {"use_cache": False}

    def examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        encoded = tokenizer(texts_of(data, "text"), padding=False, verbose=False)["input_ids"]
        windows = [(window, row) for row, ids in enumerate(encoded) for window in _sliding_windows(ids, max_length)]
        if not windows:
            raise InputError(f"{data.source} holds no text of at least two tokens.")
        return Examples([window for window, _ in windows], window_rows=[row for _, row in windows])

    def training_examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        """Packed: the rows' texts joined, each ended by the end token, and cut into windows of `max_length`, so that
        nothing but the last window is shorter and no step is spent on padding. Texts see what stands before them in
        their window, as in the training of GPT-3 (Brown et al. 2020). Rows of no token add none."""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        joined: list[int] = []
        for row, ids in enumerate(tokenizer(texts_of(data, "text"), padding=False, verbose=False)["input_ids"]):
            if has_content(ids, tokenizer, data, row):
                joined += ids if ids[-1:] == end else [*ids, *end]
        return Examples(list(_windows(joined, max_length)))

    def _aligned(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        """Position t predicts token t + 1."""
        return logits[:, :-1], labels[:, 1:]


def _sliding_windows(ids: list[int], max_length: int) -> Iterator[Feature]:
    """Windows that start three quarters of their length apart; of each only what follows the one before is scored."""
    stride = max(1, max_length - max_length // OVERLAP)
    for start in range(0, max(1, len(ids) - (max_length - stride)), stride):
        window = ids[start : start + max_length]
        seen = max_length - stride if start else 0
        if len(window) > max(1, seen):  # a single token predicts nothing
            labels = [IGNORED_LABEL] * seen + window[seen:]
            yield {"input_ids": window, "attention_mask": [1] * len(window), "labels": labels}


def _windows(ids: list[int], max_length: int) -> Iterator[Feature]:
    for start in range(0, len(ids), max_length):
        window = ids[start : start + max_length]
        if len(window) > 1:  # a single token predicts nothing
            yield {"input_ids": window, "attention_mask": [1] * len(window), "labels": window}


def _logsumexp(values: np.ndarray) -> np.ndarray:
    top = values.max(axis=-1, keepdims=True, initial=-np.inf)
    return np.asarray(top + np.log(np.exp(values - top).sum(axis=-1, keepdims=True)))
