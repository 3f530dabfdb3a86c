"""Monitoring's baseline: that it says what the rows are, and that other texts are seen and like texts are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from limbeck.errors import InputError
from limbeck.models.checkpoint import Checkpoint, load_checkpoint, load_tokenizer
from limbeck.models.data import Data
from limbeck.validate.baseline import Monitoring, profile_of, shifts
from limbeck.validate.measurement import measure_checkpoint
from limbeck.validate.predictions import Predictions
from limbeck.validate.records.profile import Baseline, Histogram, Profile, load_baseline
from limbeck.validate.standard import set_standard
from limbeck.validate.statistics.distributions import categories_of, histogram_of, shift_of

Write = Callable[..., Path]
ROWS = 300


def test_a_histogram_holds_a_tenth_a_bin_and_what_lies_outside() -> None:
    values = np.arange(100.0)
    found = histogram_of(values)
    assert found.counts == [0, *[10] * 10, 0] and (found.p50, found.count) == (49.5, 100)
    again = histogram_of(np.array([-5.0, 0.0, 55.0, 200.0]), like=found)
    assert (again.counts[0], again.counts[1], again.counts[6], again.counts[-1]) == (1, 1, 1, 1)
    assert histogram_of(np.full(9, 3.0)).counts == [0, 9, 0]


def test_the_index_is_that_of_the_formula() -> None:
    kinds = ["a", "b"]
    before, after = (
        categories_of(kinds, np.repeat([0, 1], [600, 400]), 1000),
        categories_of(kinds, np.repeat([0, 1], [300, 700]), 1000),
    )
    shift = shift_of("labels", before, after)
    expected = 0.3 * np.log(0.6 / 0.3) + 0.3 * np.log(0.7 / 0.4)
    assert shift.psi == pytest.approx(expected, rel=0.01) and shift.size == "large" and shift.ks is None
    p, q = np.array([0.6, 0.4]), np.array([0.3, 0.7])
    entropy = [stats.entropy(side, base=2) for side in ((p + q) / 2, p, q)]
    assert shift.js == pytest.approx(entropy[0] - (entropy[1] + entropy[2]) / 2, rel=0.01)
    ordered = histogram_of(np.arange(1000.0))
    moved = shift_of("tokens", ordered, histogram_of(np.arange(1000.0) + 300, like=ordered))
    assert moved.ks == pytest.approx(0.3, abs=0.01)
    with pytest.raises(ValueError, match="in the baseline's bins"):
        shift_of("tokens", ordered, histogram_of(np.arange(50.0)))


@pytest.mark.parametrize("size", [50, 500, 5000])
def test_like_samples_are_called_shifted_one_time_in_a_thousand(size: int) -> None:
    random = np.random.default_rng(size)
    alarms = 0
    for _ in range(400):
        baseline = histogram_of(random.gamma(2.0, 20.0, 1000).round())
        shift = shift_of("tokens", baseline, histogram_of(random.gamma(2.0, 20.0, size).round(), like=baseline))
        alarms += shift.psi >= shift.chance
        assert shift.size == "none" or shift.psi >= shift.chance
    assert alarms <= 4


@pytest.mark.parametrize("size", [100, 1000])
def test_a_sample_from_elsewhere_is_seen(size: int) -> None:
    random = np.random.default_rng(0)
    baseline = histogram_of(random.gamma(2.0, 20.0, 1000))
    assert shift_of("tokens", baseline, histogram_of(random.gamma(2.0, 60.0, size), like=baseline)).size == "large"
    few = shift_of("tokens", baseline, histogram_of(random.gamma(2.0, 24.0, size), like=baseline))
    assert few.size == "none"  # a sixth longer is below what the rule calls a shift


class Traffic:
    """Rows of one kind and of another, and a model that answers to them."""

    def __init__(
        self, folder: Path, task: str, path: Path, write: Write, rows: Callable[[np.random.Generator, bool], Any]
    ):
        self.model = load_checkpoint(folder, task)
        random = np.random.default_rng(0)
        self.rows = [
            self.model.read(write(path / f"{task}-{i}.jsonl", [rows(random, odd) for _ in range(ROWS)]))
            for i, odd in enumerate([False, False, True])
        ]

    def answers(self, data: Data) -> Predictions:
        return set_standard(self.model, data).predictions

    def profile(self, data: Data, like: Profile | None = None) -> Profile:
        names = set_standard(self.model, data).label_names
        return profile_of(data, self.model.tokenizer, self.answers(data), label_names=names, like=like)


@pytest.fixture(scope="module")
def mix(texts: list[str]) -> Callable[[np.random.Generator, bool], list[str]]:
    """One to three sentences; odd ones have their words turned round, and a letter that no tokenizer has seen."""

    def draw(random: np.random.Generator, odd: bool) -> list[str]:
        chosen = [str(text) for text in random.choice(texts, size=random.integers(1, 4))]
        return [" ".join([*(word[::-1] for word in text.split()), "щ"]) for text in chosen] if odd else chosen

    return draw


TASKS = {
    "sentence-similarity": ("bert", lambda words: {"text": " ".join(words)}),
    "text-classification": ("bert", lambda words: {"text": " ".join(words)}),
    "token-classification": ("bert", lambda words: {"tokens": " ".join(words).split()}),
    "fill-mask": ("roberta", lambda words: {"text": " ".join(words)}),
    "text-generation": ("llama", lambda words: {"text": " ".join(words)}),
}


ANSWERS = {"sentence-similarity": "embedding", "text-classification": "confidence",
           "text-generation": "confidence"}  # fmt: skip
"""What an untrained model's answers give away."""


