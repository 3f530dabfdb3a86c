"""Tasks: rows become batches, outputs become predictions, and padding changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError, UsageError
from limbeck.models.batching import (
    IGNORED_LABEL,
    Examples,
    pad,
)
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.tasks import TASKS, get_task
from limbeck.models.tasks.token_classification import UNKNOWN_LABEL
from limbeck.validate.predictions import predict

TinyCheckpoint = Callable[..., Path]
ReadRows = Callable[..., Examples]

FAMILY_OF_TASK = {
    "text-classification": "roberta",
    "token-classification": "bert",
    "sentence-similarity": "mpnet",
    "fill-mask": "distilbert",
    "text-generation": "llama",
}
every_task = pytest.mark.parametrize("task", sorted(FAMILY_OF_TASK))


@pytest.fixture
def load(tiny_checkpoint: TinyCheckpoint) -> Callable[[str], Checkpoint]:
    return lambda task: load_checkpoint(tiny_checkpoint(FAMILY_OF_TASK[task], task=task), task=task)


@pytest.fixture
def examples_of(tmp_path: Path, write_jsonl: Callable[..., Path]) -> ReadRows:
    """`examples_of(checkpoint, rows)`: the rows, written to a file and read by the checkpoint's task."""

    def make(checkpoint: Checkpoint, rows: list[dict[str, Any]], max_length: int | None = None) -> Examples:
        data = checkpoint.read(write_jsonl(tmp_path / "rows.jsonl", rows))
        length = max_length or checkpoint.max_length
        return checkpoint.task.examples(data, checkpoint.tokenizer, length, checkpoint.model.config)

    return make


def rows_for(task: str, texts: list[str]) -> list[dict[str, Any]]:
    if task == "token-classification":
        return [{"tokens": text.split(), "tags": [i % 3 for i, _ in enumerate(text.split())]} for text in texts]
    return [{"text": text} for text in texts]


def numbers(values: np.ndarray) -> np.ndarray:
    """Predictions as one array of numbers, rows of unlike length joined."""
    return np.concatenate(list(values)) if values.dtype == object else values


def scored(checkpoint: Checkpoint, features: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], float]:
    batch = pad(features, checkpoint.tokenizer)
    outputs = checkpoint.run(batch)
    loss = checkpoint.task.loss({name: torch.from_numpy(value) for name, value in outputs.items()}, batch)
    return checkpoint.task.predictions(outputs, batch), float(loss)


def test_tasks_are_found_by_name_and_a_near_name_is_suggested() -> None:
    assert all(get_task(name).name == name for name in TASKS)
    with pytest.raises(UsageError, match="Did you mean 'fill-mask'"):
        get_task("fillmask")


# Text classification.


def test_labels_may_be_ids_or_names(load: Any, examples_of: ReadRows) -> None:
    checkpoint = load("text-classification")
    by_id = examples_of(checkpoint, [{"text": "Go.", "label": 2}, {"text": "Rain fell.", "label": 0}])
    by_name = examples_of(
        checkpoint, [{"text": "Go.", "label": "positive"}, {"text": "Rain fell.", "label": "negative"}]
    )
    assert by_id.references is not None and by_id.references.tolist() == [2, 0]
    assert by_id.features == by_name.features
    assert pad(by_id.features, checkpoint.tokenizer)["labels"].tolist() == [2, 0]


@pytest.mark.parametrize("label", [3, -1, "great", 1.5, None])
def test_a_label_that_the_model_lacks_is_named(load: Any, examples_of: ReadRows, label: object) -> None:
    rows = [{"text": "Go.", "label": label}] if label is None else [{"text": "Go.", "label": label}] * 2
    with pytest.raises(
        InputError, match=r"Row 1 of .*rows\.jsonl has the label .*0 \(negative\), 1 \(neutral\)"
    ) as caught:
        examples_of(load("text-classification"), rows)
    assert repr(label) in caught.value.message


def test_the_loss_is_the_cross_entropy_of_the_labels(load: Any, examples_of: ReadRows) -> None:
    checkpoint = load("text-classification")
    examples = examples_of(checkpoint, [{"text": "Go.", "label": 2}, {"text": "Rain fell.", "label": 0}])
    predictions, loss = scored(checkpoint, examples.features)
    logits = predictions["logits"].astype(np.float64)
    assert logits.shape == (2, 3)
    by_hand = [math.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, [2, 0], strict=True)]
    assert loss == pytest.approx(sum(by_hand) / 2, rel=1e-5)


