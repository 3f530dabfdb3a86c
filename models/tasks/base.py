"""What every task offers to the rooms above."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from ...errors import InputError
from ..batching import Batch, Examples, Feature
from ..data import Data, Field
from ..embedding import Pooling

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class Task(ABC):
    """One task: rows -> batches, outputs -> predictions, batch and outputs -> a loss."""

    name: ClassVar[str]
    auto_class: ClassVar[str]
    """The transformers auto class that loads a model for this task."""
    output: ClassVar[str]
    """The model output that quality is measured on."""
    fields: ClassVar[tuple[Field, ...]]
    optional_fields: ClassVar[tuple[Field, ...]] = ()

    def module(self, model: nn.Module, pooling: Pooling) -> nn.Module:
        """What is trained and exported: the model itself, or the model with its head."""
        return model

    def forward_flags(self) -> dict[str, Any]:
        """Keyword arguments that are constants of the exported forward (no cache, say)."""
        return {}

    @abstractmethod
    def examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        """Tokenise the rows, each cut at `max_length` tokens; `config` names the model's labels.

        Raises:
            InputError: a label that the model does not have, or rows without text.
        """

    def training_examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        """The rows as they are trained on, which for most tasks is how they are measured on (see `examples`)."""
        return self.examples(data, tokenizer, max_length, config)

    def at_epoch(self, feature: Feature, row: int, epoch: int, tokenizer: PreTrainedTokenizerBase) -> Feature:
        """A training example as one epoch shows it: what is drawn at random is drawn here."""
        return feature

    @abstractmethod
    def predictions(self, outputs: Mapping[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
        """What is kept of one batch's outputs, as arrays whose first axis is the batch."""

    @abstractmethod
    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """A scalar, the mean over the batch, whose gradient says what matters: the task's loss with labels; without
        them, the output in a random direction (its squared gradient estimates how far the output moves when something
        is removed)."""


def texts_of(data: Data, field: str) -> list[str]:
    """The field's text in every row.

    Raises:
        InputError: a row without it (an empty cell of a CSV file, say), which would be read as the word "None".
    """
    texts = data.values(field)
    if None in texts:
        raise InputError(
            f"Row {data.first_row + texts.index(None) + 1} of {data.source} has no {field}.",
            "Fill it in, or drop the row.",
        )
    if not any(isinstance(text, str) for text in texts):
        raise InputError(
            f"The column {data.columns[field]!r} of {data.source} holds no text: its first value is {texts[0]!r}.",
            f"Name another column: --column {field}=COLUMN.",
        )
    return [str(text) for text in texts]


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Feature]:
    """Token ids of each text, cut at `max_length`, without padding."""
    encoded = tokenizer(texts, truncation=True, max_length=max_length, padding=False, return_attention_mask=True)
    return [{name: encoded[name][i] for name in encoded} for i in range(len(texts))]


def has_content(ids: list[int], tokenizer: PreTrainedTokenizerBase, data: Data, row: int) -> bool:
    """Whether a row of `data` has a token of its own, beside those that mark its ends: an empty text has none.

    Raises:
        InputError: the row holds padding and nothing else, which no cleaning of ours should hide.
    """
    ends = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id not in ends else None
    if any(token not in ends and token != padding for token in ids):
        return True
    if padding in ids:
        raise InputError(
            f"Row {data.first_row + row + 1} of {data.source} is all padding: there is nothing in it to learn from.",
            "Drop the row.",
        )
    return False


def random_direction(output: torch.Tensor) -> torch.Tensor:
    """The output [rows, ...] times a random unit-variance direction, summed over a row and averaged over the rows, as
    every loss is: a Hutchinson estimate of its sensitivity."""
    return (output.float() * torch.randn_like(output, dtype=torch.float32)).sum() / len(output)
