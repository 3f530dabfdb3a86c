"""A training that is stopped, on purpose or not: resumed to the same weights, ended at the best, reported."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.distill.distillation import Surroundings, distill
from limbeck.distill.settings import DistillSettings, StudentSettings
from limbeck.distill.student import draw_student
from limbeck.distill.trainer import Evaluation, TrainingDiverged
from limbeck.errors import BackendUnavailable, UsageError
from limbeck.models.checkpoint import Checkpoint, hash_of_model, load_checkpoint
from limbeck.models.data import Data

TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def teacher(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert"), task="sentence-similarity")


@pytest.fixture
def data(teacher: Checkpoint, texts: list[str], write_jsonl: Callable[..., Path], tmp_path: Path) -> Data:
    folder = tmp_path / "data"
    return teacher.read(write_jsonl(folder / "rows.jsonl", [{"text": text} for text in texts]))


def drawn(teacher: Checkpoint) -> Checkpoint:
    return draw_student(teacher, StudentSettings(layers=1))


def curves_of(checkpoint: Checkpoint) -> dict[str, list[float]]:
    return {curve.name: curve.values for curve in checkpoint.lineage.steps[-1].curves}


RESUMED: dict[str, Any] = {
    "objectives": {"embedding-cosine": 1, "pairwise-similarity": 1, "attention-relations": {"weight": 0.1}},
    "max_steps": 10,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "save_every": 2,
}


class Killed(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize(
    "at", [pytest.param(1, marks=pytest.mark.thorough), 5, pytest.param(9, marks=pytest.mark.thorough)]
)
def test_a_killed_run_ends_in_the_same_weights(teacher: Checkpoint, data: Data, tmp_path: Path, at: int) -> None:
    data = data.head(28)  # an epoch ends within
    settings = DistillSettings(**RESUMED)
    work = tmp_path / "student.training"
    whole = distill(drawn(teacher), teacher, settings, data)

    def dying(done: int, total: int) -> None:
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        distill(drawn(teacher), teacher, settings, data, Surroundings(work=work, progress=dying))
    steps: list[int] = []
    around = Surroundings(work=work, progress=lambda done, total: steps.append(done))
    resumed = distill(drawn(teacher), teacher, settings, data, around)
    assert steps[0] == (at - 1) // 2 * 2  # the last checkpoint before
    assert resumed.hash == whole.hash
    np.testing.assert_allclose(curves_of(resumed)["loss"], curves_of(whole)["loss"], rtol=1e-6)
    assert not work.exists()


def test_what_is_learnt_beside_the_student_is_resumed_too(teacher: Checkpoint, data: Data, tmp_path: Path) -> None:
    narrow = StudentSettings(layers=1, hidden_size=16, heads=2)
    settings = DistillSettings(objectives={"hidden-states": 1}, max_steps=6, batch_size=8, save_every=2)

    def dying(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    whole = distill(draw_student(teacher, narrow), teacher, settings, data)
    work = tmp_path / "work"
    with pytest.raises(Killed):
        distill(draw_student(teacher, narrow), teacher, settings, data, Surroundings(work=work, progress=dying))
    resumed = distill(draw_student(teacher, narrow), teacher, settings, data, Surroundings(work=work))
    assert resumed.hash == whole.hash


def test_the_training_of_another_run_is_not_gone_on_with(teacher: Checkpoint, data: Data, tmp_path: Path) -> None:
    work = tmp_path / "work"

    def dying(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        distill(drawn(teacher), teacher, DistillSettings(max_steps=4), data, Surroundings(work=work, progress=dying))
    with pytest.raises(UsageError, match="unfinished training of another run: its settings is not the same"):
        distill(drawn(teacher), teacher, DistillSettings(max_steps=5), data, Surroundings(work=work))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UsageError, match="holds something that is not a training"):
        distill(drawn(teacher), teacher, DistillSettings(max_steps=5), data, Surroundings(work=tmp_path / "mine"))


def test_the_best_weights_are_kept_and_patience_ends(teacher: Checkpoint, data: Data) -> None:
    student = drawn(teacher)
    values = iter([0.2, 0.9, 0.5, 0.4, 0.3, 0.2])
    states: list[str] = []

    def measure(checkpoint: Checkpoint) -> dict[str, float]:
        assert not checkpoint.module.training
        states.append(hash_of_model(checkpoint.model))
        return {"agreement": next(values)}

    settings = DistillSettings(max_steps=12, batch_size=8, evaluate_every=2, patience=2)
    after = distill(student, teacher, settings, data, Surroundings(evaluation=Evaluation(measure, "agreement", True)))
    assert curves_of(after)["eval/agreement"] == [0.2, 0.9, 0.5, 0.4]
    assert after.hash == states[1]
    with pytest.raises(UsageError, match="patience needs data to measure on"):
        distill(drawn(teacher), teacher, settings, data)


def test_training_reports_to_tensorboard_and_mlflow(
    teacher: Checkpoint, data: Data, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    settings = DistillSettings(max_steps=2, batch_size=8)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    distill(drawn(teacher), teacher, settings, data, Surroundings(report_to=["tensorboard", "mlflow"]))
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))
    with sqlite3.connect(tmp_path / "runs.db") as database:
        logged = {name for (name,) in database.execute("select key from metrics")}
    assert {"loss", "objective/embedding-cosine", "learning_rate", "throughput"} <= logged
    with pytest.raises(UsageError, match="no tracker 'wandb'"):
        distill(drawn(teacher), teacher, settings, data, Surroundings(report_to=["wandb"]))
    monkeypatch.setattr("limbeck.distill.distillation.is_importable", lambda name: False)
    with pytest.raises(BackendUnavailable, match="mlflow is not installed"):
        distill(drawn(teacher), teacher, settings, data, Surroundings(report_to=["mlflow"]))


def test_a_run_that_diverges_keeps_its_last_good_weights(teacher: Checkpoint, data: Data, tmp_path: Path) -> None:
    student = drawn(teacher)

    def poison(done: int, total: int) -> None:
        if done == 5:
            with torch.no_grad():
                student.model.get_parameter("encoder.layer.0.output.dense.weight")[0, 0] = math.nan

    work = tmp_path / "work"
    settings = DistillSettings(max_steps=8, batch_size=8, save_every=2)
    with pytest.raises(TrainingDiverged, match="at step 5") as caught:
        distill(student, teacher, settings, data, Surroundings(work=work, progress=poison))
    assert caught.value.hint is not None and str(work / "checkpoint-4") in caught.value.hint
    assert (work / "checkpoint-4" / "model.safetensors").exists()
