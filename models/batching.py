"""Tokenised examples, and batches of them padded to the longest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Feature = dict[str, Any]
"""One example as token ids: `input_ids`, `attention_mask`, ... and `labels` where the task has them per token."""
Batch = dict[str, torch.Tensor]
"""int64 tensors of shape [batch, sequence]; `labels` may be [batch]."""
Run = Callable[[Mapping[str, torch.Tensor]], Mapping[str, np.ndarray]]
"""Whatever computes a model's named outputs from a batch: eager torch, or a backend's runner."""

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Examples:
    """Tokenised rows, and what they are scored against.

    `references` has one value an example (labels, pair scores), or is `None` where the data has none. A task may
    lay out more features than references: sentence pairs are two features an example.
    """

    features: list[Feature]
    references: np.ndarray | None = None
    pairs: bool = False
    """Features are pairs of texts: all first ones, then all second ones in the same order."""
    window_rows: Sequence[int] | None = None
    """Features are windows of longer texts: the row, counted from 0, that each was cut from."""

    @property
    def rows(self) -> np.ndarray:
        """The row of the data, counted from 0, that each feature is from: int64 [features]."""
        if self.window_rows is not None:
            return np.asarray(self.window_rows, dtype=np.int64)
        count = len(self.features) // 2 if self.pairs else len(self.features)
        return np.arange(len(self.features), dtype=np.int64) % max(count, 1)

    def __len__(self) -> int:
        return len(self.features)


def pad(features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """One batch, padded on the right to its longest example.

    Raises:
        InputError: the tokenizer has no padding token and no end token that could stand in.
    """
    longest = max(len(feature["input_ids"]) for feature in features)
    fill = {"input_ids": padding_id(tokenizer), "labels": IGNORED_LABEL}
    batch: Batch = {}
    for name in features[0]:
        if np.ndim(features[0][name]) == 0:  # one label an example
            batch[name] = torch.tensor([feature[name] for feature in features])
            continue
        rows = np.full((len(features), longest), fill.get(name, 0), dtype=np.int64)
        for row, feature in zip(rows, features, strict=True):
            row[: len(feature[name])] = feature[name]
        batch[name] = torch.from_numpy(rows)
    return batch


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the padding token's, or the end token's where a model has none (as decoders often do)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError(
        "The tokenizer has neither a padding token nor an end token, so its texts cannot be batched.",
        "Set pad_token in the model folder's tokenizer_config.json.",
    )


def batches_by_length(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches of examples of like length (little padding), each with its examples' positions [batch]."""
    order = np.argsort([len(feature["input_ids"]) for feature in examples.features], kind="stable")
    for start in range(0, len(order), batch_size):
        positions = order[start : start + batch_size]
        yield positions, pad([examples.features[i] for i in positions], tokenizer)


def concatenate_in_order(parts: Iterable[tuple[np.ndarray, Mapping[str, Any]]]) -> dict[str, np.ndarray]:
    """Join per-batch arrays [batch, ...] and put them back in the order of the examples."""
    positions, values = [], []
    for where, part in parts:
        positions.append(where)
        values.append(part)
    order = np.argsort(np.concatenate(positions), kind="stable")
    return {name: np.concatenate([part[name] for part in values])[order] for name in values[0]}
