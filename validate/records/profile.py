"""What texts and answers look like, as a record small enough to keep beside a release: live traffic is held to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...files import read_document, write_json

BASELINE_FILE = "monitoring.json"
BASELINE_SCHEMA: Final = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Histogram(_Record):
    """Counts of a figure between edges: `counts[i]` values lie above `edges[i - 1]` and up to `edges[i]`, the first
    below all edges, the last above all."""

    count: int = Field(ge=1)
    mean: float
    p5: float
    p50: float
    p95: float
    edges: list[float] = Field(min_length=1)
    counts: list[int]

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        if len(self.counts) != len(self.edges) + 1 or sum(self.counts) != self.count or min(self.counts) < 0:
            raise ValueError("the counts of a histogram must be one more than its edges, and add up to its count")
        if any(right <= left for left, right in itertools.pairwise(self.edges)):
            raise ValueError("the edges of a histogram must rise")
        return self


class Categories(_Record):
    """Shares of each kind, over `count` texts that came independently: a text has many words, whose tags did not."""

    count: int = Field(ge=1)
    shares: dict[str, float]


class TextProfile(_Record):
    """What goes in. Tokens are counted before a text is cut, special tokens included. Characters a token fall where a
    tokenizer meets words that it has not learnt, also where it works on bytes and nothing is unknown to it."""

    tokens: Histogram
    characters_per_token: Histogram
    unknown_token_rate: float | None = Field(default=None, ge=0, le=1)
    """Share of all tokens; `None` where the tokenizer has no token for what it does not know."""
    unknown_tokens: Categories | None = None
    """Shares of texts with such tokens and without."""


class EmbeddingSketch(_Record):
    """Where embeddings of unit length lie: their mean, how far from it, and along fixed random directions."""

    centre: list[float] = Field(min_length=1)
    cosine_to_centre: Histogram
    projections: list[Histogram]


class Profile(_Record):
    """Texts and what one model answers to them; what its task has no answers of is `None`."""

    artifact_id: str | None = None
    texts: TextProfile
    confidence: Histogram | None = None
    """Of the answer; where a text has many (tagged words, tokens), their mean."""
    labels: Categories | None = None
    negative_log_likelihood: Histogram | None = None
    """Of a text, mean over its tokens, in nats: the perplexity's logarithm."""
    embedding: EmbeddingSketch | None = None

    def parts(self) -> Iterator[tuple[str, Histogram | Categories]]:
        """Everything that can shift, by name, but for the projections of embeddings."""
        found = {
            "tokens": self.texts.tokens,
            "characters_per_token": self.texts.characters_per_token,
            "unknown_tokens": self.texts.unknown_tokens,
            "confidence": self.confidence,
            "labels": self.labels,
            "negative_log_likelihood": self.negative_log_likelihood,
            "cosine_to_centre": self.embedding.cosine_to_centre if self.embedding else None,
        }
        return ((name, part) for name, part in found.items() if part is not None)


class Baseline(_Record):
    """What live traffic will be held against: the validation rows, as the teacher and each candidate saw them."""

    schema_version: Literal[1] = BASELINE_SCHEMA
    task: str
    data: str
    """The data set's name and fingerprint."""
    teacher: Profile
    candidates: dict[str, Profile] = {}

    def save(self, folder: Path) -> Path:
        """Write `monitoring.json`, whole or not at all."""
        path = folder / BASELINE_FILE
        write_json(path, self.model_dump(mode="json"))
        return path


def load_baseline(folder: Path) -> Baseline:
    """Read `monitoring.json`.

    Raises:
        InputError: missing, malformed, or of a newer schema.
    """
    return read_document(folder / BASELINE_FILE, Baseline, BASELINE_SCHEMA)