def test_pairs_are_one_example_each(load: Any, examples_of: ReadRows) -> None:
    checkpoint = load("text-classification")
    pair = examples_of(checkpoint, [{"text": "Rain fell.", "hypothesis": "It was wet."}])
    ids = pair.features[0]["input_ids"]
    end = checkpoint.tokenizer.sep_token_id
    assert ids.count(end) == 2
    assert checkpoint.tokenizer.decode(ids[ids.index(end) :], skip_special_tokens=True).strip() == "It was wet."
    assert pair.references is None and "labels" not in pair.features[0]


def test_without_labels_the_loss_says_how_the_output_moves(load: Any, examples_of: ReadRows) -> None:
    checkpoint = load("text-classification")
    batch = pad(examples_of(checkpoint, [{"text": "Go."}, {"text": "Rain fell."}]).features, checkpoint.tokenizer)
    outputs = {"logits": torch.ones(2, 3, requires_grad=True)}
    checkpoint.task.loss(outputs, batch).backward()
    gradient = outputs["logits"].grad
    assert gradient is not None and (gradient != 0).all()


# Token classification.


def test_each_words_first_token_bears_its_tag(load: Any, examples_of: ReadRows) -> None:
    checkpoint = load("token-classification")
    words = ["Marta", "unbelievable", "Lisbon"]
    examples = examples_of(checkpoint, [{"tokens": words, "tags": ["NAME", "O", "PLACE"]}])
    labels = examples.features[0]["labels"]
    tokens = checkpoint.tokenizer.convert_ids_to_tokens(examples.features[0]["input_ids"])
    assert len(tokens) > len(words) + 2  # a word is cut into several tokens
    bearing = [(token, label) for token, label in zip(tokens, labels, strict=True) if label != IGNORED_LABEL]
    assert [label for _, label in bearing] == [1, 0, 2]
    assert all(not token.startswith("##") for token, _ in bearing)
    assert examples.references is not None and examples.references.tolist() == [1, 0, 2]
    predictions, loss = scored(checkpoint, examples.features)
    logits = predictions["logits"][0].astype(np.float64)
    assert logits.shape == (3, 3)
    by_hand = np.log(np.exp(logits).sum(axis=1)) - logits[[0, 1, 2], [1, 0, 2]]
    assert loss == pytest.approx(by_hand.mean(), rel=1e-5)


def test_words_without_tags_are_scored_but_have_no_references(load: Any, examples_of: ReadRows) -> None:
    examples = examples_of(load("token-classification"), [{"words": ["Anna", "and", "Peter"]}])
    assert examples.references is None
    assert examples.features[0]["labels"].count(UNKNOWN_LABEL) == 3


def test_tags_must_be_as_many_as_tokens_and_known(load: Any, examples_of: ReadRows) -> None:
    checkpoint = load("token-classification")
    with pytest.raises(InputError, match="has 2 tokens and 1 tags"):
        examples_of(checkpoint, [{"tokens": ["a", "b"], "tags": ["O"]}])
    with pytest.raises(InputError, match="has the label 'CITY'"):
        examples_of(checkpoint, [{"tokens": ["a"], "tags": ["CITY"]}])


def test_sentences_in_the_place_of_words_are_refused(load: Any, examples_of: ReadRows) -> None:
    with pytest.raises(InputError, match=r"Row 1 .*list of words"):
        examples_of(load("token-classification"), [{"tokens": "Anna and Peter"}])


# Sentence similarity.


def test_pairs_of_sentences_are_two_features_each(load: Any, examples_of: ReadRows) -> None:
    checkpoint = load("sentence-similarity")
    rows = [
        {"sentence1": "Go.", "sentence2": "Rain fell.", "score": 1},
        {"sentence1": "a", "sentence2": "b", "score": 4.5},
    ]
    examples = examples_of(checkpoint, rows)
    decoded = [
        checkpoint.tokenizer.decode(feature["input_ids"], skip_special_tokens=True) for feature in examples.features
    ]
    assert decoded == ["go.", "a", "rain fell.", "b"]
    assert examples.references is not None and examples.references.tolist() == [1.0, 4.5]
    predictions, _ = scored(checkpoint, examples.features)
    assert predictions["embedding"].shape == (4, 32)
    np.testing.assert_allclose(np.linalg.norm(predictions["embedding"], axis=1), 1, rtol=1e-5)


