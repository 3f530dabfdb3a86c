"""Calibration scores against values worked out by hand, and laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.validate.metrics.calibration import (
    BINS,
    brier_score,
    expected_calibration_error,
    fitted_temperature,
    negative_log_likelihoods,
    reliability_bins,
    softmax,
    suggested_temperature,
)


def drawn(seed: int, n: int = 200, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    probabilities = softmax(generator.normal(size=(n, classes)) * 2)
    return probabilities, generator.integers(0, classes, n)


def test_softmax_by_hand_and_of_large_logits() -> None:
    found = softmax(np.array([[0.0, np.log(3)], [1000.0, 1000.0], [-1000.0, 1000.0]]))
    np.testing.assert_allclose(found, [[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]])


def test_brier_by_hand() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    by_hand = ((0.09 + 0.04 + 0.01) + (1 + 0 + 1)) / 2
    assert brier_score(probabilities, np.array([0, 0])) == pytest.approx(by_hand)
    assert brier_score(probabilities, np.array([0, 2])) == pytest.approx(0.07)


def test_calibration_error_by_hand() -> None:
    # Thirty answers, two in each of the 15 bins: confidence 0.5 and right, or 0.8 and half of them right.
    confidence = np.array([0.5] * 10 + [0.8] * 20)
    right = np.array([True] * 10 + [True, False] * 10)
    probabilities = np.column_stack([confidence, 1 - confidence])
    labels = np.where(right, probabilities.argmax(axis=1), 1 - probabilities.argmax(axis=1))
    by_hand = 10 / 30 * abs(1 - 0.5) + 20 / 30 * abs(0.5 - 0.8)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(by_hand)
    bins = reliability_bins(probabilities, labels)
    assert [one.count for one in bins] == [2] * BINS
    assert [one.accuracy for one in bins] == [1.0] * 5 + [0.5] * 10
    assert [one.confidence for one in bins] == pytest.approx([0.5] * 5 + [0.8] * 10)


def test_the_sure_and_right_are_calibrated_and_the_sure_and_wrong_are_not() -> None:
    sure = np.tile([1.0, 0.0], (20, 1))
    assert expected_calibration_error(sure, np.zeros(20, dtype=int)) == 0
    assert brier_score(sure, np.zeros(20, dtype=int)) == 0
    assert expected_calibration_error(sure, np.ones(20, dtype=int)) == 1
    assert brier_score(sure, np.ones(20, dtype=int)) == 2


@given(seed=st.integers(0, 10_000), n=st.integers(1, 80))
def test_scores_stay_within_their_bounds_and_do_not_heed_the_order(seed: int, n: int) -> None:
    probabilities, labels = drawn(seed, n)
    error, brier = expected_calibration_error(probabilities, labels), brier_score(probabilities, labels)
    assert 0 <= error <= 1 and 0 <= brier <= 2
    order = np.random.default_rng(seed).permutation(n)
    assert expected_calibration_error(probabilities[order], labels[order]) == pytest.approx(error)
    assert brier_score(probabilities[order], labels[order]) == pytest.approx(brier)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 80))
def test_bins_hold_every_example_once_and_add_up_to_the_error(seed: int, n: int) -> None:
    probabilities, labels = drawn(seed, n)
    bins = reliability_bins(probabilities, labels)
    assert len(bins) == min(n, BINS)
    assert sum(one.count for one in bins) == n
    assert max(one.count for one in bins) - min(one.count for one in bins) <= 1
    confidences = [one.confidence for one in bins]
    assert confidences == sorted(confidences)
    error = sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / n
    assert expected_calibration_error(probabilities, labels) == pytest.approx(error)


def test_labels_drawn_from_the_probabilities_are_calibrated_and_sharpened_ones_are_not() -> None:
    generator = np.random.default_rng(3)
    probabilities, _ = drawn(3, n=20_000)
    labels = (probabilities.cumsum(axis=1) > generator.random((20_000, 1))).argmax(axis=1)
    sharpened = softmax(np.log(probabilities) * 3)
    assert expected_calibration_error(probabilities, labels) < 0.02
    assert expected_calibration_error(sharpened, labels) > 0.1
    assert brier_score(probabilities, labels) < brier_score(sharpened, labels)  # a proper score


# Bins of equal width, likelihood, temperature.


def test_bins_of_equal_width_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.91, 0.09], [0.2, 0.8], [0.55, 0.45]])
    labels = np.array([0, 1, 1, 0])
    # of 15 bins, (13/15, 14/15] holds 0.9 and 0.91: one right in two; 0.8 and 0.55 have bins of their own
    by_hand = (abs(1 - (0.9 + 0.91)) + 0.2 + 0.45) / 4
    assert expected_calibration_error(probabilities, labels, "width") == pytest.approx(by_hand)
    certain = np.array([[1.0, 0.0]] * 3)
    assert expected_calibration_error(certain, np.zeros(3, dtype=int), "width") == 0


def test_likelihoods_are_those_of_the_softmax() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32) * 30
    labels = np.arange(20) % 4
    for temperature in (1.0, 2.5):
        expected = -np.log(softmax(logits.astype(float) / temperature)[np.arange(20), labels])
        np.testing.assert_allclose(
            negative_log_likelihoods(logits, labels, temperature), expected, rtol=1e-9, atol=1e-12
        )


def calibrated(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits that mean what they say, and labels drawn by them."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (n, 3))
    return logits, np.array([random.choice(3, p=row) for row in softmax(logits)])


@pytest.mark.parametrize("factor", [0.3, 2.5])
def test_the_temperature_that_was_put_in_is_found(factor: float) -> None:
    logits, labels = calibrated(2000, 0)
    assert fitted_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.1)
    found = suggested_temperature(logits * factor, labels)
    assert found is not None and found.value == pytest.approx(factor, rel=0.1)
    assert found.nll_after < found.nll_before and 0 < found.gain_low < found.nll_before - found.nll_after
    assert found.ece_after < found.ece_before
    assert "would be better calibrated" in found.in_words


def test_no_temperature_is_suggested_where_none_is_sure_to_help() -> None:
    suggested = [suggested_temperature(*calibrated(300, seed)) for seed in range(20)]
    assert sum(each is not None for each in suggested) <= 2
    logits, labels = calibrated(2000, 0)
    assert suggested_temperature(3 * logits[:99], labels[:99]) is None  # too few to tell


def test_what_a_temperature_is_said_to_bring_it_brings_to_others() -> None:
    logits, labels = calibrated(20_000, 99)
    others = 2 * logits
    before = negative_log_likelihoods(others, labels).mean()
    held = []
    for seed in range(20):
        logits, known = calibrated(400, seed)
        found = suggested_temperature(2 * logits, known)
        assert found is not None
        fall = before - negative_log_likelihoods(others, labels, found.value).mean()
        held.append(found.gain_low <= fall <= found.gain_high)
    assert np.mean(held) >= 0.85


def test_rows_of_words_are_dealt_whole() -> None:
    logits, labels = calibrated(600, 3)
    assert suggested_temperature(3 * logits, labels, np.repeat(np.arange(60), 10)) is None  # 60 rows are too few
    assert suggested_temperature(3 * logits, labels, np.repeat(np.arange(120), 5)) is not None
