"""The training set on disk: what its examples are, how they become batches, and the order in which they are seen."""

from __future__ import annotations

import copy
import dataclasses
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.distill.training_data import LengthGroups, same_tokens, tokenise
from limbeck.errors import InputError
from limbeck.models.batching import IGNORED_LABEL
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data

TinyCheckpoint = Callable[..., Path]
FAMILY = {
    "fill-mask": "bert",
    "text-generation": "llama",
    "text-classification": "bert",
    "token-classification": "bert",
}


@pytest.fixture
def load(tiny_checkpoint: TinyCheckpoint) -> Callable[..., Checkpoint]:
    def make(task: str = "sentence-similarity", family: str | None = None) -> Checkpoint:
        return load_checkpoint(
            tiny_checkpoint(family or ("llama" if task == "text-generation" else "bert"), task=task), task=task
        )

    return make


@pytest.fixture
def rows_of(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Callable[..., Data]:
    def make(checkpoint: Checkpoint, rows: list[Any]) -> Data:
        named = [row if isinstance(row, dict) else {"text": row} for row in rows]
        return checkpoint.read(write_jsonl(tmp_path / "rows.jsonl", named))

    return make


def test_a_text_comes_back_as_its_tokens(load: Any, rows_of: Any, texts: list[str], tmp_path: Path) -> None:
    student = load()
    data = tokenise(rows_of(student, texts), student, None, 10, tmp_path)
    expected = [student.tokenizer(text, truncation=True, max_length=10)["input_ids"] for text in texts]
    assert data.lengths.dtype == np.int32 and data.lengths.tolist() == [len(ids) for ids in expected]
    batch = data.batch([3, 0, 63])
    longest = max(len(expected[row]) for row in (3, 0, 63))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, longest)
    assert batch["row"].tolist() == [3, 0, 63]
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], (3, 0, 63), strict=True):
        count = int(mask.sum())
        assert ids[:count].tolist() == expected[row] and mask[:count].all()
        assert (ids[count:] == student.tokenizer.pad_token_id).all()
    student.module(**student.model_inputs(batch))


def test_what_is_there_is_used_and_what_changed_is_not(
    load: Any, rows_of: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load("text-classification")
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(texts)]
    first = tokenise(rows_of(student, rows), student, None, 12, tmp_path)
    rows[5]["label"] = 2 - rows[5]["label"] if rows[5]["label"] != 1 else 0
    relabelled = tokenise(rows_of(student, rows), student, None, 12, tmp_path)
    rows[6]["text"] = rows[6]["text"].upper()
    shouted = tokenise(rows_of(student, rows), student, None, 12, tmp_path)
    shorter = tokenise(rows_of(student, rows), student, None, 8, tmp_path)
    assert len({data.fingerprint for data in (first, relabelled, shouted, shorter)}) == 4
    assert int(relabelled.batch([5])["labels"]) == rows[5]["label"]

    def untouchable(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(student.task), "training_examples", untouchable)
    again = tokenise(rows_of(student, rows), student, None, 8, tmp_path)
    assert again.fingerprint == shorter.fingerprint
    assert torch.equal(again.batch(range(64))["input_ids"], shorter.batch(range(64))["input_ids"])


