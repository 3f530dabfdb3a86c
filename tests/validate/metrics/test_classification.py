"""Figures of labels against hand-worked values and simulation: drift, macro F1, exact match, rows drawn whole."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from limbeck.validate.metrics.classification import macro_f1
from limbeck.validate.metrics.drafts import design_effect, share_figure
from limbeck.validate.metrics.quality import measure_quality, metric_drafts
from limbeck.validate.records.report import Metric

P = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6], [0.6, 0.3, 0.1]])
Q = np.array([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
LABELS = np.array([0, 1, 2, 1])
TAGS = ["O", "NAME", "PLACE"]


def measured(task: str, teacher: np.ndarray, candidate: np.ndarray, labels: np.ndarray | None) -> dict[str, Metric]:
    sides = {"logits": teacher}, {"logits": candidate}
    return {metric.name: metric for metric in measure_quality(task, *sides, labels, "d", label_names=TAGS).metrics}


def by_row(logits: np.ndarray, *lengths: int) -> np.ndarray:
    rows = np.empty(len(lengths), dtype=object)
    rows[:] = np.split(logits, np.cumsum(lengths)[:-1])
    return rows


def test_drift_by_hand() -> None:
    found = measured("text-classification", np.log(P), np.log(Q), None)
    # SciPy's is the square root of the divergence
    assert found["js_mean"].value == pytest.approx(np.mean(jensenshannon(P, Q, axis=1) ** 2))
    assert found["probability_difference_max"].value == pytest.approx(0.3)
    assert found["logit_difference_max"].value == pytest.approx(np.log(0.5 / 0.2))
    assert found["logit_difference_max"].low is found["logit_difference_max"].high is None
    assert not any(metric.higher_is_better for metric in found.values())


def test_js_never_exceeds_its_bound() -> None:
    apart = measured("text-classification", np.array([[50.0, -50]] * 5), np.array([[-50.0, 50]] * 5), None)
    assert apart["js_mean"].value == pytest.approx(np.log(2))


def test_macro_f1_by_hand() -> None:
    # class 0: 1 of 1 found, 2 said; class 1: none of 2, 1 never said; class 2: whole
    answers = Q.argmax(axis=1)
    assert answers.tolist() == [0, 0, 2, 0]
    assert macro_f1(answers, LABELS) == pytest.approx((2 * 1 / (3 + 1) + 0 + 1) / 3)
    assert macro_f1(np.array([0, 3]), np.array([0, 3])) == 1  # classes that never occur do not count
    found = measured("text-classification", np.log(P), np.log(Q), LABELS)
    theirs = (2 / 3 + 2 / 3 + 1) / 3  # the teacher's answers are 0, 1, 2, 0
    assert found["macro_f1"].teacher == pytest.approx(theirs)
    assert found["macro_f1_difference"].value == pytest.approx(found["macro_f1"].value - theirs)
    assert found["macro_f1_difference"].low < found["macro_f1_difference"].high  # type: ignore[operator]


def test_likelihood_stands_beside_the_teachers() -> None:
    found = measured("text-classification", np.log(P), np.log(Q), LABELS)
    ours, theirs = (-np.log(side[np.arange(4), LABELS]).mean() for side in (Q, P))
    assert (found["nll"].value, found["nll"].teacher) == (pytest.approx(ours), pytest.approx(theirs))
    assert found["nll_difference"].value == pytest.approx(ours - theirs)
    assert not found["nll_difference"].higher_is_better and found["nll"].unit == "nats"


def test_flips_have_an_exact_p_value() -> None:
    right = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [60, 3, 12, 25], axis=0)
    labels = np.zeros(100, dtype=int)
    logits = [np.column_stack([side, 1 - side]).astype(float) for side in right.T]
    found = measured("text-classification", logits[1], logits[0], labels)
    assert found["accuracy_difference"].value == pytest.approx(-0.09)
    assert found["accuracy_difference"].p_value == pytest.approx(2 * stats.binom.cdf(3, 15, 0.5))
    assert found["accuracy"].p_value is None
    alike = measured("text-classification", logits[0], logits[0], labels)
    assert alike["accuracy_difference"].p_value == 1


def test_a_row_is_an_exact_match_when_every_word_is_right() -> None:
    labels = np.array([0, 1, 2, 1, 0])
    ours = np.eye(3)[[0, 1, 2, 0, 0]] * 3
    teacher, candidate = (by_row(side, 2, 0, 2, 1) for side in (np.eye(3)[labels] * 3, ours))
    found = measured("token-classification", teacher, candidate, labels)
    assert (found["exact_match"].value, found["exact_match"].teacher) == (pytest.approx(2 / 3), 1)
    assert found["exact_match"].count == 3  # a row without words is neither right nor wrong
    assert found["exact_match_difference"].p_value == 1  # one flip goes one way or the other
    assert found["accuracy"].value == pytest.approx(4 / 5) and found["accuracy_difference"].p_value is None


def test_words_of_one_row_are_no_independent_examples() -> None:
    """Rows that are wholly right or wholly wrong say as much as one word each would."""
    rows = np.random.default_rng(0).random(200) < 0.8
    words = np.repeat(rows, 10)
    clusters = np.repeat(np.arange(200), 10)
    told = share_figure("share", "", words, clusters).metric("d")
    by_word, by_row_alone = (share_figure("share", "", hits).metric("d") for hits in (words, rows))
    assert told.value == by_word.value == pytest.approx(by_row_alone.value)
    assert told.low == pytest.approx(by_row_alone.low, abs=1e-3) and told.low < by_word.low  # type: ignore[operator]
    assert (told.count, by_row_alone.count) == (2000, 200)


def test_the_design_effect_of_independent_words_is_about_one() -> None:
    hits = (np.random.default_rng(1).random(20_000) < 0.3).astype(float)
    clusters = np.repeat(np.arange(2000), 10)
    assert 1 <= design_effect(hits, clusters) < 1.1
    assert design_effect(hits, None) == design_effect(np.ones(20), np.repeat(np.arange(2), 10)) == 1
    # the words of a row are all alike: 10 of them say what one does
    assert design_effect(np.repeat(hits[:2000], 10), clusters) == pytest.approx(10, rel=0.01)


def test_intervals_of_words_hold_what_they_say_when_rows_are_drawn() -> None:
    """Of 60 samples of rows whose words err together, about 57 intervals hold the value of the population."""
    random, rows, names = np.random.default_rng(2), 40, ("flip_rate", "accuracy", "accuracy_difference", "nll")

    def sample() -> dict[str, Metric]:
        ease = np.repeat(random.normal(1, 1.5, rows), 8)  # all words of a row are easy, or hard
        labels = random.integers(0, 3, rows * 8)
        sides = [np.eye(3)[labels] * ease[:, None] + random.normal(0, 0.8, (rows * 8, 3)) for _ in range(2)]
        answers = ({"logits": by_row(side, *[8] * rows)} for side in sides)
        drafts = metric_drafts("token-classification", *answers, labels, TAGS, False)
        return {draft.name: draft.metric("d") for draft in drafts if draft.name in names}

    drawn = [sample() for _ in range(60)]
    for name in names:
        truth = np.mean([found[name].value for found in drawn])
        held = np.mean([found[name].low <= truth <= found[name].high for found in drawn])  # type: ignore[operator]
        assert held >= 0.88, name