@pytest.fixture(scope="module", params=TASKS)
def traffic(
    request: pytest.FixtureRequest, tiny_checkpoint: Write, write_jsonl: Write, mix: Any, tmp_path_factory: Any
) -> Traffic:
    family, row = TASKS[request.param]
    return Traffic(
        tiny_checkpoint(family, request.param),
        request.param,
        tmp_path_factory.mktemp("traffic"),
        write_jsonl,
        lambda random, odd: row(mix(random, odd)),
    )


def test_like_traffic_is_not_called_shifted_and_other_traffic_is(traffic: Traffic) -> None:
    rows, like, odd = traffic.rows
    baseline = traffic.profile(rows)
    assert [shift.size for shift in shifts(baseline, baseline)] == ["none"] * len(shifts(baseline, baseline))
    assert {shift.name for shift in shifts(baseline, traffic.profile(like, baseline)) if shift.size != "none"} == set()
    found = {shift.name: shift.size for shift in shifts(baseline, traffic.profile(odd, baseline))}
    assert found["tokens"] == found["characters_per_token"] == "large"
    if answers := ANSWERS.get(traffic.model.task.name):
        assert found[answers] in ("moderate", "large"), found
    if baseline.texts.unknown_token_rate:
        assert found["unknown_tokens"] == "large"


def test_other_tags_are_seen_by_the_number_of_texts(tiny_checkpoint: Write, write_jsonl: Write, tmp_path: Path) -> None:
    model, random = load_checkpoint(tiny_checkpoint("bert", "token-classification")), np.random.default_rng(0)
    data = model.read(write_jsonl(tmp_path / "rows.jsonl", [{"tokens": ["Go", "on", "."] * 4}] * 200))

    def profile(bias: float, like: Profile | None = None) -> Profile:
        logits = np.empty(200, dtype=object)
        logits[:] = list(random.normal([bias, 0.0, 0.0], size=(200, 12, 3)))
        return profile_of(data, model.tokenizer, {"logits": logits}, label_names=["O", "NAME", "PLACE"], like=like)

    baseline = profile(0.0)
    found = {shift.name: shift for shift in shifts(baseline, profile(2.0, baseline))}
    assert found["labels"].size == found["confidence"].size == "large" and found["tokens"].size == "none"
    assert found["labels"].chance > 0.1  # 200 texts, not 2,400 words
    assert {shift.size for shift in shifts(baseline, profile(0.0, baseline))} == {"none"}


