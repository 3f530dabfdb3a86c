"""Distillation as a whole: draw the student, train it against its teacher, write down how it went."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from ..models.batching import Examples
from ..models.checkpoint import Checkpoint, hash_of_model
from ..models.data import Data
from ..models.embedding import SentenceEmbedder
from ..models.lineage import DataRecord, Step
from .objectives import DEFAULT_OBJECTIVES, OBJECTIVES, build_objectives
from .settings import DistillSettings
from .student import draw_student, uniform_layers
from .trainer import (
    DistillationTrainer,
    KeepZeros,
    Progress,
    ProgressCallback,
    TeacherCall,
    TraceCallback,
    training_arguments,
)


def eager_teacher(teacher: Checkpoint) -> TeacherCall:
    """The teacher as it is: torch, float32, no gradient."""

    def call(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            outputs = teacher.module(**teacher.model_inputs(batch), **teacher.task.forward_flags())
        return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}

    return call


def needs_hidden(objectives: dict[str, float] | None, task: str) -> bool:
    """Whether any of these objectives (the task's default ones for `None`) reads hidden states."""
    names = objectives or DEFAULT_OBJECTIVES[task]
    return any(name in OBJECTIVES and OBJECTIVES[name].needs_hidden for name in names)


@contextmanager
def keeping_hidden(*checkpoints: Checkpoint) -> Iterator[None]:
    """Let these models return their hidden states inside the block."""
    modules = [checkpoint.module for checkpoint in checkpoints if isinstance(checkpoint.module, SentenceEmbedder)]
    for module in modules:
        module.keep_hidden = True
    try:
        yield
    finally:
        for module in modules:
            module.keep_hidden = False


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """A student this small, trained this briefly, underfits: dropout would only add noise to its targets."""
    dropouts = [(part, part.p) for part in module.modules() if isinstance(part, nn.Dropout)]
    for part, _ in dropouts:
        part.p = 0.0
    try:
        yield
    finally:
        for part, probability in dropouts:
            part.p = probability


def student_of(teacher: Checkpoint, layers: int | list[int]) -> Checkpoint:
    """An untrained student with some of the teacher's layers; its history is the teacher's so far."""
    depth = teacher.model.config.num_hidden_layers
    chosen = layers if isinstance(layers, list) else uniform_layers(layers, depth)
    model = draw_student(teacher.model, chosen)
    return replace(teacher, model=model, hash=hash_of_model(model))


def distill(
    student: Checkpoint,
    teacher: Checkpoint,
    settings: DistillSettings,
    data: Data,
    *,
    teacher_call: TeacherCall | None = None,
    rationale: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Checkpoint:
    """Train `student` in place against `teacher` on `data`, and return it with its history.

    Args:
        teacher_call: a cheaper way to the teacher's outputs (compiled, cached); the eager teacher when not given.

    Raises:
        InputError: teacher and student split text differently, or the loss diverges.
        UsageError: objectives that do not fit the task or the data.
    """
    _check_tokenizers(student, teacher)
    started = time.monotonic()
    length = min(settings.max_length or student.max_length, student.max_length)
    examples = student.task.examples(data, student.tokenizer, length, student.model.config)
    weights = settings.objectives or DEFAULT_OBJECTIVES[student.task.name]
    objectives = build_objectives(weights, student.task, has_labels=_has_labels(examples))
    if settings.freeze_embeddings:
        _freeze_embeddings(student)
    trace = TraceCallback()
    with (
        tempfile.TemporaryDirectory(prefix="limbeck-") as folder,
        keeping_hidden(*([student, teacher] if needs_hidden(weights, student.task.name) else [])),
        _without_dropout(student.module),
    ):
        trainer = DistillationTrainer(
            student=student,
            teacher=teacher_call or eager_teacher(teacher),
            objectives=objectives,
            args=training_arguments(settings, examples, Path(folder)),
            examples=examples,
            callbacks=[trace, ProgressCallback(progress), KeepZeros(student.module)],
        )
        try:
            trainer.train()
        finally:
            student.module.requires_grad_(True).eval()
    step = Step(
        verb="distill",
        method=" + ".join(weights),
        settings={**settings.model_dump(mode="json"), "objectives": dict(weights)},
        rationale=rationale,
        parent=student.hash,
        teacher=teacher.hash,
        data=DataRecord.of(data),
        seconds=round(time.monotonic() - started, 1),
        curves=trace.curves(),
    )
    return student.after(student.model, step, data)


def _has_labels(examples: Examples) -> bool:
    """Whether anything is labelled: token-classification marks the tokens it scores even where the data has no tags."""
    labels = (feature.get("labels", ()) for feature in examples.features)
    return any(label >= 0 for row in labels for label in ([row] if isinstance(row, int) else row))


def _freeze_embeddings(student: Checkpoint) -> None:
    embeddings = getattr(student.model.base_model, "embeddings", None) or student.model.get_input_embeddings()
    embeddings.requires_grad_(False)


def _check_tokenizers(student: Checkpoint, teacher: Checkpoint) -> None:
    """Every objective so far compares outputs position by position or batch by batch on the same token ids."""
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(
            f"Teacher and student split text differently ({len(teacher.tokenizer)} and {len(student.tokenizer)} "
            "tokens), so the same token ids mean different words to them.",
            "Draw the student from the teacher: --layers N.",
        )
