"""Rows that belong together: how they are read, what is refused, and that every figure is what its name says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.errors import InputError, UsageError
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.validate.measurement import measure_checkpoint
from limbeck.validate.metrics.headline import higher_is_better
from limbeck.validate.metrics.quality import MetricDraft
from limbeck.validate.records.report import Candidate, ChangedExample, Metric, Report, Slice
from limbeck.validate.rendering import render_html, render_markdown
from limbeck.validate.rendering.slices import changed_examples
from limbeck.validate.rows.pairs import PairKind, PairRows, read_pairs
from limbeck.validate.slices.choosing import SlicesAsked, with_slices
from limbeck.validate.slices.pair_metrics import PairedAnswers, pair_drafts
from limbeck.validate.standard import Standard, set_standard

Write = Callable[..., Path]
PAIRS = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5]), np.array([6, 7])]


@pytest.fixture(scope="module")
def classifier(tiny_checkpoint: Write) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert", "text-classification"))


@pytest.fixture(scope="module")
def embedder(tiny_checkpoint: Write) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert"))


@pytest.fixture(scope="module")
def writer(tiny_checkpoint: Write) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("gpt2", "text-generation"), "text-generation")


def logits(classes: Sequence[int], sure: float = 5.0) -> dict[str, np.ndarray]:
    return {"logits": sure * np.eye(2)[list(classes)]}


def losses(nll: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    rows = np.empty(len(nll), dtype=object)
    rows[:] = [np.array(each, dtype=float) for each in nll]
    return {"nll": rows}


def drafts(
    kind: PairKind, task: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], labels: Any = None,
    groups: Sequence[np.ndarray] = PAIRS,
) -> dict[str, MetricDraft]:  # fmt: skip
    count = len(next(iter(ours.values())))
    known = None if labels is None else np.array(labels)
    answers = PairedAnswers(task, theirs, ours, groups, np.arange(count), known, ["negative", "positive"])
    return {draft.name: draft for draft in pair_drafts(kind, answers)}


def test_two_texts_a_row_are_a_pair(classifier: Checkpoint, write_jsonl: Write, tmp_path: Path) -> None:
    rows = [{"original": f"as it was {i}", "perturbed": f"as it is {i}", "test": "typos"} for i in range(4)]
    read = read_pairs(classifier, "invariance", write_jsonl(tmp_path / "wide.jsonl", rows))
    assert read.data.values("text")[:4] == ["as it was 0", "as it is 0", "as it was 1", "as it is 1"]
    assert [group.tolist() for group in read.groups] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert read.places.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    few = read.head(2)
    assert (len(few.data), len(few.groups), len(read.head(None).groups)) == (4, 2, 4)


def test_rows_with_something_in_common_are_a_group(classifier: Checkpoint, write_jsonl: Write, tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": i % 2, "pair_id": name, "side": side}
            for i, (name, side) in enumerate([("a", "anti"), ("b", "pro"), ("a", "pro"), ("c", "anti"), ("c", "pro"),
                                              ("b", "anti")])]  # fmt: skip
    read = read_pairs(classifier, "bias", write_jsonl(tmp_path / "long.jsonl", rows))
    assert [group.tolist() for group in read.groups] == [[0, 2], [5, 1], [3, 4]]  # the first side is the file's first
    assert set(read.data.columns) == {"text", "label"} and read.data.rows.column_names == ["text", "label"]
    few = read.head(2)
    assert few.data.values("text") == ["text 0", "text 1", "text 2", "text 5"]
    assert [group.tolist() for group in few.groups] == [[0, 2], [3, 1]] and few.places.tolist() == [0, 1, 2, 5]


def test_columns_may_be_named_and_those_of_the_task_need_not_be_there(
    classifier: Checkpoint, write_jsonl: Write, tmp_path: Path
) -> None:
    wide = write_jsonl(tmp_path / "wide.jsonl", [{"he": "He ran.", "she": "She ran."}])
    named = {"first": "he", "second": "she", "text": "sentence"}
    assert read_pairs(classifier, "bias", wide, named).data.values("text") == ["He ran.", "She ran."]
    long = write_jsonl(tmp_path / "long.jsonl", [{"said": "One.", "of": 1}, {"said": "Two.", "of": 1}])
    assert len(read_pairs(classifier, "invariance", long, {"text": "said", "group": "of"}).groups) == 1


def test_a_row_of_a_pair_has_the_hash_of_its_text(classifier: Checkpoint, write_jsonl: Write, tmp_path: Path) -> None:
    """What finds rows that were trained on."""
    rows = [{"text": "One.", "label": 0, "pair_id": 1}, {"text": "Two.", "label": 1, "pair_id": 1}]
    long = write_jsonl(tmp_path / "long.jsonl", rows)
    wide = write_jsonl(tmp_path / "wide.jsonl", [{"first": "One.", "second": "Two."}])
    hashes = classifier.read(long).row_hashes
    assert read_pairs(classifier, "counterfactual", long).data.row_hashes == hashes
    assert read_pairs(classifier, "counterfactual", wide).data.row_hashes == hashes


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("invariance", [{"text": "alone", "topic": 1}], "no column for 'first', 'second', 'group', 'side'"),
        ("invariance", [{"first": "alone", "text": "x"}], "neither two columns of texts that belong together"),
        ("invariance", [{"text": "a", "pair_id": 1}, {"text": "b", "pair_id": 2}], "the only one whose 'pair_id' is 1"),
        ("invariance", [{"text": "a", "pair_id": None}, {"text": "b", "pair_id": None}], "Row 1 of .* no 'pair_id'"),
        ("invariance", [{"first": "a", "second": None}], "Row 1 of .* has no second"),
        ("invariance", [{"said": "a", "pair_id": 1}, {"said": "b", "pair_id": 1}], "no column for 'text'"),
        ("bias", [{"text": str(i), "pair_id": 1} for i in range(3)], "has 3 rows whose 'pair_id' is 1; a bias pair"),
        (
            "bias",
            [{"text": str(i), "group": i // 2, "side": "pro" if i < 3 else "anti"} for i in range(4)],
            "must have two values, and each pair one row of each; the pair 0 has 'pro', 'pro'",
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_pairs_are_refused(
    kind: str, rows: list[dict[str, Any]], words: str, classifier: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=words):
        read_pairs(classifier, kind, file)


def test_kinds_that_do_not_exist_or_do_not_suit_are_refused(embedder: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no pairs of the kind 'invariant'.*Did you mean 'invariance'"):
        read_pairs(embedder, "invariant", tmp_path / "never-read.jsonl")
    with pytest.raises(
        UsageError, match="'counterfactual' cannot be measured for sentence-similarity; they can for tex"
    ):
        read_pairs(embedder, "counterfactual", tmp_path / "never-read.jsonl")


def test_invariance_is_one_answer_throughout_a_group() -> None:
    groups = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6, 7])]
    found = drafts("invariance", "text-classification", logits([1, 1, 1, 0, 1, 0, 0, 0]),
                   logits([1, 1, 0, 0, 1, 0, 1, 0]), groups=groups)  # fmt: skip
    assert found["invariance"].point == pytest.approx(2 / 3) and found["invariance"].teacher == 0
    assert found["invariance_difference"].point == pytest.approx(2 / 3)
    assert found["invariance"].count == 3


def test_consistency_asks_for_every_answer_and_flips_only_for_a_change() -> None:
    labels = [0, 1, 1, 0, 1, 1, 0, 1]  # the third pair keeps its label
    ours, theirs = logits([0, 1, 0, 1, 1, 1, 1, 1]), logits([0, 1, 1, 0, 0, 1, 0, 1])
    found = drafts("counterfactual", "text-classification", ours, theirs, labels)
    # the second pair is flipped, both ways wrong
    assert found["consistency"].point == 0.5 and found["consistency"].teacher == 0.75
    assert found["consistency_difference"].point == -0.25
    assert found["consistency_kept"].point == pytest.approx(0.5 / 0.75)
    assert found["counterfactual_flips"].point == pytest.approx(2 / 3)
    assert (found["counterfactual_flips"].teacher, found["counterfactual_flips"].count) == (1, 3)
    interval = found["counterfactual_flips_difference"].metric("cad")
    assert interval.low is not None and interval.low < interval.value == pytest.approx(-1 / 3)
    blind = drafts("counterfactual", "text-classification", ours, theirs)
    assert "consistency" not in blind and blind["counterfactual_flips"].count == 4


def test_a_grown_gap_is_amplification() -> None:
    """First sides are positive to the candidate in three of four pairs, second ones never; the teacher is even."""
    ours, theirs = logits([1, 0, 1, 0, 1, 0, 0, 0], 50), logits([1, 0, 0, 1, 1, 0, 0, 1], 50)
    found = drafts("bias", "text-classification", ours, theirs)
    assert found["gap"].point == pytest.approx(0.75) and found["gap"].teacher == pytest.approx(0)
    assert found["gap_amplification"].point == pytest.approx(0.75)
    assert "the first gets 'positive' more (0.750)" in found["gap"].description
    assert found["invariance"].point == 0.25 and found["invariance"].teacher == 0
    turned = drafts("bias", "text-classification", logits([0, 1, 0, 1, 0, 1, 0, 0], 50), ours)
    assert turned["gap_amplification"].point == pytest.approx(0)  # as large, the other way
    assert not higher_is_better("gap") and not higher_is_better("gap_amplification")


def test_a_language_model_leans_to_the_text_that_it_finds_likelier() -> None:
    even = losses([[1.0], [2.0], [2.0], [1.0], [1.0], [2.0], [2.0], [1.0]])
    leans = losses([[1.0, 1.0], [3.0], [1.0], [2.0], [1.0], [2.0], [1.0], [2.0]])
    found = drafts("bias", "text-generation", leans, even)
    assert (found["gap"].point, found["gap"].teacher, found["gap_amplification"].point) == (1, 0, 1)
    assert "the first is in 100% of pairs" in found["gap"].description
    assert drafts("bias", "text-generation", even, leans)["gap_amplification"].point == -1
    told = found["gap"].metric("wino")
    assert told.low is not None and 0 < told.low < told.high == 1
    assert drafts("bias", "text-generation", even, even)["gap"].metric("wino").low == 0
    same = losses([[1.0]] * 8)
    assert drafts("bias", "text-generation", same, even) == {}  # neither is likelier


HUNDRED = list(np.arange(200).reshape(-1, 2))


def leaning(favoured: int) -> dict[str, np.ndarray]:
    """A hundred pairs, in so many of which the first text is the likelier."""
    return losses([[nll] for pair in range(100) for nll in ((1, 2) if pair < favoured else (2, 1))])


@pytest.mark.parametrize("favoured", [20, 80])
def test_an_unchanged_lean_has_an_interval_with_a_width(favoured: int) -> None:
    sides = leaning(favoured), leaning(favoured)
    same = drafts("bias", "text-generation", *sides, groups=HUNDRED)["gap_amplification"].metric("wino")
    assert same.low is not None and same.high is not None
    assert same.low < same.value == 0 < same.high and same.high - same.low < 0.4


@pytest.mark.parametrize(("more", "less"), [(95, 60), (5, 40), (5, 60)])
def test_a_candidate_that_leans_more_either_way_amplifies(more: int, less: int) -> None:
    sides = leaning(more), leaning(less)
    found = drafts("bias", "text-generation", *sides, groups=HUNDRED)["gap_amplification"].metric("wino")
    assert found.value == pytest.approx(0.7)
    assert found.low is not None and found.high is not None and 0.4 < found.low < 0.7 < found.high < 1


def test_embeddings_are_held_to_their_distance() -> None:
    ours = {"embedding": np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])}
    theirs = {"embedding": np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 2.0, 0.0]])}
    found = drafts("bias", "sentence-similarity", ours, theirs, groups=PAIRS[:2])
    assert (found["gap"].point, found["gap"].teacher, found["gap_amplification"].point) == (0.5, 0, 0.5)
    found = drafts("invariance", "sentence-similarity", ours, theirs, groups=PAIRS[:2])
    assert found["invariance"].point == 0.5 and found["invariance"].teacher == 1


def test_likelihoods_of_a_group_are_held_to_its_first_text() -> None:
    groups = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6])]
    ours = losses([[1.0, 1.0], [4.0], [2.0, 2.0], [3.0], [3.0], [], [2.0]])
    found = drafts("invariance", "text-generation", ours, ours, groups=groups)
    assert found["invariance"].point == pytest.approx(np.exp((5 - 7) / 3))  # a text of no tokens says nothing
    assert found["invariance_difference"].point == 0


@pytest.mark.parametrize(
    ("task", "kind", "names"),
    [
        ("classifier", "invariance", {"invariance", "invariance_difference", "flip_rate"}),
        ("classifier", "counterfactual", {"consistency", "counterfactual_flips", "accuracy", "flip_rate"}),
        ("classifier", "bias", {"gap", "gap_amplification", "invariance"}),
        ("embedder", "invariance", {"invariance", "cosine_mean"}),
        ("embedder", "bias", {"gap", "gap_amplification"}),
        ("writer", "invariance", {"invariance", "perplexity_ratio"}),
        ("writer", "bias", {"gap", "gap_amplification", "token_agreement"}),
    ],
)
def test_pairs_are_slices_with_figures_and_examples(
    task: str, kind: str, names: set[str], request: pytest.FixtureRequest, texts: list[str], write_jsonl: Write,
    tmp_path: Path,
) -> None:  # fmt: skip
    teacher: Checkpoint = request.getfixturevalue(task)
    file = write_jsonl(
        tmp_path / "pairs.jsonl",
        [{"text": text, "label": i % 2, "pair_id": i // 2} for i, text in enumerate(texts)],
    )
    data = teacher.read(write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts]))
    pairs = read_pairs(teacher, kind, file)
    standard = with_slices(set_standard(teacher, data), SlicesAsked(pairs={"pairs": pairs, "few": pairs.head(9)}), 64)
    candidate = measure_checkpoint("student", _moved(teacher), standard, lambda done, total: None)
    whole, few = candidate.slices
    assert (whole.name, whole.kind, whole.count) == ("pairs", kind, 32)
    assert names <= {metric.name for metric in whole.metrics}
    assert (few.count, few.too_small) == (9, True)
    assert 0 < len(whole.changed) <= 5
    first = whole.changed[0]
    assert first.text == texts[first.row - 1]


def test_two_texts_of_a_row_are_named_by_that_row(
    classifier: Checkpoint, texts: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    rows = [{"original": texts[i], "perturbed": texts[i + 1]} for i in range(0, 64, 2)]
    pairs = read_pairs(classifier, "invariance", write_jsonl(tmp_path / "wide.jsonl", rows))
    candidate = measure_checkpoint(
        "student", _moved(classifier), _standard(classifier, pairs), lambda done, total: None
    )
    for item in candidate.slices[0].changed:
        assert item.text in rows[item.row - 1].values()


def _standard(teacher: Checkpoint, pairs: PairRows) -> Standard:
    return with_slices(set_standard(teacher, pairs.data), SlicesAsked(pairs={"pairs": pairs}), 64)


def _moved(checkpoint: Checkpoint) -> Checkpoint:
    """The same with other weights."""
    import torch

    other = load_checkpoint(checkpoint.source, checkpoint.task.name)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in other.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return other


def test_examples_of_a_slice_are_shown_under_its_name() -> None:
    item = ChangedExample(row=3, text="<i>", teacher="a", candidate="b", distance=0.5, measure="KL, nats")
    own = Slice(name="cad", kind="counterfactual", count=40, changed=[item], metrics=[
        Metric(name="consistency", value=0.58, teacher=0.6, higher_is_better=True, description=""),
        Metric(name="accuracy_kept", value=0.98, higher_is_better=True, description=""),
    ])  # fmt: skip
    moved = Metric(name="invariance", value=0.9, teacher=0.95, higher_is_better=True, description="")
    bare = Slice(name="names", kind="invariance", count=40, metrics=[moved])
    accuracy = Metric(name="accuracy", value=0.9, higher_is_better=True, description="")
    student = Candidate(name="int8", kind="artifact", backend="onnx", precision="int8", path="x", slices=[own, bare],
                        metrics=[accuracy])  # fmt: skip
    report = Report(kind="validation", title="t", created="2026-01-01T00:00:00+00:00", command="c",
                    candidates=[student])  # fmt: skip
    assert [each.name for each in changed_examples(report)] == ["int8, cad"]
    page, text = render_html(report), render_markdown(report)
    for told in (page, text):
        assert "int8, cad" in told and "<i>" not in told.split("int8, cad", 1)[1][:600]
        assert "consistency 0.580, teacher 0.600" in told and "0.980" in told
        assert "invariance 0.900, teacher 0.950" in told  # of a slice that has no labels, hence nothing kept


def test_a_file_and_pairs_of_one_name_are_refused(
    classifier: Checkpoint, texts: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    rows = [{"original": text, "perturbed": text} for text in texts[:4]]
    pairs = read_pairs(classifier, "invariance", write_jsonl(tmp_path / "wide.jsonl", rows))
    asked = SlicesAsked(files={"same": pairs.data}, pairs={"same": pairs})
    with pytest.raises(UsageError, match="Two slices are called 'same'"):
        with_slices(set_standard(classifier, pairs.data), asked, 64)
