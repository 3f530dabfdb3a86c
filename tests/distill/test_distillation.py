"""Drawing a student and training it, on tiny models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.distill.distillation import distill, eager_teacher, keeping_hidden, needs_hidden, student_of
from limbeck.distill.settings import DistillSettings
from limbeck.distill.student import draw_student, uniform_layers
from limbeck.distill.trainer import KeepZeros, TrainingDiverged
from limbeck.errors import InputError, UsageError
from limbeck.models.anatomy import ANATOMIES, anatomy_of
from limbeck.models.batching import pad
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.data import Data

TinyCheckpoint = Callable[..., Path]
ReadRows = Callable[..., Data]

every_family = pytest.mark.parametrize("family", sorted(ANATOMIES))


@pytest.fixture
def read_rows(tmp_path: Path, write_jsonl: Callable[..., Path]) -> ReadRows:
    def read(checkpoint: Checkpoint, rows: list[dict[str, Any]]) -> Data:
        return checkpoint.read(write_jsonl(tmp_path / "rows.jsonl", rows))

    return read


def bare(tiny_checkpoint: TinyCheckpoint, family: str) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint(family), task="sentence-similarity")


def batch_of(checkpoint: Checkpoint, texts: list[str]) -> dict[str, torch.Tensor]:
    ids = checkpoint.tokenizer(texts)["input_ids"]
    features = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    batch = pad(features, checkpoint.tokenizer)
    zeros = torch.zeros_like(batch["input_ids"])
    return {name: batch.get(name, zeros) for name in checkpoint.input_names}


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


# Drawing.


@pytest.mark.parametrize(
    ("count", "depth", "layers"),
    [(1, 6, [0]), (2, 6, [0, 5]), (3, 6, [0, 2, 5]), (6, 6, [0, 1, 2, 3, 4, 5]), (4, 12, [0, 3, 7, 11])],
)
def test_layers_are_spread_evenly(count: int, depth: int, layers: list[int]) -> None:
    assert uniform_layers(count, depth) == layers


def test_evenly_spread_layers_are_as_many_as_asked_for_and_in_order() -> None:
    for depth in range(1, 40):
        for count in range(1, depth + 1):
            layers = uniform_layers(count, depth)
            assert len(set(layers)) == count and layers == sorted(layers)
            assert layers[0] == 0 and (count == 1 or layers[-1] == depth - 1)


@pytest.mark.parametrize("count", [0, 3, -1])
def test_more_layers_than_there_are_cannot_be_drawn(count: int) -> None:
    with pytest.raises(UsageError, match=f"A student of {count} layers cannot be drawn from a teacher of 2"):
        uniform_layers(count, 2)


@every_family
def test_a_student_with_all_layers_answers_as_its_teacher(
    family: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, family)
    student = student_of(teacher, 2)
    batch = batch_of(teacher, texts[:3])
    np.testing.assert_array_equal(student.run(batch)["sentence_embedding"], teacher.run(batch)["sentence_embedding"])
    assert student.model is not teacher.model
    assert student.hash == hash_of_model(teacher.model)


@every_family
def test_a_student_of_the_first_layer_is_the_teacher_without_the_others(
    family: str, tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, family)
    student = student_of(teacher, 1)
    assert student.model.config.num_hidden_layers == 1
    assert student.parameters < teacher.parameters
    batch = batch_of(teacher, texts[:3])
    del anatomy_of(teacher.model).layers(teacher.model)[1]
    teacher.model.config.num_hidden_layers = 1
    np.testing.assert_allclose(
        student.run(batch)["sentence_embedding"], teacher.run(batch)["sentence_embedding"], atol=1e-6
    )


@every_family
def test_a_named_layer_comes_with_its_weights(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    teacher = bare(tiny_checkpoint, family)
    anatomy = anatomy_of(teacher.model)
    if family == "modernbert":  # its first layer has no attention norm, which layer 1 would lose
        with pytest.raises(UsageError, match="must be the first"):
            draw_student(teacher.model, [1])
        return
    student = draw_student(teacher.model, [1])
    kept, source = anatomy.layers(student)[0].state_dict(), anatomy.layers(teacher.model)[1].state_dict()
    assert list(kept) == list(source)
    assert all(torch.equal(kept[name], source[name]) for name in kept)
    first = next(iter(student.parameters()))
    assert torch.equal(first, next(iter(teacher.model.parameters())))
    assert first.data_ptr() != next(iter(teacher.model.parameters())).data_ptr()


@pytest.mark.parametrize("layers", [[2], [-1], [0, 0], [1, 0], []])
def test_layers_that_cannot_be_drawn_are_refused(tiny_checkpoint: TinyCheckpoint, layers: list[int]) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    with pytest.raises(UsageError, match="cannot be drawn"):
        draw_student(teacher.model, layers)


def test_a_head_is_copied_whole(tiny_checkpoint: TinyCheckpoint) -> None:
    teacher = load_checkpoint(tiny_checkpoint("roberta", task="text-classification"))
    student = student_of(teacher, 1)
    ours, theirs = student.model.classifier.state_dict(), teacher.model.classifier.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tied_weights_stay_tied(tiny_checkpoint: TinyCheckpoint) -> None:
    student = student_of(load_checkpoint(tiny_checkpoint("gpt2", task="text-generation")), 1)
    assert student.model.lm_head.weight is student.model.transformer.wte.weight


# Training.

STEPS = {"max_steps": 12, "batch_size": 16, "learning_rate": 3e-3}


def test_training_brings_a_student_nearer_to_its_teacher(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    before = state_of(teacher.model)
    student = student_of(teacher, 1)
    untrained = student.hash
    data = read_rows(teacher, [{"text": text} for text in texts])
    ticks: list[tuple[int, int]] = []
    batch = batch_of(teacher, texts[:16])

    def gap(checkpoint: Checkpoint) -> float:
        ours, theirs = (side.run(batch)["sentence_embedding"] for side in (checkpoint, teacher))
        return float(1 - np.sum(ours * theirs, axis=1).mean())

    at_first = gap(student)
    settings = DistillSettings(layers=1, **STEPS)
    after = distill(
        student, teacher, settings, data, rationale="to see", progress=lambda done, total: ticks.append((done, total))
    )
    assert gap(after) < 0.7 * at_first
    assert ticks == [(step, 12) for step in range(13)]
    assert all(torch.equal(values, before[name]) for name, values in state_of(teacher.model).items() if name in before)

    (step,) = after.lineage.steps
    assert step.method == "embedding-cosine + pairwise-similarity + hidden-mse"
    assert (step.verb, step.rationale, step.parent, step.teacher) == ("distill", "to see", untrained, teacher.hash)
    assert step.settings["max_steps"] == 12
    assert step.settings["objectives"] == {"embedding-cosine": 1, "pairwise-similarity": 1, "hidden-mse": 1}
    assert step.data is not None and (step.data.rows, step.data.fingerprint) == (64, data.fingerprint)
    assert after.hash == hash_of_model(after.model) != untrained
    assert after.training_rows == {data.fingerprint: data.row_hashes}
    assert not after.module.training
    assert all(parameter.requires_grad for parameter in after.module.parameters())

    curves = {curve.name: curve for curve in step.curves}
    assert {"loss", "learning_rate", "grad_norm", "embedding-cosine", "pairwise-similarity", "hidden-mse"} == set(
        curves
    )
    assert curves["loss"].steps == list(range(1, 13))
    assert curves["loss"].values[-1] < curves["loss"].values[0]
    parts = sum(np.asarray(curves[name].values) for name in step.settings["objectives"])
    np.testing.assert_allclose(curves["loss"].values, parts, atol=2e-3)


TASK_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "text-classification": ("roberta", {"text": "I was delighted with the hotel.", "label": "positive"}),
    "token-classification": ("distilbert", {"tokens": ["Marta", "in", "Lisbon"], "tags": ["NAME", "O", "PLACE"]}),
    "fill-mask": ("electra", {"text": "The kettle whistled long before anyone came."}),
    "text-generation": ("llama", {"text": "The kettle whistled long before anyone came."}),
}


@pytest.mark.parametrize("task", TASK_ROWS)
def test_every_task_learns_from_teacher_and_labels(
    task: str, tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows
) -> None:
    family, row = TASK_ROWS[task]
    teacher = load_checkpoint(tiny_checkpoint(family, task=task), task=task)
    settings = DistillSettings(
        objectives={"logits-kl": 1, "labels": 0.5}, max_steps=6, batch_size=4, learning_rate=5e-3
    )
    after = distill(student_of(teacher, 1), teacher, settings, read_rows(teacher, [row] * 4))
    curves = {curve.name: curve.values for curve in after.lineage.steps[0].curves}
    assert curves["labels"][-1] < curves["labels"][0]
    np.testing.assert_allclose(
        curves["loss"], np.asarray(curves["logits-kl"]) + 0.5 * np.asarray(curves["labels"]), rtol=2e-3
    )


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("text-classification", {"text": "Go."}),
        ("token-classification", {"tokens": ["Marta", "in", "Lisbon"]}),
    ],
)
def test_labels_that_the_data_lacks_cannot_be_learned(
    task: str, row: dict[str, Any], tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows
) -> None:
    teacher = load_checkpoint(tiny_checkpoint("bert", task=task), task=task)
    settings = DistillSettings(objectives={"labels": 1}, max_steps=1)
    with pytest.raises(UsageError, match="needs labels, and the data has none"):
        distill(student_of(teacher, 1), teacher, settings, read_rows(teacher, [row]))


def test_frozen_embeddings_stay_and_the_rest_moves(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "mpnet")
    student = student_of(teacher, 1)
    before = state_of(student.model)
    settings = DistillSettings(freeze_embeddings=True, max_steps=2, batch_size=8)
    after = distill(student, teacher, settings, read_rows(teacher, [{"text": text} for text in texts[:16]]))
    moved = {name for name, values in after.model.state_dict().items() if not torch.equal(values, before[name])}
    assert not [name for name in moved if name.startswith("embeddings.")]
    assert "encoder.layer.0.output.dense.weight" in moved
    assert all(parameter.requires_grad for parameter in after.module.parameters())


def test_what_is_zero_in_a_pruned_matrix_stays_zero(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    student = student_of(teacher, 1)
    sparse = student.model.get_parameter("encoder.layer.0.intermediate.dense.weight")
    dense = student.model.get_parameter("encoder.layer.0.output.dense.weight")
    with torch.no_grad():
        sparse.view(-1, 4)[:, :2] = 0
        dense[0, 0] = 0  # a zero that happened to be there
    assert [weight is sparse for weight, _ in KeepZeros(student.module).masks] == [True]
    kept = sparse.detach().clone()
    settings = DistillSettings(max_steps=3, batch_size=8)
    distill(student, teacher, settings, read_rows(teacher, [{"text": text} for text in texts[:16]]))
    assert not sparse.view(-1, 4)[:, :2].any()
    assert (sparse != kept).float().mean() > 0.4
    assert dense[0, 0] != 0


@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_seed_gives_the_same_weights(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str], seed: int
) -> None:
    teacher = bare(tiny_checkpoint, "distilbert")
    data = read_rows(teacher, [{"text": text} for text in texts[:24]])

    def trained(with_seed: int) -> str:
        torch.rand(3)  # whatever ran before
        settings = DistillSettings(max_steps=3, batch_size=8, seed=with_seed)
        return distill(student_of(teacher, 1), teacher, settings, data).hash

    assert trained(seed) == trained(seed)
    assert trained(seed) != trained(seed + 1)


def test_training_does_not_drop_out_and_leaves_the_rates_as_they_were(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    data = read_rows(teacher, [{"text": text} for text in texts[:8]])
    student = student_of(teacher, 2)
    rates = [part.p for part in student.module.modules() if isinstance(part, torch.nn.Dropout)]
    assert 0.1 in rates
    settings = DistillSettings(max_steps=1, batch_size=8, objectives={"embedding-cosine": 1})
    after = distill(student, teacher, settings, data)
    curves = {curve.name: curve.values for curve in after.lineage.steps[0].curves}
    assert curves["embedding-cosine"][0] == pytest.approx(0, abs=1e-5)  # it is its teacher, and nothing was dropped
    assert [part.p for part in after.module.modules() if isinstance(part, torch.nn.Dropout)] == rates


# What goes wrong.


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_loss_that_is_no_number_stops_training(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str], where: str
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    student = student_of(teacher, 1)
    with torch.no_grad():
        broken = student if where == "student" else teacher
        broken.model.get_parameter("encoder.layer.0.output.dense.weight")[0, 0] = math.nan
    data = read_rows(teacher, [{"text": text} for text in texts[:8]])
    with pytest.raises(TrainingDiverged, match="The loss became nan at step 0") as caught:
        distill(student, teacher, DistillSettings(max_steps=5), data)
    assert caught.value.exit_code == 4


def test_a_student_with_another_vocabulary_is_refused(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    student = dataclasses.replace(teacher, tokenizer=bare(tiny_checkpoint, "roberta").tokenizer)
    with pytest.raises(InputError, match=r"split text differently \(\d+ and \d+ tokens\)"):
        distill(student, teacher, DistillSettings(max_steps=1), read_rows(teacher, [{"text": "Go."}]))


def test_the_eager_teacher_takes_no_gradient_and_gives_hidden_states_only_when_asked(
    tiny_checkpoint: TinyCheckpoint, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    batch = batch_of(teacher, texts[:2])
    assert set(eager_teacher(teacher)(batch)) == {"sentence_embedding"}
    with keeping_hidden(teacher):
        outputs = eager_teacher(teacher)(batch)
    assert set(outputs) == {"sentence_embedding", "last_hidden_state"}
    assert not any(values.requires_grad for values in outputs.values())
    assert set(eager_teacher(teacher)(batch)) == {"sentence_embedding"}
    assert needs_hidden(None, "sentence-similarity") and not needs_hidden(None, "fill-mask")
    assert not needs_hidden({"embedding-cosine": 1.0}, "sentence-similarity")


def test_texts_are_cut_at_the_length_asked_for_while_training(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    seen: list[int] = []

    def call(batch: dict[str, torch.Tensor]) -> Any:
        seen.append(batch["input_ids"].shape[1])
        return eager_teacher(teacher)(batch)

    settings = DistillSettings(max_steps=2, max_length=5, objectives={"embedding-cosine": 1})
    data = read_rows(teacher, [{"text": " ".join(texts[:3])}] * 4)
    distill(student_of(teacher, 1), teacher, settings, data, teacher_call=call)
    assert seen == [5, 5]
