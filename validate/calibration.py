"""Calibration: whether a probability of 0.8 is right eight times in ten."""

from __future__ import annotations

import numpy as np

from .report import ReliabilityBin

BINS = 15
"""As in Guo et al. 2017."""


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [n, classes] of logits [n, classes]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _equal_mass_bins(confidence: np.ndarray) -> list[np.ndarray]:
    """Positions of the examples in each bin: as many examples in one as in the next."""
    return [part for part in np.array_split(np.argsort(confidence, kind="stable"), BINS) if len(part)]


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """`sum_b n_b / n * |accuracy_b - confidence_b|` over bins of equal mass (Naeini et al. 2015; equal mass: Nixon et
    al. 2019). Probabilities [n, classes], labels [n]; between 0 and 1, 0 is best."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    gaps = [len(part) * abs(right[part].mean() - confidence[part].mean()) for part in _equal_mass_bins(confidence)]
    return float(sum(gaps) / len(labels))


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """`mean_i sum_c (p_ic - [c = y_i])^2` (Brier 1950): between 0 and 2, 0 is best."""
    truth = np.eye(probabilities.shape[1])[labels]
    return float(np.mean(np.sum((probabilities - truth) ** 2, axis=1)))


def reliability_bins(probabilities: np.ndarray, labels: np.ndarray) -> list[ReliabilityBin]:
    """The reliability diagram's points: confidence and accuracy in each bin of equal mass."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    return [
        ReliabilityBin(confidence=float(confidence[part].mean()), accuracy=float(right[part].mean()), count=len(part))
        for part in _equal_mass_bins(confidence)
    ]
