"""Sentence similarity: texts -> unit vectors whose cosine says how alike two texts are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ...errors import InputError
from ..batching import Batch, Examples
from ..data import Data, Field
from ..embedding import Pooling, SentenceEmbedder
from .base import Task, random_direction, texts_of, tokenize

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class SentenceSimilarity(Task):
    """Reads either single texts (`text`), or pairs with an optional gold score (`sentence1`, `sentence2`, `score`).

    Pairs become two features each: all first sentences, then all second ones.
    """

    name = "sentence-similarity"
    auto_class = "AutoModel"
    output = "sentence_embedding"
    fields = ()
    optional_fields = (
        Field("text", ("sentence", "content", "review", "query", "question", "passage")),
        Field("sentence1", ("sentence_a", "text1", "text_a", "premise", "question1", "anchor")),
        Field("sentence2", ("sentence_b", "text2", "text_b", "hypothesis", "question2", "positive")),
        Field("score", ("similarity_score", "similarity", "label", "labels")),
    )

    def module(self, model: nn.Module, pooling: Pooling) -> nn.Module:
        return SentenceEmbedder(model, pooling)

    def examples(
        self, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, config: PretrainedConfig
    ) -> Examples:
        if data.has("sentence1") and data.has("sentence2"):
            texts = texts_of(data, "sentence1") + texts_of(data, "sentence2")
            scores = _scores(data) if data.has("score") else None
            return Examples(tokenize(texts, tokenizer, max_length), scores, pairs=True)
        if data.has("text"):
            return Examples(tokenize(texts_of(data, "text"), tokenizer, max_length))
        raise InputError(
            f"{data.source} has no column for 'text', nor for 'sentence1' and 'sentence2'.",
            "Name the column: --column text=COLUMN.",
        )

    def predictions(self, outputs: Mapping[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
        return {"embedding": np.asarray(outputs[self.output], dtype=np.float32)}

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        return random_direction(outputs[self.output])


def _scores(data: Data) -> np.ndarray:
    scores = []
    for row, value in enumerate(data.values("score"), start=data.first_row + 1):
        try:
            scores.append(float(value))
        except (TypeError, ValueError) as error:
            raise InputError(f"Row {row} of {data.source} has the score {value!r}, which is not a number.") from error
    return np.asarray(scores, dtype=np.float64)
