"""Quality figures against hand-worked values and SciPy's, with their intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from limbeck.errors import InputError
from limbeck.models.checkpoint import load_checkpoint
from limbeck.validate.measurement import measure_checkpoint, score_checkpoint
from limbeck.validate.metrics.calibration import brier_score, expected_calibration_error, softmax
from limbeck.validate.metrics.entities import entity_counts, is_bio, micro_f1, spans
from limbeck.validate.metrics.quality import Quality, headline_metric, higher_is_better, measure_quality, score
from limbeck.validate.records.report import Metric
from limbeck.validate.standard import set_standard


def figures(quality: Quality) -> dict[str, Metric]:
    assert len({metric.name for metric in quality.metrics}) == len(quality.metrics)
    return {metric.name: metric for metric in quality.metrics}


def of_many(found: dict[str, Metric]) -> list[Metric]:
    """All but the largest and the least, which have no interval."""
    return [metric for name, metric in found.items() if not name.endswith(("_max", "_min"))]


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


def test_a_narrower_student_is_held_to_ranks_alone(vectors: np.ndarray) -> None:
    narrow = {"embedding": vectors[:, :3]}
    found = figures(measure_quality("sentence-similarity", {"embedding": vectors}, narrow, None, "d"))
    assert set(found) == {"agreement_spearman"}


# Pairs without scores: a question and its passage.


def test_recall_counts_the_queries_whose_own_passage_is_nearest(vectors: np.ndarray) -> None:
    generator = np.random.default_rng(3)
    teacher = np.concatenate([vectors, vectors + 0.2 * generator.normal(size=vectors.shape)])
    candidate = teacher + 0.6 * generator.normal(size=teacher.shape)
    measured = measure_quality(
        "sentence-similarity", {"embedding": teacher}, {"embedding": candidate}, None, "d", pairs=True
    )
    found = figures(measured)
    hits, ranks = [], []
    for query in range(60):
        sides = [[float(cosines(side[[query]], side[[60 + other]])[0]) for other in range(60)]
                 for side in (candidate, teacher)]  # fmt: skip
        hits.append([np.argmax(side) == query for side in sides])
        ranks.append(stats.spearmanr(*sides).statistic)
    ours, theirs = np.mean(hits, axis=0)
    assert 0.3 < ours < theirs  # of any use to the test
    assert (found["recall_at_1"].value, found["recall_at_1"].teacher) == (pytest.approx(ours), pytest.approx(theirs))
    assert found["recall_at_1_kept"].value == pytest.approx(ours / theirs)
    assert found["agreement_ranking"].value == pytest.approx(np.mean(ranks), abs=1e-6)
    for name in ("recall_at_1", "recall_at_1_kept", "agreement_ranking"):
        assert found[name].low < found[name].value < found[name].high  # type: ignore[operator]
        assert found[name].count == 60


def test_questions_of_one_passage_share_it(vectors: np.ndarray) -> None:
    queries, passages = vectors[:20], np.repeat(vectors[:10], 2, axis=0)  # of two equal passages, one comes first
    queries = np.repeat(queries[:10], 2, axis=0)
    both = {"embedding": np.concatenate([queries, passages])}
    assert score("sentence-similarity", both, both, None, pairs=True)["recall_at_1"] == 1
    assert score("sentence-similarity", None, both, None, pairs=True)["recall_at_1"] == 0.5


def test_a_student_that_says_the_same_of_everything_finds_nothing(vectors: np.ndarray) -> None:
    teacher = np.concatenate([vectors, vectors])
    found = score("sentence-similarity", {"embedding": teacher}, {"embedding": np.ones_like(teacher)}, None, pairs=True)
    assert found["recall_at_1"] == pytest.approx(1 / 60)
    assert found["agreement_ranking"] == 0


def test_texts_that_are_no_pairs_have_no_recall(vectors: np.ndarray) -> None:
    assert "recall_at_1" not in score("sentence-similarity", {"embedding": vectors}, {"embedding": vectors}, None)


def test_pairs_of_a_file_are_known_to_be_pairs(
    tmp_path: Path, texts: list[str], tiny_checkpoint: Callable[..., Path], write_jsonl: Callable[..., Path]
) -> None:
    model = load_checkpoint(tiny_checkpoint("bert"), "sentence-similarity")
    rows = [{"sentence1": text, "sentence2": text} for text in texts[:8]]
    standard = set_standard(model, model.read(write_jsonl(tmp_path / "pairs.jsonl", rows)))
    measured = measure_checkpoint("same", model, standard, lambda done, total: None)
    points = score_checkpoint(model, standard)
    assert points == {metric.name: metric.value for metric in measured.metrics}
    assert points["recall_at_1_kept"] == 1
    singles = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts[:8]])
    assert "recall_at_1" not in score_checkpoint(model, set_standard(model, model.read(singles)))


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
    # nothing to be right or wrong about
    assert set(found) == {"flip_rate", "kl_mean", "js_mean", "probability_difference_max", "logit_difference_max"}


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
    for metric in of_many(found):
        assert metric.low is not None and metric.high is not None
        assert metric.low <= metric.value <= metric.high
    assert sum(one.count for one in quality.reliability) == 4


def test_tokens_are_counted_one_by_one() -> None:
    teacher, student = rows_of(TEACHER[:1], TEACHER[1:]), rows_of(STUDENT[:1], STUDENT[1:])
    by_token = measure_quality("token-classification", {"logits": teacher}, {"logits": student}, LABELS, "d")
    by_text = measure_quality("text-classification", {"logits": TEACHER}, {"logits": STUDENT}, LABELS, "d")
    of_tokens, of_texts = figures(by_token), figures(by_text)
    assert {name for name in of_tokens.keys() ^ of_texts.keys() if not name.startswith("exact_match")} == {
        "macro_f1", "macro_f1_difference"
    }  # fmt: skip
    for name in of_tokens.keys() & of_texts.keys():
        assert of_tokens[name].value == pytest.approx(of_texts[name].value)
        assert (of_tokens[name].count, of_tokens[name].teacher) == (4, of_texts[name].teacher)
    assert by_token.reliability == by_text.reliability


def test_a_teacher_that_is_never_right_has_nothing_to_keep() -> None:
    labels = np.array([1, 2, 0, 2])
    found = figures(measure_quality("text-classification", {"logits": TEACHER}, {"logits": STUDENT}, labels, "d"))
    assert found["accuracy"].teacher == 0
    assert "accuracy_kept" not in found
    assert np.isfinite(softmax(STUDENT)).all()


def test_a_resample_without_a_right_answer_is_left_out_in_silence() -> None:
    labels = np.array([0, 2, 1, 2])  # the teacher is right once in four
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = figures(measure_quality("text-classification", {"logits": TEACHER}, {"logits": STUDENT}, labels, "d"))
    assert found["accuracy_kept"].value == 1
    assert np.isfinite([found["accuracy_kept"].low, found["accuracy_kept"].high]).all()  # type: ignore[list-item]
    assert found["accuracy_kept"].low < 1 < found["accuracy_kept"].high  # type: ignore[operator]


# Entities.

BIO = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
OUT, B_LOC, I_LOC, B_PER, I_PER = range(5)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-LOC I-LOC O B-PER", [(0, 2, "LOC"), (3, 4, "PER")]),
        ("B-LOC B-LOC I-LOC", [(0, 1, "LOC"), (1, 3, "LOC")]),
        ("B-LOC I-PER", [(0, 1, "LOC"), (1, 2, "PER")]),
        ("O I-LOC I-LOC", [(1, 3, "LOC")]),  # continues nothing: conlleval begins one
        ("I-PER O", [(0, 1, "PER")]),
        ("", []),
    ],
)
def test_entities_are_read_as_by_conlleval(tags: str, expected: list[Any]) -> None:
    assert list(spans(tags.split())) == expected


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["LOC", "PER"]), st.integers(0, 3))))
def test_entities_that_were_written_are_read(entities: list[tuple[int, str, int]]) -> None:
    tags: list[str] = []
    written = []
    for length, kind, gap in entities:
        written.append((len(tags), len(tags) + length, kind))
        tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1), *["O"] * gap]
    assert list(spans(tags)) == written


def test_labels_that_are_no_bio_tags_have_no_entities() -> None:
    assert is_bio(BIO) and is_bio(["O", "B-x"])
    for names in ([], ["O"], ["O", "NAME", "PLACE"], ["B-LOC", "E-LOC"], ["LABEL_0", "LABEL_1"], ["O", "B-"]):
        assert not is_bio(names)


def logits_of(*rows: list[int]) -> np.ndarray:
    return rows_of(*(np.eye(5)[row] * 4 for row in rows))


def test_entity_f1_by_hand() -> None:
    gold = [[B_LOC, I_LOC, OUT], [B_PER, OUT, B_LOC], [OUT, B_PER, I_PER, OUT], [OUT]]
    teacher = [
        [B_LOC, I_LOC, OUT],
        [B_PER, OUT, B_LOC],
        [OUT, B_PER, OUT, OUT],
        [OUT],
    ]
    student = [
        [B_LOC, I_LOC, OUT],
        [B_LOC, OUT, OUT],
        [B_PER, B_PER, I_PER, OUT],
        [OUT],
    ]
    # Of the 4 entities the teacher misses an end of one; the student a type, one whole, and it sees one too many.
    labels = np.concatenate(gold)
    sides = {"logits": logits_of(*teacher)}, {"logits": logits_of(*student)}
    found = figures(measure_quality("token-classification", *sides, labels, "d", label_names=BIO))
    assert found["f1"].value == pytest.approx(2 * 2 / (4 + 4))
    assert found["f1"].teacher == pytest.approx(2 * 3 / (4 + 4))
    assert found["f1_kept"].value == pytest.approx(2 / 3)
    assert found["f1_difference"].value == pytest.approx(-1 / 4)
    assert found["f1"].count == 4  # entities there are
    assert found["accuracy"].value == pytest.approx(8 / 11)
    for metric in of_many(found):
        assert metric.low is not None and metric.high is not None and metric.low <= metric.value <= metric.high
    plain = figures(measure_quality("token-classification", *sides, labels, "d", label_names=["O", *"ABCD"]))
    assert "f1" not in plain and plain["accuracy"] == found["accuracy"]
    same = figures(measure_quality("token-classification", sides[0], sides[0], labels, "d", label_names=BIO))
    assert same["f1_kept"].value == same["f1_kept"].low == same["f1_kept"].high == 1


def test_a_models_own_labels_say_whether_there_are_entities(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], write_jsonl: Callable[..., Path]
) -> None:
    model = load_checkpoint(tiny_checkpoint("bert", "token-classification"), "token-classification")
    rows = [{"tokens": ["Anna", "met", "Ivan", "Peter"], "tags": [1, 0, 1, 2]}, {"tokens": ["Rain"], "tags": [0]}] * 3
    standard = set_standard(model, model.read(write_jsonl(tmp_path / "words.jsonl", rows)))
    assert "f1" not in score_checkpoint(model, standard)  # NAME and PLACE are no BIO tags
    model.model.config.id2label = {0: "O", 1: "B-PER", 2: "I-PER"}
    assert "f1" in score_checkpoint(model, standard)
    measured = measure_checkpoint("same", model, standard, lambda done, total: None)
    assert "f1" in {metric.name for metric in measured.metrics}


def test_f1_is_undefined_where_nobody_sees_an_entity() -> None:
    nothing = entity_counts([np.array([OUT, OUT])], [np.array([OUT, OUT])], BIO)
    assert np.isnan(micro_f1(nothing))
    side = {"logits": logits_of([OUT, OUT], [OUT, B_PER])}
    found = measure_quality("token-classification", side, side, np.array([OUT, OUT, OUT, OUT]), "d", label_names=BIO)
    assert not [name for name in figures(found) if name.startswith("f1")]  # no entity to find in this data


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
    assert found["perplexity_ratio"].value == found["perplexity_ratio"].low == found["perplexity_ratio"].high == 1
    agreement = found["token_agreement"]  # a share, whose interval has a width even where nothing differs
    assert agreement.value == agreement.high == 1
    assert agreement.low == pytest.approx(27 / (27 + stats.norm.ppf(0.975) ** 2))
    assert found["perplexity"].low < found["perplexity"].value < found["perplexity"].high  # type: ignore[operator]


# Points alone.


def test_scores_are_the_points_of_what_is_measured(vectors: np.ndarray) -> None:
    generator = np.random.default_rng(4)
    noisy = vectors + generator.normal(size=vectors.shape)
    tokens = logits_of([B_LOC, I_LOC], [OUT, B_PER]), logits_of([B_LOC, OUT], [OUT, B_PER])
    words = {"nll": rows_of([1.0, 2.0], [3.0]), "top_token": rows_of([5, 6], [7])}
    others = {"nll": rows_of([2.0, 2.0], [5.0]), "top_token": rows_of([5, 9], [7])}
    asked: list[tuple[str, Any, Any, Any, dict[str, Any], str, str | None]] = [
        ("sentence-similarity", {"embedding": vectors}, {"embedding": noisy}, generator.random(30), {},
         "spearman", "spearman"),
        ("sentence-similarity", {"embedding": vectors}, {"embedding": noisy}, None, {"pairs": True},
         "recall_at_1", "recall_at_1"),
        ("sentence-similarity", {"embedding": vectors}, {"embedding": noisy}, None, {}, "agreement_spearman", None),
        ("text-classification", {"logits": TEACHER}, {"logits": STUDENT}, LABELS, {}, "accuracy", "accuracy"),
        ("text-classification", {"logits": TEACHER}, {"logits": STUDENT}, None, {}, "flip_rate", None),
        ("token-classification", {"logits": tokens[0]}, {"logits": tokens[1]}, np.array([B_LOC, I_LOC, OUT, B_PER]),
         {"label_names": BIO}, "f1", "f1"),
        ("text-generation", words, others, None, {}, "perplexity", "perplexity"),
    ]  # fmt: skip
    for task, teacher, candidate, references, more, headline, alone in asked:
        measured = figures(measure_quality(task, teacher, candidate, references, "d", **more))
        points = score(task, teacher, candidate, references, **more)
        assert points == pytest.approx({name: metric.value for name, metric in measured.items()}, rel=1e-12)
        assert headline_metric(task, points) == headline
        for name, metric in measured.items():
            assert metric.higher_is_better == higher_is_better(name)
        if alone is None:
            with pytest.raises(InputError, match="nothing to score against"):
                score(task, None, candidate, references, **more)
            continue
        untaught = score(task, None, candidate, references, **more)
        assert headline_metric(task, untaught) == alone
        assert untaught == {name: points[name] for name in untaught}
        assert not [name for name in untaught if name.endswith(("_kept", "_difference", "_ratio"))]


def test_fewer_is_better_of_what_counts_harm() -> None:
    assert not any(map(higher_is_better, ("perplexity", "perplexity_ratio", "flip_rate", "kl_mean", "ece", "brier")))
    assert all(map(higher_is_better, ("accuracy", "spearman_kept", "f1", "recall_at_1", "token_agreement")))
