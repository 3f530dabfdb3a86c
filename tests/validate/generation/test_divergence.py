"""The KL divergence of next-token distributions: by hand, by torch, and through what `validate` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from limbeck.models.batching import IGNORED_LABEL
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.validate.generation.divergence import BesideTeacher, divergence
from limbeck.validate.measurement import measure_checkpoint
from limbeck.validate.records.report import Metric
from limbeck.validate.slices.choosing import SlicesAsked, with_slices
from limbeck.validate.standard import Standard, set_standard

Write = Callable[..., Path]
LOGITS = arrays.arrays(np.float32, (5, 7), elements=st.floats(-40, 40, width=32))


def quiet(done: int, total: int) -> None: ...


def moved(checkpoint: Checkpoint, by: float) -> Checkpoint:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in checkpoint.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return checkpoint


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Write) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("llama", "text-generation"))


@pytest.fixture(scope="module")
def student(tiny_checkpoint: Write) -> Checkpoint:
    return moved(load_checkpoint(tiny_checkpoint("llama", "text-generation")), 0.2)


@pytest.fixture(scope="module")
def standard(teacher: Checkpoint, write_jsonl: Write, texts: list[str], tmp_path_factory: Any) -> Standard:
    rows = [{"text": " ".join(texts[i : i + 4])} for i in range(0, 40, 4)]
    path = write_jsonl(tmp_path_factory.mktemp("divergence") / "rows.jsonl", rows)
    return set_standard(teacher, teacher.read(path), max_length=24)


def kl_of(checkpoint: Checkpoint, standard: Standard, name: str | None = None) -> Metric | None:
    candidate = measure_checkpoint("candidate", checkpoint, standard, quiet)
    if name is None:
        return candidate.metric("next_token_kl")
    return next(part for part in candidate.slices if part.name == name).metric("next_token_kl")


def test_by_hand() -> None:
    teacher = np.log(np.array([[0.5, 0.25, 0.25]], dtype=np.float32))
    candidate = np.log(np.array([[0.25, 0.5, 0.25]], dtype=np.float32))
    assert divergence(teacher, candidate) == pytest.approx([0.5 * np.log(2) - 0.25 * np.log(2)])
    ruled_out = np.array([[0.0, 0.0, -np.inf]], dtype=np.float32)
    assert divergence(ruled_out, np.zeros((1, 3), np.float32)) == pytest.approx([np.log(1.5)])


@given(LOGITS, LOGITS, st.floats(-9, 9))
def test_laws(teacher: np.ndarray, candidate: np.ndarray, shift: float) -> None:
    found = divergence(teacher, candidate)
    assert (found >= 0).all()
    assert divergence(teacher, teacher + np.float32(shift)).max() < 1e-5  # logits are known up to a constant
    log_p, log_q = (torch.log_softmax(torch.tensor(side).double(), dim=-1) for side in (teacher, candidate))
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    assert found == pytest.approx(expected.numpy(), rel=1e-6, abs=1e-9)


def test_nothing_is_computed_where_nothing_is_scored(teacher: Checkpoint, student: Checkpoint) -> None:
    ids = torch.randint(5, 90, (6, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = IGNORED_LABEL
    labels[5, 6:] = IGNORED_LABEL
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found = BesideTeacher(student.run, teacher.run)(batch)["kl"]
    scored = np.zeros((6, 9), dtype=bool)
    scored[:, 3:8] = True
    scored[5, 5:] = False
    assert (found[scored] > 0).all() and not found[~scored].any()


def test_it_is_torchs_divergence_over_every_scored_token(
    teacher: Checkpoint, student: Checkpoint, standard: Standard
) -> None:
    config = teacher.model.config
    features = teacher.task.examples(standard.data, teacher.tokenizer, 24, config).features
    values = []
    for feature in features:
        ids = torch.tensor([feature["input_ids"]])
        with torch.inference_mode():
            log_p, log_q = (
                torch.log_softmax(side.model(input_ids=ids).logits[0].double(), dim=-1) for side in (teacher, student)
            )
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        values += [float(kl[t]) for t in range(ids.shape[1] - 1) if feature["labels"][t + 1] != IGNORED_LABEL]
    metric = kl_of(student, standard)
    assert metric is not None and metric.value == pytest.approx(np.mean(values), rel=1e-4)
    assert metric.count == len(values) and metric.unit == "nats" and not metric.higher_is_better
    assert metric.low is not None and metric.high is not None and 0 < metric.low < metric.value < metric.high


def test_the_teacher_itself_is_no_distance_away(teacher: Checkpoint, standard: Standard) -> None:
    same = kl_of(teacher, standard)
    assert same is not None and same.value == pytest.approx(0, abs=1e-9) and same.high == pytest.approx(0, abs=1e-9)


def test_slices_have_it_too(student: Checkpoint, standard: Standard) -> None:
    found = kl_of(student, with_slices(standard, SlicesAsked(builtin=["ambiguous"]), 24), "ambiguous")
    assert found is not None and found.value > 0


def test_another_vocabulary_has_none(teacher: Checkpoint, student: Checkpoint, standard: Standard) -> None:
    def wider(batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        logits = student.run(batch)["logits"]
        return {"logits": np.pad(logits, ((0, 0), (0, 0), (0, 3)))}

    ids = torch.arange(5, 15)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert "kl" not in BesideTeacher(wider, teacher.run)(batch)