def test_a_writer_that_fails_leaves_nothing_behind(
    load: Any, rows_of: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load()
    monkeypatch.setattr("limbeck.models.data._CHUNK", 20)

    def interrupted(done: int, total: int) -> None:
        if done >= 40:
            raise KeyboardInterrupt

    data = rows_of(student, texts)
    with pytest.raises(KeyboardInterrupt):
        tokenise(data, student, None, 10, tmp_path / "tokens", interrupted)
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    steps: list[tuple[int, int]] = []
    whole = tokenise(data, student, None, 10, tmp_path / "tokens", lambda done, total: steps.append((done, total)))
    assert steps == [(20, 64), (40, 64), (60, 64), (64, 64)]
    assert whole.dataset["row"][:] == list(range(64))


# What cannot be trained on.


def test_an_empty_data_set_is_refused(load: Any, rows_of: Any, tmp_path: Path) -> None:
    student = load()
    data = rows_of(student, ["one"])
    empty = dataclasses.replace(data, rows=data.rows.select([]))
    with pytest.raises(InputError, match=r"rows\.jsonl has no rows"):
        tokenise(empty, student, None, 10, tmp_path)


@pytest.mark.parametrize("task", ["sentence-similarity", "fill-mask", "text-generation"])
def test_a_row_that_is_all_padding_is_named(
    load: Any, rows_of: Any, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limbeck.models.data._CHUNK", 2)
    student = load(task)
    data = rows_of(student, ["Rain fell.", "Go.", "It was wet.", "[PAD][PAD]", "Go."])
    with pytest.raises(InputError, match=r"Row 4 of .*rows\.jsonl is all padding") as caught:
        tokenise(data, student, None, 10, tmp_path / "tokens")
    assert caught.value.hint == "Drop the row."


def test_the_second_sentence_of_a_pair_is_named_by_its_row(load: Any, rows_of: Any, tmp_path: Path) -> None:
    student = load()
    pairs = [{"sentence1": "Go.", "sentence2": "Rain."}, {"sentence1": "Go.", "sentence2": "[PAD]"}]
    with pytest.raises(InputError, match=r"Row 2 of .* is all padding"):
        tokenise(rows_of(student, pairs), student, None, 10, tmp_path / "tokens")


@pytest.mark.parametrize("task", ["sentence-similarity", "fill-mask", "text-generation"])
def test_empty_texts_are_left_out_and_said(
    load: Any, rows_of: Any, tmp_path: Path, task: str, caplog: pytest.LogCaptureFixture
) -> None:
    student = load(task)
    with caplog.at_level("WARNING"), caplog.at_level("WARNING", logger="limbeck"):  # whatever a test before has set
        data = tokenise(rows_of(student, ["Rain fell.", "", "It was wet."]), student, None, 32, tmp_path / "some")
    without = tokenise(rows_of(student, ["Rain fell.", "It was wet."]), student, None, 32, tmp_path / "some")
    assert data.dataset["input_ids"][:] == without.dataset["input_ids"][:]
    if task != "text-generation":  # what is packed has no examples that could be missing
        assert "rows.jsonl: 1 row without text is left out" in caplog.text
    with pytest.raises(InputError, match="holds no text: every row is empty"):
        tokenise(rows_of(student, ["", ""]), student, None, 10, tmp_path / "none")


def test_a_wrong_label_is_named_by_its_row_in_the_file(
    load: Any, rows_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limbeck.models.data._CHUNK", 2)
    student = load("text-classification")
    rows = [{"text": "Go.", "label": label} for label in (0, 1, 2, 0, 7)]
    with pytest.raises(InputError, match=r"Row 5 of .* has the label 7"):
        tokenise(rows_of(student, rows), student, None, 10, tmp_path / "tokens")
    tagger = load("token-classification")
    words = [{"tokens": ["a", "b"], "tags": tags} for tags in (["O", "O"], ["O", "O"], ["O", "CITY"])]
    with pytest.raises(InputError, match=r"Row 3 of .* has the label 'CITY'"):
        tokenise(rows_of(tagger, words), tagger, None, 10, tmp_path / "tokens")


# Labels and tasks.


@pytest.mark.parametrize(
    ("task", "row", "labelled"),
    [
        ("text-classification", {"text": "Go."}, False),
        ("text-classification", {"text": "Go.", "label": 0}, True),
        ("token-classification", {"tokens": ["Go"]}, False),
        ("token-classification", {"tokens": ["Go"], "tags": ["O"]}, True),
        ("sentence-similarity", {"text": "Go."}, False),
        ("fill-mask", {"text": "Go."}, True),
        ("text-generation", {"text": "Go on."}, True),
    ],
)
def test_whether_anything_is_labelled_is_known(
    load: Any, rows_of: Any, tmp_path: Path, task: str, row: dict[str, Any], labelled: bool
) -> None:
    student = load(task)
    data = tokenise(rows_of(student, [row, row]), student, None, 10, tmp_path / "tokens")
    assert data.has_labels is labelled
    assert tokenise(rows_of(student, [row, row]), student, None, 10, tmp_path / "tokens").has_labels is labelled


def test_fill_mask_masks_other_tokens_in_another_epoch_and_the_same_ones_when_frozen(
    load: Any, rows_of: Any, texts: list[str], tmp_path: Path
) -> None:
    student = load("fill-mask")
    data = tokenise(rows_of(student, texts), student, None, 32, tmp_path)
    sampler = data.sampler(8, seed=0)
    rows = list(range(16))
    seen = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        seen.append(data.batch(rows))
    assert torch.equal(seen[0]["input_ids"], seen[2]["input_ids"])
    assert not torch.equal(seen[0]["input_ids"], seen[1]["input_ids"])
    for batch in seen:
        masked = batch["input_ids"] == student.tokenizer.mask_token_id
        assert torch.equal(masked, batch["labels"] != IGNORED_LABEL) and masked.any(dim=1).all()
    alone = data.batch([5])  # whatever batch a row comes in, its masks are the same
    length = alone["input_ids"].shape[1]
    assert torch.equal(seen[2]["labels"][5, :length], alone["labels"][0])
    data.frozen = True
    sampler.set_epoch(1)
    assert torch.equal(data.batch(rows)["input_ids"], seen[0]["input_ids"])


@given(words=st.lists(st.integers(0, 9), min_size=1, max_size=12), length=st.integers(4, 9))
@settings(max_examples=20)
def test_packed_texts_are_joined_by_the_end_token_and_nothing_is_padded(
    tiny_checkpoint: TinyCheckpoint, words: list[int], length: int
) -> None:
    student = _generator(tiny_checkpoint)
    texts = [" ".join(["fox"] * count) for count in words]
    data = _Rows(texts)
    features = student.task.training_examples(data, student.tokenizer, length, student.model.config).features  # type: ignore[arg-type]
    end = student.tokenizer.eos_token_id
    joined = [token for text in texts if text for token in [*student.tokenizer(text)["input_ids"], end]]
    found = [token for feature in features for token in feature["input_ids"]]
    assert found == joined[: len(found)] and len(joined) - len(found) == (len(joined) % length == 1)
    assert all(len(feature["input_ids"]) == length for feature in features[:-1])
    assert all(feature["labels"] == feature["input_ids"] for feature in features)


class _Rows:
    source, first_row = "rows", 0

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def values(self, name: str) -> list[str]:
        return self._texts


_generators: list[Checkpoint] = []


def _generator(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    if not _generators:
        _generators.append(load_checkpoint(tiny_checkpoint("llama", task="text-generation")))
    return _generators[0]


# Two tokenizers.


def test_a_teacher_that_splits_text_otherwise_gets_its_own_inputs(
    load: Any, rows_of: Any, texts: list[str], tmp_path: Path
) -> None:
    student, teacher = load(family="bert"), load(family="roberta")
    assert not same_tokens(student, teacher)
    data = tokenise(rows_of(student, texts), student, teacher, 40, tmp_path)
    batch = data.batch([2, 61])
    for i, row in enumerate((2, 61)):
        ids = teacher.tokenizer(texts[row])["input_ids"]
        count = int(batch["teacher/attention_mask"][i].sum())
        assert batch["teacher/input_ids"][i, :count].tolist() == ids
        assert (batch["teacher/input_ids"][i, count:] == teacher.tokenizer.pad_token_id).all()
    assert {name for name in batch if name.startswith("teacher/")} == {
        f"teacher/{name}" for name in teacher.input_names
    }


def test_a_teacher_with_the_same_tokens_shares_the_students_inputs(
    load: Any, rows_of: Any, texts: list[str], tmp_path: Path
) -> None:
    student, teacher = load(family="bert"), load(family="bert")
    assert same_tokens(student, teacher)
    data = tokenise(rows_of(student, texts), student, teacher, 40, tmp_path)
    alone = tokenise(rows_of(student, texts), student, None, 40, tmp_path)
    assert data.fingerprint == alone.fingerprint
    assert not [name for name in data.batch([0]) if name.startswith("teacher/")]


def test_a_teacher_that_takes_more_inputs_gets_them(load: Any, rows_of: Any, texts: list[str], tmp_path: Path) -> None:
    teacher = load(family="bert")
    tokenizer = copy.deepcopy(teacher.tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    student = dataclasses.replace(load(family="distilbert"), tokenizer=tokenizer)
    assert same_tokens(student, teacher)
    batch = tokenise(rows_of(student, texts), student, teacher, 40, tmp_path).batch([0, 1])
    assert batch["teacher/token_type_ids"].shape == batch["teacher/input_ids"].shape
    assert torch.equal(batch["teacher/input_ids"], batch["input_ids"])


def test_two_vocabularies_have_no_token_in_common_to_predict(load: Any, rows_of: Any, tmp_path: Path) -> None:
    student, teacher = load("fill-mask", "bert"), load("fill-mask", "roberta")
    with pytest.raises(InputError, match=r"split text differently \(\d+ and \d+ tokens\), so in fill-mask"):
        tokenise(rows_of(student, ["Go."]), student, teacher, 10, tmp_path / "tokens")


# Order.

_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=150)


@given(lengths=_lengths, batch=st.integers(1, 9), processes=st.integers(1, 3), seed=st.integers(0, 3))
def test_every_example_is_seen_and_every_batch_is_full(
    lengths: list[int], batch: int, processes: int, seed: int
) -> None:
    sampler = LengthGroups(lengths, batch, seed, processes)
    order = list(sampler)
    assert len(order) == len(sampler)
    assert set(order) == set(range(len(lengths)))
    together = batch * processes
    if len(lengths) >= together:
        assert len(order) == -(-len(lengths) // together) * together
        for start in range(0, len(order), together):
            assert len(set(order[start : start + together])) == together  # no example twice in one batch
    elif processes == 1:
        assert Counter(order) == Counter(range(len(lengths)))
    else:
        assert len(order) == together


@given(lengths=_lengths, batch=st.integers(1, 4))
def test_processes_together_see_the_batches_of_one_process(lengths: list[int], batch: int) -> None:
    if len(lengths) >= 2 * batch:
        assert list(LengthGroups(lengths, batch, 1, processes=2)) == list(LengthGroups(lengths, 2 * batch, 1))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, size=300)
    sampler, resumed = LengthGroups(lengths, 8, seed=3), LengthGroups(lengths, 8, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second and second == list(sampler)
    resumed.set_epoch(1)
    assert list(resumed) == second
    assert list(LengthGroups(lengths, 8, seed=4)) != first


def test_batches_hold_texts_of_like_length_in_mixed_order() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, size=1000)
    order = np.array(list(LengthGroups(lengths, 10, seed=0))).reshape(-1, 10)
    spread = np.ptp(lengths[order], axis=1)
    assert spread.mean() < 6  # of 57 in a random batch's nearly 50
    tops = lengths[order].max(axis=1)
    assert abs(np.corrcoef(np.arange(len(tops)), tops)[0, 1]) < 0.3


# Killed and simultaneous writers.

_SCRIPT = """
import sys, time
from pathlib import Path
import limbeck.models.data
from limbeck.distill.training_data import tokenise
from limbeck.models.checkpoint import load_checkpoint
limbeck.models.data._CHUNK = 8
student = load_checkpoint(sys.argv[1], task="sentence-similarity")
def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.2)
tokenise(student.read(sys.argv[2]), student, None, 10, Path(sys.argv[3]), slowly)
print("whole", flush=True)
"""


@pytest.mark.thorough
def test_a_killed_writer_is_made_up_for_and_a_second_one_waits(
    tiny_checkpoint: TinyCheckpoint,
    texts: list[str],
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    command = [sys.executable, "-c", _SCRIPT, str(tiny_checkpoint("bert")), str(path), str(tmp_path / "tokens")]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None and killed.stdout.readline() == "8\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(len(lines) for lines in said) == [1, 9]  # one of them wrote, the other found it written
    student = load_checkpoint(tiny_checkpoint("bert"), task="sentence-similarity")
    monkeypatch.setattr("limbeck.models.data._CHUNK", 8)
    data = tokenise(student.read(path), student, None, 10, tmp_path / "tokens")
    assert len(data) == 64
    assert len([found for found in (tmp_path / "tokens").iterdir() if found.is_dir()]) == 1
