"""The examples whose answers a candidate moved furthest from its teacher's: what to read first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.data import TEXT_FIELDS
from ..predictions import Predictions
from ..records.report import ChangedExample, short_number
from .calibration import divergence, softmax
from .retrieval import unit

if TYPE_CHECKING:
    from ..standard import Standard

SHOWN = 20
SHOWN_OF_A_SLICE = 5
_LONGEST_TEXT = 300
_ROUNDING = 1e-6
"""Distances below this are the noise of float32, not a change."""


def most_changed(standard: Standard, answers: Predictions, shown: int = SHOWN) -> list[ChangedExample]:
    """The examples furthest from the teacher's answers, the furthest first: by the KL of the answer (where words are
    tagged, of the word that moved most), by the cosine of the embedding, or by the rise of a row's mean negative
    log-likelihood. None where embeddings of different widths cannot be compared."""
    found = _of_task(standard, answers)
    if found is None:
        return []
    distances = np.where(np.isfinite(found.distances), found.distances, -np.inf)
    order = np.argsort(-distances, kind="stable")[:shown]
    return [_example(standard, found, int(at)) for at in order if distances[at] > _ROUNDING]


class _Distances:
    """How far each row's answer moved, float [rows], in a unit; and both answers to one of them, in words."""

    measure: str
    distances: np.ndarray

    def answers(self, row: int) -> tuple[str, str]:
        """The teacher's and the candidate's."""
        raise NotImplementedError

    def label(self, row: int) -> str | None:
        """What the data say of the row."""
        return None


def _of_task(standard: Standard, answers: Predictions) -> _Distances | None:
    if "logits" in answers:
        kind = _Tags if answers["logits"].dtype == object else _Classes
        return kind(standard, answers["logits"])
    if "embedding" not in answers:
        return _Perplexities(standard, answers)
    same_space = answers["embedding"].shape == standard.predictions["embedding"].shape
    return _Embeddings(standard, answers["embedding"]) if same_space else None


class _Classes(_Distances):
    measure = "KL, nats"

    def __init__(self, standard: Standard, logits: np.ndarray) -> None:
        self._standard = standard
        self._sides = softmax(standard.predictions["logits"]), softmax(logits)
        self.distances = divergence(*self._sides)

    def answers(self, row: int) -> tuple[str, str]:
        theirs, ours = (_class(side[row], self._standard.label_names) for side in self._sides)
        return theirs, ours

    def label(self, row: int) -> str | None:
        known = self._standard.references
        return None if known is None else self._standard.label_names[int(known[row])]


class _Tags(_Distances):
    measure = "KL of the word, nats"

    def __init__(self, standard: Standard, logits: np.ndarray) -> None:
        self._standard = standard
        theirs = [softmax(row) for row in standard.predictions["logits"]]
        self._sides = theirs, [softmax(row) for row in logits]
        moved = [divergence(*both) if len(both[0]) else np.zeros(1) for both in zip(*self._sides, strict=True)]
        self._word = [int(row.argmax()) for row in moved]
        self.distances = np.array([row.max() for row in moved])
        self._starts = np.cumsum([0, *(len(row) for row in theirs)])

    def answers(self, row: int) -> tuple[str, str]:
        at = self._word[row]
        words = self._standard.data.rows[row]["tokens"]
        word = words[at] if at < len(words) else "?"
        theirs, ours = (f"{word}: {_class(side[row][at], self._standard.label_names)}" for side in self._sides)
        return theirs, ours

    def label(self, row: int) -> str | None:
        known = self._standard.references
        return None if known is None else self._standard.label_names[int(known[self._starts[row] + self._word[row]])]


class _Embeddings(_Distances):
    measure = "1 − cosine"

    def __init__(self, standard: Standard, embeddings: np.ndarray) -> None:
        self._standard = standard
        self._sides = unit(standard.predictions["embedding"]), unit(embeddings)
        moved = np.asarray(1 - np.sum(self._sides[0] * self._sides[1], axis=1, dtype=np.float64))
        self.distances = moved.reshape(2, -1).max(axis=0) if standard.pairs else moved

    def answers(self, row: int) -> tuple[str, str]:
        """Of a pair its cosine; of a single text there is nothing to be said in words."""
        if not self._standard.pairs:
            return "–", "–"
        half = len(self.distances)
        theirs, ours = (f"cosine {short_number(float(side[row] @ side[half + row]), 3)}" for side in self._sides)
        return theirs, ours

    def label(self, row: int) -> str | None:
        known = self._standard.references
        return None if known is None else short_number(float(known[row]), 3)


class _Perplexities(_Distances):
    measure = "rise of nats a token"

    def __init__(self, standard: Standard, answers: Predictions) -> None:
        self._means = [_row_means(side["nll"], standard.rows) for side in (standard.predictions, answers)]
        self.distances = self._means[1] - self._means[0]

    def answers(self, row: int) -> tuple[str, str]:
        with np.errstate(over="ignore"):
            theirs, ours = (f"perplexity {short_number(float(np.exp(side[row])), 3)}" for side in self._means)
        return theirs, ours


def _row_means(nll: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The mean over a row's tokens, of all its windows; NaN where it has none."""
    sums = np.bincount(rows, weights=[float(np.sum(part)) for part in nll])
    counts = np.bincount(rows, weights=[float(len(part)) for part in nll])
    return np.asarray(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0))


def _class(probabilities: np.ndarray, names: list[str]) -> str:
    best = int(probabilities.argmax())
    return f"{names[best]} ({short_number(float(probabilities[best]), 3)})"


def _example(standard: Standard, found: _Distances, row: int) -> ChangedExample:
    theirs, ours = found.answers(row)
    return ChangedExample(
        row=standard.data.first_row + row + 1,
        text=_text_of(standard.data.rows[row]),
        label=found.label(row),
        teacher=theirs,
        candidate=ours,
        distance=float(found.distances[row]),
        measure=found.measure,
    )


def _text_of(row: dict[str, Any]) -> str:
    parts = [row[name] for name in TEXT_FIELDS if row.get(name) is not None]
    text = " / ".join(" ".join(map(str, part)) if isinstance(part, list) else str(part) for part in parts)
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
