"""The teacher as a callable: where its outputs come from is the caller's choice (eager, compiled, cached)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..models.batching import Batch
from ..models.checkpoint import Checkpoint

TeacherCall = Callable[[Batch], Mapping[str, torch.Tensor]]
"""int64 inputs [batch, sequence] by name -> the teacher's outputs and features by name, without gradient."""

TEACHER_PREFIX = "teacher/"
"""Before the names of the teacher's own inputs in a batch, where it splits text otherwise than the student."""


def eager_teacher(teacher: Checkpoint) -> TeacherCall:
    """The teacher as it is: torch, float32, no gradient, on the device where the batches are."""

    def call(batch: Batch) -> dict[str, torch.Tensor]:
        teacher.module.to(batch["input_ids"].device)
        with torch.no_grad():
            outputs = teacher.module(**teacher.model_inputs(batch), **teacher.task.forward_flags())
        return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}

    return call


def teacher_inputs(batch: Batch) -> Batch:
    """The part of a training batch that the teacher is asked about."""
    own = {name.removeprefix(TEACHER_PREFIX): value for name, value in batch.items() if name.startswith(TEACHER_PREFIX)}
    return own or batch
