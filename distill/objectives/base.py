"""What an objective is, what it gets to see, and schedules for its weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import nn

from ...models.batching import Batch
from ...models.tasks import Task

Outputs = Mapping[str, torch.Tensor]
"""Named outputs and features of one side (see `models/features.py`)."""

LOGITS_TASKS = ("text-classification", "token-classification", "fill-mask", "text-generation")
SENTENCE_TASKS = ("sentence-similarity",)
ALL_TASKS = (*LOGITS_TASKS, *SENTENCE_TASKS)


class Ramp(BaseModel):
    """A value that moves from `start` to `end` over the training: `{start: 1, end: 0, shape: cosine}` in YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, done: float) -> float:
        """The value when `done` of the training (0 to 1) is behind."""
        moved = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * moved


Scheduled = Annotated[float, Field(ge=0)] | Ramp
"""A constant, or one that moves while training goes on."""


def _above_zero(scheduled: float | Ramp) -> float | Ramp:
    ends = (scheduled.start, scheduled.end) if isinstance(scheduled, Ramp) else (scheduled,)
    if min(ends) <= 0:
        raise ValueError("Input should be greater than 0")
    return scheduled


Temperature = Annotated[Scheduled, AfterValidator(_above_zero)]
"""What logits are divided by before a softmax."""


def value_at(scheduled: float | Ramp, done: float) -> float:
    """The value when `done` of the training (0 to 1) is behind."""
    return scheduled.at(done) if isinstance(scheduled, Ramp) else float(scheduled)


@dataclass(frozen=True)
class Shape:
    """What an objective may have to know of a model before it runs."""

    depth: int
    """Layers."""
    width: int
    """Channels of a hidden state."""
    heads: int
    output_width: int
    """Channels of the task's output: labels, vocabulary, or the sentence embedding's width."""


@dataclass(frozen=True)
class Sides:
    """Student and teacher before training, for what is decided once."""

    student: Shape
    teacher: Shape
    similarity: Callable[[], np.ndarray]
    """Linear CKA [student layer, teacher layer] of the hidden states; measured when it is asked for."""


@dataclass(frozen=True)
class Pair:
    """Two features (see `models/features.py`) that are to become alike."""

    student: str
    teacher: str


@dataclass(frozen=True)
class Comparison:
    """What an objective sees at one step. Tensors of the two sides have the same batch and, for objectives that
    compare tokens, the same sequence."""

    student: Outputs
    teacher: Outputs
    """What `Objective.teacher_view` left of the teacher's outputs; without gradient."""
    batch: Batch
    """The student's inputs, and `labels` where there are any."""
    task: Task
    pairs: Sequence[Pair]
    learned: nn.Module | None
    """What `Objective.learned` made."""
    done: float = 0.0
    """Share of the training that is behind, 0 to 1."""

    @property
    def real(self) -> torch.Tensor:
        """Which positions hold a token of the text, bool [batch, sequence]."""
        return self.batch["attention_mask"].bool()


class Objective(BaseModel, ABC):
    """A term of the loss. In YAML `objectives: {NAME: WEIGHT}`, or `{NAME: {weight: 1, SETTING: VALUE}}`.

    A subclass is one formula: its fields are its settings, `loss` is the term for one batch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    """The tasks whose outputs it reads."""
    needs_labels: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True

    weight: Scheduled = 1.0

    def compares_tokens(self, task: Task) -> bool:
        """Whether it compares token by token, so that both sides have to split text alike."""
        return self.needs_teacher

    def pairs(self, sides: Sides) -> list[Pair]:
        """The features that it compares; none where it reads the task's output.

        Raises:
            UsageError: a layer map that does not fit, or sides that cannot be compared.
        """
        return []

    def learned(self, sides: Sides) -> nn.Module | None:
        """What is learnt beside the student and thrown away after training: projections.

        Raises:
            UsageError: widths that do not fit and no projection that could bridge them.
        """
        return None

    def teacher_view(self, teacher: Outputs, task: Task, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """What it reads of the teacher, as small as it can be made: this is what a cache keeps. Every tensor has the
        batch as its first axis, and the sequence as its second where it is per token."""
        if not self.needs_teacher:
            return {}
        return {pair.teacher: teacher[pair.teacher] for pair in pairs} or {task.output: teacher[task.output]}

    @abstractmethod
    def loss(self, seen: Comparison) -> torch.Tensor:
        """The term for one batch: a float32 scalar, a mean over the *global* batch (see `reduction.py`), so that its
        weight depends neither on the batch size nor on the number of processes."""
