"""The teacher's outputs on disk: the same numbers back, for this teacher and these examples only, whoever is killed."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import limbeck.distill.teacher_cache
from limbeck.distill.module import Term
from limbeck.distill.objectives import build_objectives
from limbeck.distill.objectives.base import Pair
from limbeck.distill.teacher import eager_teacher, teacher_inputs
from limbeck.distill.teacher_cache import CachedTeacher, CacheKey, cached_teacher
from limbeck.distill.training_data import TrainingData, tokenise
from limbeck.errors import DiskFull, InputError, IntegrityError, UsageError
from limbeck.models.checkpoint import Checkpoint, load_checkpoint

TinyCheckpoint = Callable[..., Path]
FEATURES = ["hidden.0", "query.1"]
HALF = 2.0**-11


class Setup(NamedTuple):
    teacher: Checkpoint
    data: TrainingData
    key: CacheKey
    folder: Path

    def views(self) -> Callable[[Any], Mapping[str, torch.Tensor]]:
        return eager_teacher(self.teacher)

    def cached(self, **changes: Any) -> CachedTeacher:
        key = self.key.model_copy(update=changes)
        return cached_teacher(self.folder, key, self.views, self.data)


def made_in(folder: Path, model: Path, texts: list[str], write_jsonl: Callable[..., Path]) -> Setup:
    teacher = load_checkpoint(model, task="sentence-similarity").recording(FEATURES)
    rows = teacher.read(write_jsonl(folder / "rows.jsonl", [{"text": text} for text in texts]))
    data = tokenise(rows, teacher, teacher, 32, folder / "tokens")
    key = CacheKey(teacher=teacher.hash, data=data.fingerprint, max_length=32, views=[{"reads": FEATURES}])
    return Setup(teacher, data, key, folder / "cache")


@pytest.fixture
def setup(tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: Callable[..., Path], tmp_path: Path) -> Setup:
    return made_in(tmp_path, tiny_checkpoint("bert"), texts, write_jsonl)


@pytest.fixture(scope="module")
def filled(
    tiny_checkpoint: TinyCheckpoint,
    texts: list[str],
    write_jsonl: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Setup, CachedTeacher]:
    """Small shards, so that a batch is gathered from several."""
    before = limbeck.distill.teacher_cache._SHARD_ROWS
    limbeck.distill.teacher_cache._SHARD_ROWS = 10
    whole = made_in(tmp_path_factory.mktemp("filled"), tiny_checkpoint("bert"), texts, write_jsonl)
    cache = whole.cached()
    limbeck.distill.teacher_cache._SHARD_ROWS = before
    return whole, cache


def never() -> Any:
    raise AssertionError("the teacher was asked")


def assert_like_the_teacher(cache: CachedTeacher, setup: Setup, rows: list[int]) -> None:
    batch = setup.data.batch(rows)
    expected = setup.views()(batch)
    found = cache(batch)
    assert set(found) == set(expected)
    real = batch["attention_mask"].bool()
    for name, values in found.items():
        assert values.shape == expected[name].shape and values.dtype == torch.float32
        if values.ndim == 3:
            assert not values[~real].any()
            # The teacher's own rounding differs a little with the batch's shape.
            error = (values[real] - expected[name][real]).abs() - expected[name][real].abs() * HALF
            assert error.max() < 1e-5
        else:
            torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-6)


@given(rows=st.lists(st.integers(0, 63), min_size=1, max_size=12))
@settings(max_examples=15)
def test_the_numbers_come_back_in_any_order_and_padding(rows: list[int], filled: tuple[Setup, CachedTeacher]) -> None:
    setup, cache = filled
    assert len(list(setup.folder.glob("shard-*"))) == 7
    assert_like_the_teacher(cache, setup, rows)


def test_a_whole_cache_needs_no_teacher(setup: Setup) -> None:
    steps: list[tuple[int, int]] = []
    cached_teacher(setup.folder, setup.key, setup.views, setup.data, lambda *step: steps.append(step))
    assert steps[0] == (0, 64) and steps[-1] == (64, 64) and setup.data.frozen
    again = cached_teacher(setup.folder, setup.key, never, setup.data)
    assert_like_the_teacher(again, setup, [63, 0, 5])


def test_what_lies_inside_is_kept_in_float16_and_outputs_in_float32(setup: Setup) -> None:
    setup.cached()
    tensors = json.loads((setup.folder / "manifest.json").read_text())["tensors"]
    kept = {name: (layout["per_token"], layout["shape"], layout["kept_as"]) for name, layout in tensors.items()}
    assert kept == {
        "sentence_embedding": (False, [32], "float32"),
        "hidden.0": (True, [32], "float16"),
        "query.1": (True, [32], "float16"),
    }


def test_numbers_beyond_float16_are_kept_as_float32(setup: Setup) -> None:
    eager = setup.views()

    def large(batch: Any) -> dict[str, torch.Tensor]:
        hidden = eager(batch)["hidden.0"]
        long = batch["attention_mask"].sum(dim=1) > 12  # in some examples only
        return {"hidden.0": hidden * torch.where(long, 1e6, 1.0)[:, None, None]}

    cache = cached_teacher(setup.folder, setup.key, lambda: large, setup.data)
    rows = [int(np.argmin(setup.data.lengths)), int(np.argmax(setup.data.lengths))]
    batch = setup.data.batch(rows)
    found, expected = cache(batch)["hidden.0"], large(batch)["hidden.0"]
    assert expected[1].abs().max() > 7e4
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-3)
    count = int(setup.data.lengths[rows[0]])
    torch.testing.assert_close(found[0, :count], expected[0, :count], rtol=HALF, atol=1e-5)


def test_ids_come_back_as_ids(setup: Setup) -> None:
    def top(batch: Any) -> dict[str, torch.Tensor]:
        return {"logits.top_ids": batch["input_ids"][..., None].expand(-1, -1, 3) + torch.arange(3)}

    cache = cached_teacher(setup.folder, setup.key, lambda: top, setup.data)
    batch = setup.data.batch([4, 9])
    expected = top(batch)["logits.top_ids"] * batch["attention_mask"][..., None]
    assert torch.equal(cache(batch)["logits.top_ids"], expected)


def test_a_teacher_with_tokens_of_its_own_is_cut_at_its_own_lengths(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    student = load_checkpoint(tiny_checkpoint("bert"), task="sentence-similarity")
    teacher = load_checkpoint(tiny_checkpoint("roberta"), task="sentence-similarity").recording(["hidden.1"])
    rows = student.read(write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts]))
    data = tokenise(rows, student, teacher, 32, tmp_path / "tokens")
    key = CacheKey(teacher=teacher.hash, data=data.fingerprint, max_length=32, views=[])
    eager = eager_teacher(teacher)
    cache = cached_teacher(tmp_path / "cache", key, lambda: lambda batch: eager(teacher_inputs(batch)), data)
    batch = data.batch([1, 30, 63])
    expected = eager(teacher_inputs(batch))["hidden.1"]
    found = cache(batch)["hidden.1"]
    real = batch["teacher/attention_mask"].bool()
    assert found.shape == expected.shape and found.shape[1] != batch["input_ids"].shape[1]
    torch.testing.assert_close(found[real], expected[real], rtol=2 * HALF, atol=1e-4)


# Whose cache it is.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "f" * 64}, "another teacher's: its hash is .*, this teacher's ffffffffffff"),
        ({"max_length": 64}, "of texts cut at 32 tokens, and here they are cut at 64"),
        ({"data": "0" * 64}, "of other training data"),
        ({"views": [{"reads": ["hidden.1"]}]}, r"of hidden\.0 \+ query\.1, and these objectives read hidden\.1"),
    ],
)
def test_the_cache_of_something_else_is_refused(
    filled: tuple[Setup, CachedTeacher], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        filled[0].cached(**changes)
    assert caught.value.hint is not None and "another folder" in caught.value.hint


def test_a_folder_of_something_else_is_left_alone(setup: Setup) -> None:
    setup.folder.mkdir()
    (setup.folder / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(InputError, match="no teacher's cache"):
        setup.cached()
    assert [path.name for path in setup.folder.iterdir()] == ["thesis.txt"]


def test_the_key_heeds_what_is_read_and_not_how_it_is_weighed(setup: Setup) -> None:
    def key(objective: dict[str, Any], *features: str) -> CacheKey:
        task = setup.teacher.task if "logits-kl" not in objective else load_task("text-classification")
        pairs = [Pair(feature, feature) for feature in features]
        terms = [Term(each, pairs, None) for each in build_objectives(objective, task, True)]
        return CacheKey.of(setup.teacher, setup.data, terms)

    assert key({"hidden-states": 1}, "hidden.0") == key({"hidden-states": 5}, "hidden.0")
    assert key({"hidden-states": 1}, "hidden.0") != key({"hidden-states": 1}, "hidden.1")
    assert key({"embedding-cosine": 1}) == key({"embedding-cosine": 1, "pairwise-similarity": 2})
    two = [key({"logits-kl": {"top_k": 2, "temperature": temperature}}) for temperature in (1, 2)]
    assert two[0] != two[1]
    assert key({"logits-kl": 1, "labels": 1}) == key({"logits-kl": 1})


def load_task(name: str) -> Any:
    from limbeck.models.tasks import get_task

    return get_task(name)


def test_attention_maps_are_too_much_to_keep(setup: Setup) -> None:
    def maps(batch: Any) -> dict[str, torch.Tensor]:
        count, length = batch["input_ids"].shape
        return {"attention.0": torch.zeros(count, 2, length, length)}

    with pytest.raises(UsageError, match=r"attention\.0 of the teacher grows with the square") as caught:
        cached_teacher(setup.folder, setup.key, lambda: maps, setup.data)
    assert caught.value.hint is not None and "attention-relations" in caught.value.hint


def test_a_cache_that_would_not_fit_is_not_begun(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = limbeck.distill.teacher_cache.shutil.disk_usage(setup.folder.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFull, match=r"take 0\.0 GB, and .* free"):
        setup.cached()
    assert not list(setup.folder.glob("shard-*"))


# Damage.


def test_a_cut_file_is_computed_again(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    setup.cached()
    shard = setup.folder / "shard-00000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        again = setup.cached()
    assert "shard-00000.arrow is damaged: it is computed again" in caplog.text
    assert_like_the_teacher(again, setup, [0, 40])


def test_changed_bytes_are_found_and_named(setup: Setup) -> None:
    cache = setup.cached()
    shard = setup.folder / "shard-00000.arrow"
    row = 17
    position = int(cache._position[row])
    start = int(cache._shards[0].starts["hidden.0"][position])
    content = bytearray(shard.read_bytes())
    content[start + 5] ^= 1
    del cache
    shard.write_bytes(bytes(content))
    damaged = setup.cached()
    with pytest.raises(IntegrityError, match=r"shard-00000\.arrow .*example 17 has changed") as caught:
        damaged(setup.data.batch([3, row]))
    assert caught.value.hint == "Delete that file: it alone is computed again."
    shard.unlink()
    assert_like_the_teacher(setup.cached(), setup, [3, row])


# Killed and simultaneous writers.

_SCRIPT = """
import logging, sys, time
from pathlib import Path
import limbeck.distill.teacher_cache as cache
from limbeck.distill.teacher import eager_teacher
from limbeck.distill.training_data import tokenise
from limbeck.models.checkpoint import load_checkpoint
logging.getLogger("limbeck").addHandler(logging.StreamHandler(sys.stdout))
cache._SHARD_ROWS, cache._BATCH_ROWS = 10, 5
folder = Path(sys.argv[2])
features = ["hidden.0", "query.1"]
teacher = load_checkpoint(sys.argv[1], task="sentence-similarity").recording(features)
data = tokenise(teacher.read(folder / "rows.jsonl"), teacher, teacher, 32, folder / "tokens")
key = cache.CacheKey(teacher=teacher.hash, data=data.fingerprint, max_length=32, views=[{"reads": features}])
def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.15)
found = cache.cached_teacher(folder / "cache", key, lambda: eager_teacher(teacher), data, slowly)
print("sum", float(found(data.batch(range(64)))["hidden.0"].double().sum()), flush=True)
"""


def test_a_killed_writer_is_gone_on_with_and_a_second_one_waits(setup: Setup, tiny_checkpoint: TinyCheckpoint) -> None:
    command = [sys.executable, "-c", _SCRIPT, str(tiny_checkpoint("bert")), str(setup.folder.parent)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    while killed.stdout.readline() != "35\n":  # in the middle of the fourth shard
        pass
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = {path.name: path.stat().st_mtime_ns for path in setup.folder.glob("shard-*")}
    assert sorted(kept) == [f"shard-0000{i}.arrow" for i in range(3)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    writer, waiter = sorted(said, key=len, reverse=True)
    assert writer[0] == "30" and writer[-2] == "64"  # the first three shards were kept
    assert any("is being filled by another process: waiting for it" in line for line in waiter) or len(waiter) == 1
    assert writer[-1] == waiter[-1]
    assert {name: (setup.folder / name).stat().st_mtime_ns for name in kept} == kept
    assert not list(setup.folder.glob(".shard-*"))
    assert_like_the_teacher(cached_teacher(setup.folder, setup.key, never, setup.data), setup, list(range(64)))