def test_a_profile_says_what_the_rows_are(traffic: Traffic) -> None:
    rows, tokenizer = traffic.rows[2], traffic.model.tokenizer
    profile = traffic.profile(rows)
    field = "tokens" if rows.has("tokens") else "text"
    texts = [" ".join(value) if field == "tokens" else value for value in rows.values(field)]
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    lengths = [len(ids) for ids in encoded]
    assert profile.texts.tokens.count == ROWS and profile.texts.tokens.mean == pytest.approx(np.mean(lengths))
    assert max(lengths) > traffic.model.max_length  # counted before they are cut
    density = np.mean([len(text) / n for text, n in zip(texts, lengths, strict=True)])
    assert profile.texts.characters_per_token.mean == pytest.approx(density)
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in encoded)
    if unknown:
        assert profile.texts.unknown_token_rate == pytest.approx(unknown / sum(lengths))
    answers = traffic.answers(rows)
    if "nll" in answers:
        means = [np.mean(row) for row in answers["nll"] if len(row)]
        assert profile.negative_log_likelihood.mean == pytest.approx(np.mean(means), rel=1e-5)
    if profile.labels is not None:
        logits = answers["logits"]
        top = np.concatenate([np.atleast_2d(row).argmax(axis=1) for row in logits])
        name = traffic.model.model.config.id2label[0]
        assert profile.labels.shares[name] == pytest.approx(np.mean(top == 0))
        assert profile.labels.count == ROWS


def test_an_end_token_that_stands_in_is_not_an_unknown_word(
    tiny_checkpoint: Write, write_jsonl: Write, tmp_path: Path
) -> None:
    model: Checkpoint = load_checkpoint(tiny_checkpoint("gpt2", "text-generation"))
    data = model.read(write_jsonl(tmp_path / "rows.jsonl", [{"text": "Go on."}] * 3))
    tokenizer = load_tokenizer(tiny_checkpoint("gpt2", "text-generation"))
    answers = set_standard(model, data).predictions
    assert profile_of(data, tokenizer, answers).texts.unknown_token_rate == 0
    tokenizer.unk_token = tokenizer.eos_token
    assert profile_of(data, tokenizer, answers).texts.unknown_token_rate is None


def test_the_baseline_is_stored_small_and_read_again(traffic: Traffic, tmp_path: Path) -> None:
    standard = set_standard(traffic.model, traffic.rows[0].head(40))
    monitoring = Monitoring(standard)
    measure_checkpoint("same", traffic.model, replace(standard, observers=(monitoring,)), lambda done, total: None)
    baseline = monitoring.baseline({"same": "0123"})
    path = baseline.save(tmp_path)
    assert load_baseline(tmp_path) == baseline and path.stat().st_size < 60_000
    assert baseline.candidates["same"].artifact_id == "0123"
    assert baseline.candidates["same"].model_copy(update={"artifact_id": None}) == baseline.teacher


def test_what_is_no_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"monitoring\.json"):
        load_baseline(tmp_path)
    histogram = histogram_of(np.arange(5.0)).model_dump()
    with pytest.raises(ValueError, match="add up to its count"):
        Histogram.model_validate({**histogram, "count": 9})
    with pytest.raises(ValueError, match="must rise"):
        Histogram.model_validate({**histogram, "edges": histogram["edges"][::-1]})
    texts = {"tokens": histogram, "characters_per_token": histogram}
    good = Baseline.model_validate({"task": "fill-mask", "data": "rows", "teacher": {"texts": texts}})
    path = good.save(tmp_path)
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(InputError, match="schema version 2"):
        load_baseline(tmp_path)


def test_embeddings_of_another_width_are_refused(tiny_checkpoint: Write, write_jsonl: Write, tmp_path: Path) -> None:
    model = load_checkpoint(tiny_checkpoint("bert"))
    data = model.read(write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in ("Go.", "Rain fell.", "Cats.")]))
    answers = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    like = profile_of(data, model.tokenizer, {"embedding": answers})
    with pytest.raises(InputError, match="width 4, and those of the baseline 8"):
        profile_of(data, model.tokenizer, {"embedding": answers[:, :4]}, like=like)
