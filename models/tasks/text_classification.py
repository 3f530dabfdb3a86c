"""Text classification: a text (or a pair) -> one of the model's labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...errors import InputError
from ..batching import Batch, Examples
from ..data import Data, Field
from .base import Task, random_direction, texts_of, tokenize

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TEXT = Field("text", ("sentence", "content", "review", "question", "premise", "sentence1"))


class TextClassification(Task):
    """Labels may be the model's label ids or their names."""

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    output = "logits"
    fields = (TEXT,)
    optional_fields = (
        Field("text_pair", ("hypothesis", "sentence2")),
        Field("label", ("labels", "target", "class")),
    )

    def examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        texts = texts_of(data, "text")
        if data.has("text_pair"):
            pairs = texts_of(data, "text_pair")
            encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, padding=False)
            features = [{name: encoded[name][i] for name in encoded} for i in range(len(texts))]
        else:
            features = tokenize(texts, tokenizer, max_length)
        if not data.has("label"):
            return Examples(features)
        labels = label_ids(data.values("label"), config, data)
        with_labels = [{**feature, "labels": label} for feature, label in zip(features, labels, strict=True)]
        return Examples(with_labels, np.asarray(labels))

    def predictions(self, outputs: Mapping[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
        return {"logits": np.asarray(outputs[self.output], dtype=np.float32)}

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        if "labels" in batch:
            return nn.functional.cross_entropy(outputs[self.output].float(), batch["labels"])
        return random_direction(outputs[self.output])


def label_ids(labels: list[Any], config: PretrainedConfig, data: Data, row: int | None = None) -> list[int]:
    """Label ids of labels given as ids or as names: one a row of `data`, or all of them of one `row`.

    Raises:
        InputError: a label that the model does not have.
    """
    by_name = {str(name): int(index) for name, index in (config.label2id or {}).items()}
    ids = []
    for place, label in enumerate(labels):
        index = by_name.get(str(label), label if isinstance(label, int) else None)
        if index is None or not 0 <= int(index) < int(config.num_labels or 0):
            number = data.first_row + (place if row is None else row) + 1
            raise InputError(
                f"Row {number} of {data.source} has the label {label!r}; the model's labels are "
                f"{', '.join(f'{index} ({name})' for name, index in by_name.items())}."
            )
        ids.append(int(index))
    return ids
