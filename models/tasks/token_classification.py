"""Token classification: a label for every word, scored on each word's first token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ...errors import InputError
from ..batching import IGNORED_LABEL, Batch, Examples, Feature
from ..data import Data, Field
from .base import Task, random_direction
from .text_classification import label_ids

UNKNOWN_LABEL = -1
"""The label of a scored token whose tag the data does not give; no loss is taken against it."""

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class TokenClassification(Task):
    """Rows hold words (`tokens`) and, where known, one tag a word (`tags`, ids or names)."""

    name = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    output = "logits"
    fields = (Field("tokens", ("words",)),)
    optional_fields = (Field("tags", ("ner_tags", "labels", "pos_tags")),)

    def examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        if not tokenizer.is_fast:
            raise InputError(f"token-classification needs a fast tokenizer; {type(tokenizer).__name__} is a slow one.")
        words = data.values("tokens")
        for row, value in enumerate(words, start=data.first_row + 1):
            if not isinstance(value, list):
                raise InputError(f"Row {row} of {data.source} has {value!r} as tokens, which is not a list of words.")
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, padding=False)
        tags = data.values("tags") if data.has("tags") else None
        features: list[Feature] = []
        for i in range(len(words)):
            ids = label_ids(tags[i], config, data, i) if tags is not None else [UNKNOWN_LABEL] * len(words[i])
            if len(ids) != len(words[i]):
                raise InputError(
                    f"Row {data.first_row + i + 1} of {data.source} has {len(words[i])} tokens and {len(ids)} tags."
                )
            labels = _first_token_labels(encoded.word_ids(i), ids)
            features.append({**{name: encoded[name][i] for name in encoded}, "labels": labels})
        references = np.concatenate([_scored(feature["labels"]) for feature in features]) if tags is not None else None
        return Examples(features, references)

    def predictions(self, outputs: Mapping[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
        labels = batch["labels"].numpy()
        logits = np.asarray(outputs[self.output], dtype=np.float32)
        return {"logits": _rows_of(logits, labels)}

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        logits = outputs[self.output].float()
        labels = batch.get("labels")
        if labels is None:
            return random_direction(logits)
        if (labels == UNKNOWN_LABEL).any():
            return random_direction(logits[labels == UNKNOWN_LABEL])
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _first_token_labels(word_ids: list[int | None], ids: list[int]) -> list[int]:
    """The word's label on its first token, `IGNORED_LABEL` on the others and on special tokens."""
    labels, previous = [], None
    for word in word_ids:
        labels.append(ids[word] if word is not None and word != previous else IGNORED_LABEL)
        previous = word
    return labels


def _scored(labels: list[int]) -> np.ndarray:
    array = np.asarray(labels)
    return np.asarray(array[array != IGNORED_LABEL])


def _rows_of(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Values at the scored tokens of each row, as an object array [batch] of [tokens, ...]."""
    rows = np.empty(len(values), dtype=object)
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        rows[i] = value[label != IGNORED_LABEL]
    return rows
