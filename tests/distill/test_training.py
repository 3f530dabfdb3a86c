"""Training a student on tiny models: what is learnt, what is written down, what goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.distill.callbacks import KeepZeros
from limbeck.distill.distillation import Surroundings, distill
from limbeck.distill.module import Distillation, bind, shape_of
from limbeck.distill.objectives import build_objectives
from limbeck.distill.objectives.base import Sides
from limbeck.distill.settings import DistillSettings, OnPolicy, StudentSettings
from limbeck.distill.student import draw_student
from limbeck.distill.teacher import eager_teacher
from limbeck.distill.trainer import TrainingDiverged
from limbeck.errors import InputError, UsageError
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.data import Data

TinyCheckpoint = Callable[..., Path]
ReadRows = Callable[..., Data]

STEPS: dict[str, Any] = {"max_steps": 12, "batch_size": 16, "learning_rate": 3e-3}


@pytest.fixture
def read_rows(tmp_path: Path, write_jsonl: Callable[..., Path]) -> ReadRows:
    def read(checkpoint: Checkpoint, rows: list[dict[str, Any]]) -> Data:
        return checkpoint.read(write_jsonl(tmp_path / "rows.jsonl", rows))

    return read


def bare(tiny_checkpoint: TinyCheckpoint, family: str, task: str = "sentence-similarity") -> Checkpoint:
    return load_checkpoint(tiny_checkpoint(family, task=task), task=task)


def drawn(teacher: Checkpoint, layers: int = 1) -> Checkpoint:
    return draw_student(teacher, StudentSettings(layers=layers))


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


def curves_of(checkpoint: Checkpoint) -> dict[str, list[float]]:
    return {curve.name: curve.values for curve in checkpoint.lineage.steps[-1].curves}


def test_training_brings_a_student_nearer_to_its_teacher(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str], tmp_path: Path
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    before = state_of(teacher.model)
    student = drawn(teacher)
    untrained = student.hash
    data = read_rows(teacher, [{"text": text} for text in texts])
    ticks: list[tuple[int, int]] = []
    batch = teacher.tokenizer(texts[:16], padding=True, return_tensors="pt")

    def gap(checkpoint: Checkpoint) -> float:
        ours, theirs = (side.run(batch)["sentence_embedding"] for side in (checkpoint, teacher))
        return float(1 - np.sum(ours * theirs, axis=1).mean())

    at_first = gap(student)
    around = Surroundings(rationale="to see", progress=lambda done, total: ticks.append((done, total)))
    after = distill(student, teacher, DistillSettings(**STEPS), data, around)
    assert gap(after) < 0.7 * at_first
    assert ticks == [(step, 12) for step in range(13)]
    assert all(torch.equal(values, before[name]) for name, values in state_of(teacher.model).items() if name in before)

    (step,) = after.lineage.steps
    assert step.method == "embedding-cosine + pairwise-similarity + hidden-states"
    assert (step.verb, step.rationale, step.parent, step.teacher) == ("distill", "to see", untrained, teacher.hash)
    assert step.settings["max_steps"] == 12
    assert list(step.settings["objectives"]) == ["embedding-cosine", "pairwise-similarity", "hidden-states"]
    assert step.data is not None and (step.data.rows, step.data.fingerprint) == (64, data.fingerprint)
    assert after.hash == hash_of_model(after.model) != untrained
    assert not after.module.training
    assert all(parameter.requires_grad for parameter in after.module.parameters())

    curves = curves_of(after)
    assert {"loss", "learning_rate", "grad_norm", "throughput", *step.settings["objectives"]} == set(curves)
    assert curves["loss"][-1] < curves["loss"][0]
    parts = sum(np.asarray(curves[name]) for name in step.settings["objectives"])
    np.testing.assert_allclose(curves["loss"], parts, atol=2e-3)
    assert step.similarity is not None
    at_the_end, at_the_start = np.asarray(step.similarity.after), np.asarray(step.similarity.before)
    assert at_the_end.shape == at_the_start.shape == (1, 2) and at_the_end[0, 1] > at_the_start[0, 1]

    after.save(tmp_path / "student")
    lines = [json.loads(line) for line in (tmp_path / "student" / "trace.jsonl").read_text().splitlines()]
    assert [line["training_step"] for line in lines] == list(range(1, 13))
    assert lines[0]["loss"] == pytest.approx(curves["loss"][0])


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
    teacher = bare(tiny_checkpoint, family, task)
    settings = DistillSettings(
        objectives={"logits-kl": 1, "labels": 0.5}, max_steps=6, batch_size=4, learning_rate=5e-3
    )
    curves = curves_of(distill(drawn(teacher), teacher, settings, read_rows(teacher, [row] * 4)))
    assert curves["labels"][-1] < curves["labels"][0]
    np.testing.assert_allclose(
        curves["loss"], np.asarray(curves["logits-kl"]) + 0.5 * np.asarray(curves["labels"]), rtol=2e-3
    )


def test_labels_alone_need_no_teacher(tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows) -> None:
    teacher = bare(tiny_checkpoint, "roberta", "text-classification")
    rows = read_rows(teacher, [TASK_ROWS["text-classification"][1]] * 4)

    @contextmanager
    def asked(_: Checkpoint) -> Iterator[Any]:
        raise AssertionError("the teacher was asked")
        yield

    settings = DistillSettings(objectives={"labels": 1}, max_steps=2)
    after = distill(drawn(teacher), teacher, settings, rows, Surroundings(teacher_runtime=asked))
    assert after.lineage.steps[-1].teacher is None


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
    teacher = bare(tiny_checkpoint, "bert", task)
    settings = DistillSettings(objectives={"labels": 1}, max_steps=1)
    with pytest.raises(UsageError, match="needs labels, and the data has none"):
        distill(drawn(teacher), teacher, settings, read_rows(teacher, [row]))


def test_frozen_embeddings_stay_and_the_rest_moves(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "mpnet")
    student = drawn(teacher)
    before = state_of(student.model)
    settings = DistillSettings(freeze_embeddings=True, max_steps=2, batch_size=8)
    after = distill(student, teacher, settings, read_rows(teacher, [{"text": text} for text in texts[:16]]))
    moved = {name for name, values in after.model.state_dict().items() if not torch.equal(values, before[name])}
    assert not [name for name in moved if name.startswith("embeddings.")]
    assert "encoder.layer.0.output.dense.weight" in moved
    assert all(parameter.requires_grad for parameter in after.module.parameters())


def test_one_layer_at_a_time(tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    student = drawn(teacher, layers=2)
    before = state_of(student.model)
    rows = read_rows(teacher, [{"text": text} for text in texts[:16]])
    with torch.no_grad():
        student.model.get_parameter("encoder.layer.0.output.dense.weight").mul_(0.5)
        before = state_of(student.model)
    settings = DistillSettings(train_layers=[0], objectives={"hidden-states": {"layers": {0: 0}}}, max_steps=3)
    after = distill(student, teacher, settings, rows)
    moved = {name for name, values in after.model.state_dict().items() if not torch.equal(values, before[name])}
    assert moved and all(name.startswith("encoder.layer.0.") for name in moved)
    with pytest.raises(UsageError, match=r"train_layers names \[2\]; the student has 0 to 1"):
        distill(student, teacher, DistillSettings(train_layers=[2], max_steps=1), rows)


def test_what_is_zero_in_a_pruned_matrix_stays_zero(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    student = drawn(teacher)
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


@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=pytest.mark.thorough)])
def test_the_same_seed_gives_the_same_weights(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str], seed: int
) -> None:
    teacher = bare(tiny_checkpoint, "distilbert")
    data = read_rows(teacher, [{"text": text} for text in texts[:24]])

    def trained(with_seed: int) -> str:
        torch.rand(3)  # whatever ran before
        settings = DistillSettings(max_steps=3, batch_size=8, seed=with_seed)
        return distill(drawn(teacher), teacher, settings, data).hash

    assert trained(seed) == trained(seed)
    assert trained(seed) != trained(seed + 1)


def test_training_does_not_drop_out_and_leaves_the_rates_as_they_were(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    data = read_rows(teacher, [{"text": text} for text in texts[:8]])
    student = drawn(teacher, layers=2)
    rates = [part.p for part in student.module.modules() if isinstance(part, torch.nn.Dropout)]
    assert 0.1 in rates
    settings = DistillSettings(max_steps=1, batch_size=8, objectives={"embedding-cosine": 1})
    after = distill(student, teacher, settings, data)
    assert curves_of(after)["embedding-cosine"][0] == pytest.approx(0, abs=1e-5)  # it is its teacher
    assert [part.p for part in after.module.modules() if isinstance(part, torch.nn.Dropout)] == rates


def test_activations_computed_twice_and_batches_in_parts_give_the_same_student(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    data = read_rows(teacher, [{"text": texts[0]}] * 16)
    objectives = {"embedding-cosine": 1, "hidden-states": {"layers": "uniform"}}

    def trained(**more: Any) -> torch.Tensor:
        settings = DistillSettings(objectives=objectives, max_steps=3, **more)
        return distill(drawn(teacher), teacher, settings, data).model.get_parameter("encoder.layer.0.output.dense.bias")

    other = bare(tiny_checkpoint, "mpnet")
    with pytest.raises(UsageError, match="mpnet model cannot compute its activations twice"):
        distill(drawn(other), other, DistillSettings(gradient_checkpointing=True, max_steps=1), data)
    plain = trained(batch_size=8)
    torch.testing.assert_close(trained(batch_size=8, gradient_checkpointing=True), plain)
    torch.testing.assert_close(trained(batch_size=4, gradient_accumulation=2), plain)


def test_a_scheduled_weight_moves_while_training_goes_on(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    data = read_rows(teacher, [{"text": text} for text in texts[:16]])
    objectives = {"embedding-cosine": 1, "pairwise-similarity": {"start": 0, "end": 2}}
    settings = DistillSettings(objectives=objectives, max_steps=8, batch_size=8)
    curves = curves_of(distill(drawn(teacher), teacher, settings, data))
    weights = (np.asarray(curves["loss"]) - curves["embedding-cosine"]) / curves["pairwise-similarity"]
    np.testing.assert_allclose(weights, np.arange(8) / 4, atol=2e-3)


def test_a_student_learns_from_what_it_wrote_itself(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "llama", "text-generation")
    seen: list[torch.Tensor] = []

    @contextmanager
    def listening(recorded: Checkpoint) -> Iterator[Any]:
        call = eager_teacher(recorded)
        yield lambda batch: (seen.append(batch["input_ids"]), call(batch))[1]

    settings = DistillSettings(
        objectives={"logits-kl": {"divergence": "reverse"}},
        on_policy=OnPolicy(share=0.5, prompt_tokens=4, new_tokens=6),
        max_steps=10, batch_size=4, max_length=32,
    )  # fmt: skip
    rows = read_rows(teacher, [{"text": text} for text in texts])
    after = distill(drawn(teacher), teacher, settings, rows, Surroundings(teacher_runtime=listening))
    own = [ids for ids in seen if ids.shape[1] <= 10]
    assert 2 <= len(own) <= 8 and len(seen) == 10
    assert math.isfinite(curves_of(after)["loss"][-1])
    encoder = bare(tiny_checkpoint, "bert")
    with pytest.raises(UsageError, match="on_policy needs a model that writes text"):
        distill(drawn(encoder), encoder, DistillSettings(on_policy=OnPolicy(), max_steps=1), rows)


# What goes wrong.


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_loss_that_is_no_number_stops_training(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str], where: str
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    student = drawn(teacher)
    with torch.no_grad():
        broken = student if where == "student" else teacher
        broken.model.get_parameter("encoder.layer.0.output.dense.weight")[0, 0] = math.nan
    data = read_rows(teacher, [{"text": text} for text in texts[:8]])
    with pytest.raises(TrainingDiverged, match="The loss became nan at step 0") as caught:
        distill(student, teacher, DistillSettings(max_steps=5), data)
    assert caught.value.exit_code == 4


def test_a_student_that_splits_text_otherwise_can_match_whole_texts_only(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher, student = bare(tiny_checkpoint, "bert"), bare(tiny_checkpoint, "roberta")
    data = read_rows(teacher, [{"text": text} for text in texts])
    with pytest.raises(InputError, match=r"split text differently \(\d+ and \d+ tokens\), so hidden-states would"):
        distill(student, teacher, DistillSettings(max_steps=1), data)
    settings = DistillSettings(objectives={"embedding-cosine": 1, "pairwise-similarity": 1}, **STEPS)
    curves = curves_of(distill(student, teacher, settings, data))
    assert curves["embedding-cosine"][-1] < 0.8 * curves["embedding-cosine"][0]


def test_texts_are_cut_at_the_length_asked_for_while_training(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    seen: list[int] = []

    @contextmanager
    def listening(recorded: Checkpoint) -> Iterator[Any]:
        call = eager_teacher(recorded)
        yield lambda batch: (seen.append(batch["input_ids"].shape[1]), call(batch))[1]

    settings = DistillSettings(max_steps=2, max_length=5, objectives={"embedding-cosine": 1})
    data = read_rows(teacher, [{"text": " ".join(texts[:3])}] * 4)
    distill(drawn(teacher), teacher, settings, data, Surroundings(teacher_runtime=listening))
    assert seen == [5, 5]


def test_under_bf16_the_objectives_are_still_float32(
    tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows, texts: list[str]
) -> None:
    teacher = bare(tiny_checkpoint, "bert")
    module = Distillation(drawn(teacher), bind(build_objectives({"pairwise-similarity": 1}, teacher.task, False),
                          Sides(shape_of(teacher), shape_of(teacher), lambda: np.eye(2)), seed=0))  # fmt: skip
    batch = dict(teacher.tokenizer(texts[:6], padding=True, return_tensors="pt"))
    answers = eager_teacher(teacher)(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(batch, answers)["pairwise-similarity"].dtype == torch.float32
    rows = read_rows(teacher, [{"text": text} for text in texts])
    settings = DistillSettings(precision="bf16", max_steps=2, batch_size=8)
    assert math.isfinite(curves_of(distill(drawn(teacher), teacher, settings, rows))["loss"][-1])


def test_fp16_needs_a_gpu(tiny_checkpoint: TinyCheckpoint, read_rows: ReadRows) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    teacher = bare(tiny_checkpoint, "bert")
    with pytest.raises(UsageError, match="fp16 needs a CUDA GPU"):
        distill(drawn(teacher), teacher, DistillSettings(precision="fp16"), read_rows(teacher, [{"text": "Go."}]))