def test_sentence_similarity_says_what_is_missing(load: Any, examples_of: ReadRows) -> None:
    with pytest.raises(InputError, match="no column for 'text', 'sentence1', 'sentence2', 'score'; it has title"):
        examples_of(load("sentence-similarity"), [{"title": "a"}])
    rows = [{"sentence1": "a", "sentence2": "b", "label": "entailment"}]
    with pytest.raises(InputError, match=r"Row 1 .* has the score 'entailment', which is not a number"):
        examples_of(load("sentence-similarity"), rows)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"token-classification"}))
def test_a_row_without_text_is_not_read_as_the_word_none(load: Any, examples_of: ReadRows, task: str) -> None:
    with pytest.raises(InputError, match=r"Row 2 of .*rows\.jsonl has no text\."):
        examples_of(load(task), [{"text": "Go."}, {"text": None}])


# Language models.


def test_fill_mask_masks_the_same_tokens_at_each_run(load: Any, examples_of: ReadRows, texts: list[str]) -> None:
    checkpoint = load("fill-mask")
    rows = [{"text": text} for text in texts[:20]]
    first, again = examples_of(checkpoint, rows), examples_of(checkpoint, rows)
    assert first.features == again.features
    whole = checkpoint.tokenizer(texts[:20])["input_ids"]
    mask, special = checkpoint.tokenizer.mask_token_id, set(checkpoint.tokenizer.all_special_ids)
    for feature, ids in zip(first.features, whole, strict=True):
        masked = [i for i, token in enumerate(feature["input_ids"]) if token == mask]
        assert masked == [i for i, label in enumerate(feature["labels"]) if label != IGNORED_LABEL]
        assert [feature["labels"][i] for i in masked] == [ids[i] for i in masked]
        assert not special & {ids[i] for i in masked}
        open_tokens = sum(token not in special for token in ids)
        assert len(masked) == max(1, round(0.15 * open_tokens))
        assert [t for i, t in enumerate(ids) if i not in masked] == [t for t in feature["input_ids"] if t != mask]


def test_fill_mask_scores_only_what_was_masked(load: Any, examples_of: ReadRows, texts: list[str]) -> None:
    checkpoint = load("fill-mask")
    examples = examples_of(checkpoint, [{"text": text} for text in texts[:6]])
    predictions, loss = scored(checkpoint, examples.features)
    counts = [sum(label != IGNORED_LABEL for label in feature["labels"]) for feature in examples.features]
    assert [len(row) for row in predictions["nll"]] == counts
    assert loss == pytest.approx(float(numbers(predictions["nll"]).mean()), rel=1e-5)


def test_fill_mask_needs_a_mask_token(load: Any, examples_of: ReadRows) -> None:
    checkpoint = load("fill-mask")
    checkpoint.tokenizer.mask_token = None
    with pytest.raises(InputError, match="mask token"):
        examples_of(checkpoint, [{"text": "Go."}])


