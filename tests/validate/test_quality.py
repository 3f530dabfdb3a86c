"""Quality figures against hand-worked values and SciPy's, with their intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from limbeck.validate.calibration import brier_score, expected_calibration_error, softmax
from limbeck.validate.quality import Quality, measure_quality
from limbeck.validate.report import Metric


def figures(quality: Quality) -> dict[str, Metric]:
    assert len({metric.name for metric in quality.metrics}) == len(quality.metrics)
    return {metric.name: metric for metric in quality.metrics}


def rows_of(*rows: Any) -> np.ndarray:
    array = np.empty(len(rows), dtype=object)
    for i, row in enumerate(rows):
        array[i] = np.asarray(row, dtype=float)
    return array


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)


def cosines(vectors: np.ndarray, other: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray((vectors * other).sum(axis=1) / lengths)


# Sentence similarity.


def test_identical_embeddings_agree_wholly(vectors: np.ndarray) -> None:
    found = figures(measure_quality("sentence-similarity", {"embedding": vectors}, {"embedding": vectors}, None, "d"))
    for name in ("agreement_spearman", "cosine_mean"):
        metric = found[name]
        assert metric.value == pytest.approx(1, abs=1e-6)
        assert metric.low is not None and metric.high is not None
        assert metric.low == pytest.approx(1, abs=1e-6) and metric.low <= metric.value + 1e-9
        assert (metric.count, metric.data, metric.higher_is_better) == (60, "d", True)


def test_agreement_is_spearman_over_all_pairs(vectors: np.ndarray) -> None:
    noisy = 3 * vectors + np.random.default_rng(1).normal(size=vectors.shape)
    found = figures(measure_quality("sentence-similarity", {"embedding": vectors}, {"embedding": noisy}, None, "d"))
    pairs = [(i, j) for i in range(60) for j in range(i)]
    first, second = ([float(cosines(v[[i]], v[[j]])[0]) for i, j in pairs] for v in (vectors, noisy))
    agreement = found["agreement_spearman"]
    assert agreement.value == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-6)
    assert agreement.low is not None and agreement.high is not None
    assert agreement.low < agreement.value < agreement.high
    assert found["cosine_mean"].value == pytest.approx(cosines(vectors, noisy).mean(), abs=1e-6)


def test_gold_scores_are_held_against_the_pairs(vectors: np.ndarray) -> None:
    generator = np.random.default_rng(2)
    noisy = vectors + 0.7 * generator.normal(size=vectors.shape)
    theirs, ours = cosines(vectors[:30], vectors[30:]), cosines(noisy[:30], noisy[30:])
    scores = theirs + 0.1 * generator.normal(size=30)
    quality = measure_quality("sentence-similarity", {"embedding": vectors}, {"embedding": noisy}, scores, "d")
    found = figures(quality)
    reached, teacher = (stats.spearmanr(side, scores).statistic for side in (ours, theirs))
    assert found["spearman"].value == pytest.approx(reached, abs=1e-6)
    assert found["spearman"].teacher == pytest.approx(teacher, abs=1e-6)
    assert found["spearman_kept"].value == pytest.approx(reached / teacher, abs=1e-6)
    assert found["spearman"].count == 30
    assert found["spearman"].low < found["spearman"].value < found["spearman"].high  # type: ignore[operator]
    same = figures(measure_quality("sentence-similarity", {"embedding": vectors}, {"embedding": vectors}, scores, "d"))
    assert same["spearman_kept"].value == same["spearman_kept"].low == same["spearman_kept"].high == 1


# Classification.

TEACHER = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.6, 0.3, 0.1]])
STUDENT = np.log([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6], [0.6, 0.3, 0.1]])
LABELS = np.array([0, 1, 2, 1])


def test_identical_answers_never_flip_and_the_interval_says_how_sure_that_is() -> None:
    for n, high in ((4, 0.4899), (400, 0.0095)):
        logits = np.tile(TEACHER, (n // 4, 1))
        found = figures(measure_quality("text-classification", {"logits": logits}, {"logits": logits}, None, "d"))
        flips = found["flip_rate"]
        assert (flips.value, flips.low, flips.higher_is_better) == (0, 0, False)
        assert flips.high == pytest.approx(high, abs=1e-4)  # Wilson: z^2 / (n + z^2)
        assert found["kl_mean"].value == pytest.approx(0, abs=1e-12)
    assert set(found) == {"flip_rate", "kl_mean"}  # nothing to be right or wrong about


def test_classification_by_hand() -> None:
    quality = measure_quality("text-classification", {"logits": TEACHER}, {"logits": STUDENT}, LABELS, "d")
    found = figures(quality)
    p, q = np.exp(TEACHER), np.exp(STUDENT)
    assert found["flip_rate"].value == 1 / 4  # the second answer
    assert found["kl_mean"].value == pytest.approx(stats.entropy(p, q, axis=1).mean(), abs=1e-9)
    assert (found["accuracy"].value, found["accuracy"].teacher) == (2 / 4, 3 / 4)
    assert found["accuracy_difference"].value == pytest.approx(-1 / 4)
    assert found["accuracy_kept"].value == pytest.approx(2 / 3)
    assert found["ece"].value == pytest.approx(expected_calibration_error(q, LABELS))
    assert found["ece"].teacher == pytest.approx(expected_calibration_error(p, LABELS))
    # Sums of squares: 0.42, 0.62, 0.24 and 0.86; the teacher's 0.14, 0.06, 0.54 and 0.86.
    assert found["brier"].value == pytest.approx((0.42 + 0.62 + 0.24 + 0.86) / 4)
    assert found["brier"].teacher == pytest.approx((0.14 + 0.06 + 0.54 + 0.86) / 4)
    assert brier_score(q, LABELS) == pytest.approx(found["brier"].value)
    assert not found["ece"].higher_is_better and found["accuracy"].higher_is_better
    for metric in found.values():
        assert metric.low is not None and metric.high is not None
        assert metric.low <= metric.value <= metric.high
    assert sum(one.count for one in quality.reliability) == 4


def test_tokens_are_counted_one_by_one() -> None:
    teacher, student = rows_of(TEACHER[:1], TEACHER[1:]), rows_of(STUDENT[:1], STUDENT[1:])
    by_token = measure_quality("token-classification", {"logits": teacher}, {"logits": student}, LABELS, "d")
    by_text = measure_quality("text-classification", {"logits": TEACHER}, {"logits": STUDENT}, LABELS, "d")
    assert by_token == by_text


def test_a_teacher_that_is_never_right_has_nothing_to_keep() -> None:
    labels = np.array([1, 2, 0, 2])
    found = figures(measure_quality("text-classification", {"logits": TEACHER}, {"logits": STUDENT}, labels, "d"))
    assert found["accuracy"].teacher == 0
    assert "accuracy_kept" not in found
    assert np.isfinite(softmax(STUDENT)).all()


# Language models.


def test_language_models_by_hand() -> None:
    teacher = {"nll": rows_of([1.0, 2.0], [3.0]), "top_token": rows_of([5, 6], [7])}
    student = {"nll": rows_of([2.0, 2.0], [5.0]), "top_token": rows_of([5, 9], [7])}
    for task in ("fill-mask", "text-generation"):
        found = figures(measure_quality(task, teacher, student, None, "d"))
        assert found["perplexity"].value == pytest.approx(np.exp(9 / 3))  # over tokens, not over texts
        assert found["perplexity"].teacher == pytest.approx(np.exp(6 / 3))
        assert found["perplexity_ratio"].value == pytest.approx(np.exp(1))
        assert found["token_agreement"].value == pytest.approx(2 / 3)
        assert {metric.count for metric in found.values()} == {3}
        assert not found["perplexity"].higher_is_better and found["token_agreement"].higher_is_better


def test_identical_language_models_agree_with_an_interval() -> None:
    generator = np.random.default_rng(0)
    rows = [generator.exponential(size=n) for n in (3, 9, 1, 5, 7, 2)]
    side = {"nll": rows_of(*rows), "top_token": rows_of(*(np.arange(len(row)) for row in rows))}
    found = figures(measure_quality("text-generation", side, side, None, "d"))
    for name in ("perplexity_ratio", "token_agreement"):
        assert found[name].value == found[name].low == found[name].high == 1
    assert found["perplexity"].low < found["perplexity"].value < found["perplexity"].high  # type: ignore[operator]
