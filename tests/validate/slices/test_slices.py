"""Slices: which rows each has, that its figures are those of these rows, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.errors import InputError, UsageError
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.validate.measurement import measure_checkpoint
from limbeck.validate.metrics import changed as changed_module
from limbeck.validate.metrics.changed import SHOWN
from limbeck.validate.records.report import Candidate, Slice
from limbeck.validate.rows.perturbations import PERTURBATIONS
from limbeck.validate.rows.prompts import PROMPT_SLICES
from limbeck.validate.slices.choosing import BUILTIN, MOST_VALUES, SlicesAsked, with_slices
from limbeck.validate.slices.invariance import invariance_drafts
from limbeck.validate.standard import Standard, set_standard

Write = Callable[..., Path]
TOPICS = ["sea", "war", "tea"]


def quiet(done: int, total: int) -> None: ...


def other(checkpoint: Checkpoint, by: float = 0.3) -> Checkpoint:
    """A checkpoint with other weights."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in checkpoint.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return checkpoint


class Slicing:
    """A teacher, a student of other weights, and rows of one task."""

    def __init__(self, model: Path, task: str, write: Write, folder: Path, rows: list[dict[str, Any]]) -> None:
        self.teacher = load_checkpoint(model, task)
        self.student = other(load_checkpoint(model, task))
        self.file = write(folder / f"{task}.jsonl", rows)

    def rows(self, keep: tuple[str, ...] = ()) -> Data:
        columns = {"text": "sentence"} if self.teacher.task.name == "text-classification" else {}
        return self.teacher.read(self.file, columns, keep)

    def standard(self, asked: SlicesAsked, limit: int = 64) -> Standard:
        return with_slices(set_standard(self.teacher, self.rows(tuple(asked.by))), asked, limit)

    def measured(self, asked: SlicesAsked, limit: int = 64) -> Candidate:
        return measure_checkpoint("student", self.student, self.standard(asked, limit), quiet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slices")


@pytest.fixture(scope="module")
def sentiment(tiny_checkpoint: Write, write_jsonl: Write, texts: list[str], folder: Path) -> Slicing:
    rows = [
        {"sentence": text, "label": i % 3, "topic": TOPICS[i // 3 % 3], "text": i % 2, "n": i}
        for i, text in enumerate([*texts, " ".join(texts[:12])])
    ]
    rows[7]["topic"] = ""
    model = tiny_checkpoint("bert", "text-classification")
    return Slicing(model, "text-classification", write_jsonl, folder, rows)


@pytest.fixture(scope="module")
def tagged(tiny_checkpoint: Write, write_jsonl: Write, texts: list[str], folder: Path) -> Slicing:
    rows = [
        {"tokens": text.split(), "tags": [len(word) % 3 for word in text.split()], "half": i % 2 == 0}
        for i, text in enumerate(texts)
    ]
    model = tiny_checkpoint("bert", "token-classification")
    return Slicing(model, "token-classification", write_jsonl, folder, rows)


@pytest.fixture(scope="module")
def pairs(tiny_checkpoint: Write, write_jsonl: Write, texts: list[str], folder: Path) -> Slicing:
    rows = [
        {"sentence1": first, "sentence2": second, "score": i % 5, "half": i % 2 == 0}
        for i, (first, second) in enumerate(zip(texts[:32], texts[32:], strict=True))
    ]
    return Slicing(tiny_checkpoint("bert"), "sentence-similarity", write_jsonl, folder, rows)


@pytest.fixture(scope="module")
def novel(tiny_checkpoint: Write, write_jsonl: Write, texts: list[str], folder: Path) -> Slicing:
    """Rows of one to six windows, and an empty one, which has none."""
    rows = [{"text": " ".join(texts[: i % 20 + 1]), "half": i % 2} for i in range(24)]
    rows[3]["text"] = ""
    return Slicing(tiny_checkpoint("gpt2", "text-generation"), "text-generation", write_jsonl, folder, rows)


def by_name(candidate: Candidate) -> Mapping[str, Slice]:
    assert len({part.name for part in candidate.slices}) == len(candidate.slices)
    return {part.name: part for part in candidate.slices}


def figures(metrics: Any) -> dict[str, tuple[float, float | None, float | None, int | None]]:
    return {metric.name: (metric.value, metric.teacher, metric.low, metric.count) for metric in metrics}


@pytest.mark.parametrize("task", ["sentiment", "tagged", "pairs", "novel"])
def test_a_part_of_the_rows_has_the_figures_of_a_file_of_just_these(
    task: str, request: pytest.FixtureRequest, write_jsonl: Write, tmp_path: Path
) -> None:
    slicing: Slicing = request.getfixturevalue(task)
    column = "topic" if task == "sentiment" else "half"
    rows = slicing.rows((column,))
    values = rows.values_of_column(column)
    name, value = ("topic=war", "war") if task == "sentiment" else (f"half={values[0]}", values[0])
    own = [i for i, each in enumerate(values) if each == value]
    alone = write_jsonl(tmp_path / "alone.jsonl", [{k: rows.rows[i][k] for k in rows.columns} for i in own])
    asked = SlicesAsked(files={"alone": slicing.teacher.read(alone)}, by=[column])
    candidate = slicing.measured(asked)
    found = by_name(candidate)
    assert (found[name].kind, found["alone"].kind) == ("column", "file")
    assert found[name].count == found["alone"].count > 0
    ours, theirs = figures(found[name].metrics), figures(found["alone"].metrics)
    assert ours.keys() == theirs.keys() == figures(candidate.metrics).keys()
    for metric, values in ours.items():  # batches of other lengths round otherwise
        assert values == pytest.approx(theirs[metric], abs=2e-4), metric


def test_every_value_of_a_column_is_a_slice(sentiment: Slicing) -> None:
    found = by_name(sentiment.measured(SlicesAsked(by=["topic", "text", "label"])))
    assert list(found)[:4] == ["topic=(empty)", "topic=sea", "topic=tea", "topic=war"]
    assert sum(part.count for name, part in found.items() if name.startswith("topic")) == 65
    assert (found["text=0"].count, found["text=1"].count) == (33, 32)  # the file's column, not the field of that name
    assert {"label=0", "label=1", "label=2"} < found.keys()  # a column that is the task's own
    assert (found["topic=(empty)"].count, found["topic=sea"].note) == (1, "23 examples are too few to judge by")


def test_columns_that_cannot_be_sliced_by_are_refused(sentiment: Slicing, tagged: Slicing) -> None:
    with pytest.raises(InputError, match=rf"'n' of .* has 65 values; slices are made of at most {MOST_VALUES}"):
        sentiment.standard(SlicesAsked(by=["n"]))
    with pytest.raises(InputError, match=r"no column 'topics'.*Did you mean 'topic'"):
        sentiment.standard(SlicesAsked(by=["topics"]))
    with pytest.raises(InputError, match="holds list values"):
        tagged.standard(SlicesAsked(by=["tokens"]))


def test_kept_columns_change_neither_fields_nor_hashes(sentiment: Slicing) -> None:
    bare, kept = sentiment.rows(), sentiment.rows(("topic", "text"))
    assert kept.columns == bare.columns and kept.fingerprint == bare.fingerprint
    assert kept.values("text") == bare.values("text")
    assert kept.head(3).values_of_column("text") == [0, 1, 0]
    with pytest.raises(UsageError, match=r"'topic' of .* was not kept"):
        bare.values_of_column("topic")
    assert kept.head(3).values_of_column("sentence") == bare.head(3).values("text")


@pytest.mark.parametrize("task", ["sentiment", "tagged", "pairs", "novel"])
def test_lengths_part_the_examples(task: str, request: pytest.FixtureRequest) -> None:
    slicing: Slicing = request.getfixturevalue(task)
    standard = slicing.standard(SlicesAsked(builtin=["length"]), limit=20)
    whole = len(standard.rows)
    positions = np.concatenate([part.positions for part in standard.slices if part.positions is not None])
    assert sorted(positions) == list(range(whole))
    assert all(part.count > 0 and part.kind == "length" for part in standard.slices)
    for part in standard.slices if task == "pairs" else ():  # both texts of a pair, in the same order
        first, second = part.standard.rows.reshape(2, -1)
        assert first.tolist() == second.tolist()
    ends = [part.name.removeprefix("length ") for part in standard.slices]
    assert ("beyond 20" in ends) == (task != "novel")
    bounds = [tuple(map(int, end.split("-"))) for end in ends if end != "beyond 20"]
    assert all(low <= high for low, high in bounds)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(bounds))


def test_positions_part_the_tokens_of_windows(novel: Slicing) -> None:
    limit = novel.teacher.max_length
    standard = novel.standard(SlicesAsked(builtin=["position"]))
    assert [part.name for part in standard.slices] == [
        f"position {low}-{high - 1}"
        for low, high in itertools.pairwise([1, limit // 4, limit // 2, 3 * limit // 4, limit])
    ]
    candidate = measure_checkpoint("student", novel.student, standard, quiet)
    found = by_name(candidate)
    whole, parts = candidate.metric("perplexity"), [part.metric("perplexity") for part in found.values()]
    assert all(part.kind == "position" for part in found.values())
    assert whole is not None and whole.count == sum(part.count for part in parts)  # each token is in one of them
    mean = sum(part.count * np.log(part.value) for part in parts) / whole.count
    assert mean == pytest.approx(np.log(whole.value), rel=1e-6)
    theirs = sum(part.count * np.log(part.teacher) for part in parts) / whole.count
    assert theirs == pytest.approx(np.log(whole.teacher), rel=1e-6)
    assert found["position 1-15"].count == 23  # where a text begins: later windows score no token so early
    assert 0 < found["position 48-63"].count < len(standard.rows)
    assert not candidate.changed or all(part.changed == [] for part in found.values())


def test_a_model_that_fails_late_in_its_context_is_seen_there(novel: Slicing) -> None:
    """As one does whose positions were never trained beyond 32."""
    standard = novel.standard(SlicesAsked(builtin=["position"]))
    student = load_checkpoint(novel.teacher.source, "text-generation")
    with torch.no_grad():
        student.model.transformer.wpe.weight[32:] = 0
    found = by_name(measure_checkpoint("student", student, standard, quiet))
    kl = [part.metric("next_token_kl").value for part in found.values()]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[1] == pytest.approx(0, abs=1e-9)
    assert min(kl[2:]) > 1e-3


def test_texts_that_are_short_have_fewer_positions(tiny_checkpoint: Write, write_jsonl: Write, tmp_path: Path) -> None:
    teacher = load_checkpoint(tiny_checkpoint("gpt2", "text-generation"))
    rows = teacher.read(write_jsonl(tmp_path / "short.jsonl", [{"text": "a fox"}, {"text": "rain"}]))
    standard = with_slices(set_standard(teacher, rows), SlicesAsked(builtin=["position"]), 64)
    assert 1 <= len(standard.slices) <= 4
    assert sum(len(row) for part in standard.slices for row in part.standard.predictions["nll"]) == sum(
        len(row) for row in standard.predictions["nll"]
    )


def test_what_is_cut_is_a_slice_of_its_own(sentiment: Slicing) -> None:
    found = by_name(sentiment.measured(SlicesAsked(builtin=["length"])))
    assert found["length beyond 64"].count == 1
    assert found["length beyond 64"].note is not None
    few = {metric.name for metric in found["length beyond 64"].metrics}
    assert "accuracy" in few and "kl_mean" not in few  # one example has no bootstrap
    assert "no kl_mean" in found["length beyond 64"].note


@pytest.mark.parametrize("task", ["sentiment", "tagged", "pairs", "novel"])
def test_perturbed_rows_are_the_same_rows_and_say_how_answers_move(task: str, request: pytest.FixtureRequest) -> None:
    slicing: Slicing = request.getfixturevalue(task)
    names = list(PERTURBATIONS) if task == "sentiment" else ["case", "unicode"]
    standard = slicing.standard(SlicesAsked(builtin=names))
    candidate = measure_checkpoint("student", slicing.student, standard, quiet)
    found = by_name(candidate)
    assert list(found) == names
    for part in standard.slices:
        assert len(part.standard.data) == len(standard.data)
        for field in ("label", "tags", "score"):
            if standard.data.has(field):
                assert part.standard.data.values(field) == standard.data.values(field)
        invariance, difference = (found[part.name].metric(name) for name in ("invariance", "invariance_difference"))
        assert invariance is not None and invariance.teacher is not None and difference is not None
        assert difference.value == pytest.approx(invariance.value - invariance.teacher, abs=1e-9)
        assert difference.low is not None and difference.high is not None and difference.low < difference.high + 1e-9
        assert invariance.higher_is_better and difference.higher_is_better
    knows_no_case = task != "novel"  # as the tokenizers of these encoders
    unmoved = found["case"].metric("invariance")
    assert unmoved is not None
    assert (unmoved.value == pytest.approx(1, abs=1e-5)) is knows_no_case
    moved = found["unicode"].metric("invariance")
    assert moved is not None and moved.value < 0.9999


def test_invariance_is_the_share_of_answers_that_stay(sentiment: Slicing) -> None:
    standard = sentiment.standard(SlicesAsked(builtin=["typos"]))
    metric = by_name(measure_checkpoint("student", sentiment.student, standard, quiet))["typos"].metric("invariance")
    before = set_standard(sentiment.student, standard.data).predictions["logits"].argmax(axis=1)
    after = set_standard(sentiment.student, standard.slices[0].standard.data).predictions["logits"].argmax(axis=1)
    assert metric is not None and metric.value == pytest.approx(np.mean(before == after))
    assert metric.count == 65


def test_perplexities_are_compared_by_the_same_tokens() -> None:
    """Twice the tokens, each half as hard, are no gain; nor is a window more of the same row."""

    def answers(*nll: list[float]) -> dict[str, np.ndarray]:
        rows = np.empty(len(nll), dtype=object)
        rows[:] = [np.array(each) for each in nll]
        return {"nll": rows}

    plain, split = answers([2.0, 2.0], [4.0]), answers([1.0] * 4, [2.0], [2.0], [9.0])
    harder = answers([1.0] * 4, [4.0], [3.0], [9.0])
    places = np.array([0, 2]), np.array([0, 2, 2, 3])  # row 1 has no tokens; row 3 had none before
    found = invariance_drafts("text-generation", (plain, split), (plain, harder), places)
    invariance, difference = (draft.point for draft in found)
    assert invariance == pytest.approx(np.exp(-3 / 3))
    assert difference == pytest.approx(np.exp(-1) - 1)


def test_a_candidate_that_is_the_teacher_moves_as_the_teacher_does(novel: Slicing) -> None:
    asked = SlicesAsked(builtin=["typos"])
    same = measure_checkpoint("same", novel.teacher, novel.standard(asked), quiet)
    difference = by_name(same)["typos"].metric("invariance_difference")
    assert difference is not None and difference.value == pytest.approx(0, abs=1e-6)
    assert same.changed == []


def test_tagged_words_stay_words(tagged: Slicing) -> None:
    part = tagged.standard(SlicesAsked(builtin=["unicode"])).slices[0].standard.data
    before, after = tagged.rows().values("tokens"), part.values("tokens")
    assert [len(words) for words in before] == [len(words) for words in after]
    assert before != after


def test_what_does_not_suit_is_refused(sentiment: Slicing, tagged: Slicing) -> None:
    with pytest.raises(UsageError, match=r"no built-in slice 'typo'.*Did you mean 'typos'"):
        sentiment.standard(SlicesAsked(builtin=["typo"]))
    for name in ("typos", "punctuation"):
        with pytest.raises(UsageError, match=f"'{name}' changes words.*case, unicode and length"):
            tagged.standard(SlicesAsked(builtin=[name]))
    with pytest.raises(UsageError, match="Two slices are called 'typos'"):
        sentiment.standard(SlicesAsked(files={"typos": sentiment.rows()}, builtin=["typos"]))
    assert set(BUILTIN) == {"length", "position", *PERTURBATIONS, *PROMPT_SLICES}
    with pytest.raises(UsageError, match=r"'position' is of tokens .*; this one is for text-classification"):
        sentiment.standard(SlicesAsked(builtin=["position"]))


def test_the_teacher_is_asked_once_for_all_candidates(sentiment: Slicing, monkeypatch: pytest.MonkeyPatch) -> None:
    standard = sentiment.standard(SlicesAsked(by=["topic"], builtin=["typos", "length"]))
    asked: list[Checkpoint] = []
    run = Checkpoint.run
    monkeypatch.setattr(Checkpoint, "run", lambda self, batch: asked.append(self) or run(self, batch))
    for name in ("one", "two"):
        measure_checkpoint(name, sentiment.student, standard, quiet)
    assert not any(each is sentiment.teacher for each in asked)
    batches = -(-65 // 32)
    assert len(asked) == 2 * 2 * batches  # the whole and the typos; parts of the whole are not run again


def test_a_slice_on_which_answers_are_no_numbers_fails_a_check(sentiment: Slicing) -> None:
    class Broken(Checkpoint):
        """Answers with NaN to a batch of five."""

        def run(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
            outputs = super().run(batch)
            if batch["input_ids"].shape[0] == 5:
                outputs["logits"][:] = np.nan
            return outputs

    student = Broken(**{name: getattr(sentiment.student, name) for name in sentiment.student.__dataclass_fields__})
    standard = sentiment.standard(SlicesAsked(files={"five": sentiment.rows().head(5)}))
    candidate = measure_checkpoint("student", student, standard, quiet)
    assert [check.detail for check in candidate.checks if not check.passed] == ["NaN or infinity on the slice five"]
    assert by_name(candidate)["five"].metrics == []
    assert candidate.metrics


@pytest.mark.parametrize(
    ("task", "measure"),
    [
        ("sentiment", "KL, nats"),
        ("tagged", "KL of the word, nats"),
        ("pairs", "1 − cosine"),
        ("novel", "rise of nats a token"),
    ],
)
def test_the_examples_that_changed_most_come_first(task: str, measure: str, request: pytest.FixtureRequest) -> None:
    slicing: Slicing = request.getfixturevalue(task)
    changed = slicing.measured(SlicesAsked()).changed
    assert 0 < len(changed) <= SHOWN
    distances = [item.distance for item in changed]
    assert distances == sorted(distances, reverse=True) and distances[-1] > 0
    assert {item.measure for item in changed} == {measure}
    rows, first = slicing.rows(), changed[0]
    row = rows.rows[first.row - 1]
    text = row.get("text") or " ".join(row.get("tokens") or []) or f"{row['sentence1']} / {row['sentence2']}"
    assert first.text.rstrip("…") == text[: len(first.text.rstrip("…"))] and len(first.text) <= 300
    assert (first.label is None) == (task == "novel")
    assert first.teacher and first.candidate


def test_the_largest_divergence_is_that_of_its_row(sentiment: Slicing) -> None:
    first = sentiment.measured(SlicesAsked()).changed[0]
    one = sentiment.rows().rows.select([first.row - 1])
    alone = replace(sentiment.rows(), rows=one)
    log_p, log_q = (
        torch.log_softmax(torch.tensor(set_standard(model, alone).predictions["logits"]), dim=1)
        for model in (sentiment.teacher, sentiment.student)
    )
    assert first.distance == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-3)
    names = ["negative", "neutral", "positive"]
    assert first.teacher.startswith(names[int(log_p.argmax())])
    assert first.candidate.startswith(names[int(log_q.argmax())])


def test_spaces_of_different_widths_have_no_distance(pairs: Slicing) -> None:
    standard = set_standard(pairs.teacher, pairs.rows())
    narrow = {"embedding": standard.predictions["embedding"][:, :16]}
    assert changed_module.most_changed(standard, narrow) == []
