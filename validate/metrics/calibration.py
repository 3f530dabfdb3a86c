"""Calibration: whether a probability of 0.8 is right eight times in ten, and the temperature that would make it so."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import optimize, special

from ..records.report import ReliabilityBin, Temperature
from .drafts import by_bootstrap, mean_figure

BINS = 15
"""As in Guo et al. 2017."""
_FOLDS = 5
_FEWEST_A_FOLD = 20
"""Rows on which a temperature is worth trying: fewer say nothing of it."""
_LARGEST = 20.0
"""Temperatures are looked for between one over this and this."""


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [n, classes] of logits [n, classes]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats, [examples], of probabilities [examples, labels]."""
    return np.asarray(np.sum(p * (np.log(p + 1e-12) - np.log(q + 1e-12)), axis=1))


def _bin_of_each(confidence: np.ndarray, bins: Literal["mass", "width"]) -> np.ndarray:
    """The bin of each example, int64 [n]: as many examples in one as in the next, or equally wide ones over 0 to 1."""
    if bins == "width":  # a confidence on an edge belongs below it, as in Guo et al.
        return np.asarray(np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1))
    placed = np.empty(len(confidence), dtype=np.int64)
    for number, part in enumerate(np.array_split(np.argsort(confidence, kind="stable"), BINS)):
        placed[part] = number
    return placed


def gaps_by_bin(probabilities: np.ndarray, labels: np.ndarray, bins: Literal["mass", "width"] = "mass") -> np.ndarray:
    """Of each example, in the column of its bin, whether it is right (1 or 0) minus its confidence: float64 [n, 15].
    The expected calibration error is the sum of the columns' absolute sums, over n."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    gaps = np.zeros((len(labels), BINS))
    gaps[np.arange(len(labels)), _bin_of_each(confidence, bins)] = right - confidence
    return gaps


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: Literal["mass", "width"] = "mass"
) -> float:
    """`sum_b n_b / n * |accuracy_b - confidence_b|` over 15 bins of equal mass (Nixon et al. 2019) or of equal width
    (Naeini et al. 2015; Guo et al. 2017). Probabilities [n, classes], labels [n]; between 0 and 1, 0 is best."""
    return float(np.abs(gaps_by_bin(probabilities, labels, bins).sum(axis=0)).sum() / len(labels))


def brier_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`sum_c (p_ic - [c = y_i])^2` of each example, [n] (Brier 1950): between 0 and 2, 0 is best."""
    right = probabilities[np.arange(len(labels)), labels]
    return np.asarray(np.sum(probabilities**2, axis=1) - 2 * right + 1)


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The mean of `brier_scores`."""
    return float(brier_scores(probabilities, labels).mean())


def negative_log_likelihoods(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """`-log p_i(y_i)` of each example, nats, [n], of logits [n, classes] divided by a temperature."""
    scaled = logits.astype(np.float64) / temperature
    return np.asarray(special.logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels])


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature by which logits are best divided: that of the least negative log-likelihood (Guo et al., "On
    calibration of modern neural networks", ICML 2017). Its logarithm is looked for: there is one minimum."""

    def loss(logarithm: float) -> float:
        return float(negative_log_likelihoods(logits, labels, float(np.exp(logarithm))).mean())

    most = float(np.log(_LARGEST))
    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-most, most), method="bounded").x))


def suggested_temperature(
    logits: np.ndarray, labels: np.ndarray, clusters: np.ndarray | None = None
) -> Temperature | None:
    """The temperature that would make these probabilities better, with what it would bring; `None` where it is not
    sure to bring anything, or where there are too few examples to tell.

    What it brings is measured on examples that it was not fitted on: they are dealt to 5 folds, and those of each fold
    are scored with the temperature that was fitted on the others (cross-fitting). It is suggested when the 95 %
    interval of the mean fall of the negative log-likelihood lies above 0.

    Args:
        logits, labels: [n, classes] and int [n].
        clusters: the row of the data of each example where a row has several, as the words of a text.
    """
    rows = np.arange(len(labels)) if clusters is None else clusters
    fold = np.random.default_rng(0).permutation(np.arange(int(rows.max(initial=-1)) + 1) % _FOLDS)[rows]
    if len(np.unique(rows)) < _FOLDS * _FEWEST_A_FOLD:
        return None
    scaled = np.empty(logits.shape)
    for left_out in range(_FOLDS):
        inside = fold == left_out
        scaled[inside] = logits[inside] / fitted_temperature(logits[~inside], labels[~inside])
    before, after = (negative_log_likelihoods(each, labels) for each in (logits, scaled))
    gain = by_bootstrap(mean_figure("gain", "fall of the negative log-likelihood", before - after, clusters))
    if gain.low <= 0:
        return None
    return Temperature(
        value=fitted_temperature(logits, labels),
        nll_before=float(before.mean()),
        nll_after=float(after.mean()),
        gain_low=gain.low,
        gain_high=gain.high,
        ece_before=expected_calibration_error(softmax(logits), labels),
        ece_after=expected_calibration_error(softmax(scaled), labels),
    )


def reliability_bins(probabilities: np.ndarray, labels: np.ndarray) -> list[ReliabilityBin]:
    """The reliability diagram's points: confidence and accuracy in each bin of equal mass."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    placed = _bin_of_each(confidence, "mass")
    found = []
    for number in np.unique(placed):
        part = placed == number
        mean = float(confidence[part].mean())
        found.append(ReliabilityBin(confidence=mean, accuracy=float(right[part].mean()), count=int(part.sum())))
    return found
