"""The baseline of monitoring: what the validation rows look like to the teacher and to each candidate, and how far
other texts have moved from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..models.data import TEXT_FIELDS, Data
from .metrics.calibration import softmax
from .metrics.retrieval import unit
from .predictions import Predictions
from .records.profile import Baseline, EmbeddingSketch, Profile, TextProfile
from .statistics.distributions import Shift, categories_of, histogram_of, shift_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .records.report import Metric
    from .standard import Answering, Standard

_DIRECTIONS = 16
"""Random directions that embeddings are projected on."""


@dataclass(frozen=True)
class Monitoring:
    """Takes the profile of each candidate that has answered; adds no metric."""

    standard: Standard
    candidates: dict[str, Profile] = field(default_factory=dict)

    def __call__(self, candidate: Answering) -> list[Metric]:
        """Take the candidate's profile."""
        self.candidates[candidate.name] = self._profile(candidate.tokenizer, candidate.answers)
        return []

    def _profile(self, tokenizer: PreTrainedTokenizerBase, answers: Predictions) -> Profile:
        return profile_of(self.standard.data, tokenizer, answers, label_names=self.standard.label_names)

    def baseline(self, artifact_ids: Mapping[str, str]) -> Baseline:
        """The teacher's profile and the candidates'."""
        standard = self.standard
        return Baseline(
            task=standard.teacher.task.name,
            data=f"{standard.data_name}, fingerprint {standard.data.fingerprint}",
            teacher=self._profile(standard.teacher.tokenizer, standard.predictions),
            candidates={
                name: profile.model_copy(update={"artifact_id": artifact_ids.get(name)})
                for name, profile in self.candidates.items()
            },
        )


def profile_of(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    answers: Predictions,
    *,
    label_names: Sequence[str] = (),
    like: Profile | None = None,
) -> Profile:
    """Texts, and what a model answers to them.

    Args:
        answers: all finite (see `predictions.broken`).
        like: the profile in whose bins these are counted, so that both can be compared (`shifts`).

    Raises:
        InputError: embeddings of another width than those of `like`.
    """
    found: dict[str, Any] = {"texts": _texts(data, tokenizer, like.texts if like else None)}
    if "embedding" in answers:
        found["embedding"] = _sketch(answers["embedding"], like.embedding if like else None)
    elif "logits" in answers:
        confidence, labels = _classified(answers["logits"])
        found["confidence"] = histogram_of(confidence, like.confidence if like else None)
        found["labels"] = categories_of(label_names, labels, len(confidence))
    else:
        for name, kept in {"confidence": "confidence", "negative_log_likelihood": "nll"}.items():
            means = np.array([np.mean(row) for row in answers[kept] if len(row)])
            found[name] = histogram_of(means, getattr(like, name) if like else None)
    return Profile(**found)


def shifts(baseline: Profile, sample: Profile) -> list[Shift]:
    """How far each part of a sample has moved from the baseline, the furthest first; of the directions that embeddings
    are projected on, the one along which they moved most.

    Args:
        sample: in the baseline's bins (`profile_of(..., like=baseline)`).
    """
    before, after = dict(baseline.parts()), dict(sample.parts())
    shared = [name for name in before if name in after]
    directions = _DIRECTIONS if baseline.embedding and sample.embedding else 0
    comparisons = len(shared) + directions
    found = [shift_of(name, before[name], after[name], comparisons) for name in shared]
    if baseline.embedding and sample.embedding:
        sides = zip(baseline.embedding.projections, sample.embedding.projections, strict=True)
        moved = [shift_of("embedding", *side, comparisons) for side in sides]
        found.append(max(moved, key=lambda shift: shift.psi))
    return sorted(found, key=lambda shift: -shift.psi)