def test_a_text_of_one_token_has_no_window(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint, data = generator(tiny_checkpoint), Rows({"text": [""]})
    with pytest.raises(InputError, match="at least two tokens"):
        checkpoint.task.examples(data, checkpoint.tokenizer, 8, checkpoint.model.config)  # type: ignore[arg-type]


def test_a_window_has_context_from_the_one_before(tiny_checkpoint: TinyCheckpoint) -> None:
    """A token that is scored in the second window has the score of a text that begins where that window does."""
    checkpoint = generator(tiny_checkpoint)
    text = " ".join(["rain", "harbour", "fox", "lamp", "night"] * 4)
    data = Rows({"text": [text]})
    examples = checkpoint.task.examples(data, checkpoint.tokenizer, 16, checkpoint.model.config)  # type: ignore[arg-type]
    second = examples.features[1]
    alone = {**second, "labels": second["input_ids"]}
    (by_window, _), (whole, _) = scored(checkpoint, [second]), scored(checkpoint, [alone])
    np.testing.assert_allclose(by_window["nll"][0], whole["nll"][0][3:], rtol=1e-5)
    assert len(by_window["nll"][0]) == len(second["input_ids"]) - 4


@given(words=st.lists(st.sampled_from(["rain", "harbour", "fox", "Žluťoučký"]), min_size=1, max_size=60))
@settings(max_examples=10)
def test_the_windows_of_a_long_text_lose_no_token(tiny_checkpoint: TinyCheckpoint, words: list[str]) -> None:
    checkpoint = generator(tiny_checkpoint)
    whole = checkpoint.tokenizer(" ".join(words))["input_ids"]
    data = Rows({"text": [" ".join(words)]})
    features = checkpoint.task.examples(data, checkpoint.tokenizer, 8, checkpoint.model.config).features  # type: ignore[arg-type]
    joined = features[0]["input_ids"] + [token for feature in features[1:] for token in feature["input_ids"][2:]]
    assert joined == whole
    assert all(2 <= len(feature["input_ids"]) <= 8 for feature in features)
    # every token but the first is scored, once, and none but the first of a text with fewer than two before it
    scored = [label for feature in features for label in feature["labels"] if label != IGNORED_LABEL]
    assert scored == whole
    assert all(feature["labels"][:2] == [IGNORED_LABEL] * 2 for feature in features[1:])


class Rows:
    """Rows that need no file."""

    source = "rows"
    first_row = 0

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._columns = columns

    def values(self, name: str) -> list[Any]:
        return self._columns[name]


_generators: list[Checkpoint] = []


def generator(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    if not _generators:
        _generators.append(load_checkpoint(tiny_checkpoint("llama", task="text-generation")))
    return _generators[0]


def test_text_generation_predicts_the_next_token(load: Any, examples_of: ReadRows) -> None:
    checkpoint = load("text-generation")
    examples = examples_of(checkpoint, [{"text": "Rain fell on the harbour all night."}])
    ids = examples.features[0]["input_ids"]
    predictions, loss = scored(checkpoint, examples.features)
    with torch.no_grad():
        logits = checkpoint.model(torch.tensor([ids])).logits[0].double().numpy()
    by_hand = [math.log(np.exp(logits[t]).sum()) - logits[t, ids[t + 1]] for t in range(len(ids) - 1)]
    np.testing.assert_allclose(predictions["nll"][0], by_hand, rtol=1e-4)
    assert loss == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert predictions["top_token"][0].tolist() == logits[:-1].argmax(axis=1).tolist()
    top = np.exp(logits[:-1].max(axis=1)) / np.exp(logits[:-1]).sum(axis=1)
    np.testing.assert_allclose(predictions["confidence"][0], top, rtol=1e-4)


def test_text_generation_needs_two_tokens(load: Any, examples_of: ReadRows) -> None:
    with pytest.raises(InputError, match="no text of at least two tokens"):
        examples_of(load("text-generation"), [{"text": ""}])


# Laws of every task.


@every_task
def test_texts_are_cut_at_the_length_asked_for(load: Any, examples_of: ReadRows, texts: list[str], task: str) -> None:
    examples = examples_of(load(task), rows_for(task, texts), max_length=6)
    assert max(len(feature["input_ids"]) for feature in examples.features) == 6


@every_task
def test_padding_does_not_change_predictions(load: Any, examples_of: ReadRows, texts: list[str], task: str) -> None:
    checkpoint = load(task)
    examples = examples_of(checkpoint, rows_for(task, [texts[-1], *texts[:5]]))
    alone = [scored(checkpoint, [feature])[0] for feature in examples.features]
    together, _ = scored(checkpoint, examples.features)
    lengths = {len(feature["input_ids"]) for feature in examples.features}
    assert len(lengths) > 2
    for name, values in together.items():
        for row, single in zip(values, alone, strict=True):
            np.testing.assert_allclose(row, single[name][0], atol=2e-5, rtol=1e-4)


@every_task
def test_predictions_come_in_the_order_of_the_rows(
    load: Any, examples_of: ReadRows, texts: list[str], task: str
) -> None:
    checkpoint = load(task)
    examples = examples_of(checkpoint, rows_for(task, texts[:9]))
    steps: list[tuple[int, int]] = []
    found = predict(
        checkpoint.run,
        examples,
        checkpoint.task,
        checkpoint.tokenizer,
        batch_size=4,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(4, 9), (8, 9), (9, 9)]
    for name, values in found.items():
        assert len(values) == 9
        for row, feature in zip(values, examples.features, strict=True):
            np.testing.assert_allclose(row, scored(checkpoint, [feature])[0][name][0], atol=2e-5, rtol=1e-4)