def _classified(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of each text, and every label that was given."""
    if logits.dtype != object:
        told = softmax(logits)
        return told.max(axis=1), told.argmax(axis=1)
    words = [softmax(row) for row in logits if len(row)]
    return np.array([row.max(axis=1).mean() for row in words]), np.concatenate([row.argmax(axis=1) for row in words])


def _sketch(embeddings: np.ndarray, like: EmbeddingSketch | None) -> EmbeddingSketch:
    """Of embeddings float [texts, width], whose length is of no account: along directions of +1 and -1 (Achlioptas,
    "Database-friendly random projections", Journal of Computer and System Sciences 66, 2003)."""
    width = embeddings.shape[1]
    if like is not None and len(like.centre) != width:
        raise InputError(f"These embeddings have width {width}, and those of the baseline {len(like.centre)}.")
    placed = unit(embeddings)
    centre = np.array(like.centre) if like is not None else np.round(placed.mean(axis=0), 6)
    projected = placed @ _directions(width)
    bins = like.projections if like is not None else [None] * _DIRECTIONS
    return EmbeddingSketch(
        centre=centre.tolist(),
        cosine_to_centre=histogram_of(placed @ unit(centre[None])[0], like.cosine_to_centre if like else None),
        projections=[histogram_of(column, own) for column, own in zip(projected.T, bins, strict=True)],
    )


def _directions(width: int) -> np.ndarray:
    """+1 and -1, float32 [width, 16], from SHA-256: the same for ever, whatever becomes of NumPy's generators."""
    bits = width * _DIRECTIONS
    blocks = (hashlib.sha256(f"limbeck embedding sketch {i}".encode()).digest() for i in range(bits // 256 + 1))
    drawn = np.unpackbits(np.frombuffer(b"".join(blocks), dtype=np.uint8))[:bits]
    return drawn.reshape(width, _DIRECTIONS).astype(np.float32) * 2 - 1


def _texts(data: Data, tokenizer: PreTrainedTokenizerBase, like: TextProfile | None) -> TextProfile:
    """Read some rows at a time; three small numbers are kept of each text."""
    tokens, unknown, characters = np.concatenate([_counted(*part, tokenizer) for part in _inputs(data)]).T
    density = characters / np.maximum(tokens, 1)
    found: dict[str, Any] = {}
    if _unknown_id(tokenizer) is not None:
        found["unknown_token_rate"] = float(unknown.sum() / max(int(tokens.sum()), 1))
        found["unknown_tokens"] = categories_of(["without", "with"], (unknown > 0).astype(int), len(tokens))
    return TextProfile(
        tokens=histogram_of(tokens, like.tokens if like else None),
        characters_per_token=histogram_of(density, like.characters_per_token if like else None),
        **found,
    )


def _inputs(data: Data) -> Iterator[tuple[list[Any], list[Any] | None]]:
    """Texts (or tagged words), and the second texts where a model reads both at once."""
    fields = [name for name in TEXT_FIELDS if data.has(name)]
    for chunk in data.chunks():
        if "text_pair" in fields:
            yield chunk.values("text"), chunk.values("text_pair")
        else:
            yield from ((chunk.values(name), None) for name in fields)


def _counted(texts: list[Any], seconds: list[Any] | None, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokens, unknown tokens and characters of each text, int64 [texts, 3]."""
    words = isinstance(texts[0], list)
    encoded = tokenizer(texts, seconds, is_split_into_words=words, padding=False, verbose=False)["input_ids"]
    unknown = _unknown_id(tokenizer)
    whole = [" ".join(text) if words else text for text in texts]
    beside = seconds or [""] * len(texts)
    counted = [
        (len(ids), ids.count(unknown), len(text) + len(second))
        for ids, text, second in zip(encoded, whole, beside, strict=True)
    ]
    return np.array(counted, dtype=np.int64)


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """`None` where the tokenizer has no such token, or names one of the ends for want of another, as GPT-2's does."""
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = tokenizer.unk_token_id
    return None if unknown is None or unknown in ends else int(unknown)
