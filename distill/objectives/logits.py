"""Objectives on what a model predicts: its teacher's distribution, and the labels of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from ...errors import UsageError
from ...models.tasks import Task
from ..reduction import global_mean
from .base import LOGITS_TASKS, Comparison, Objective, Outputs, Pair, Ramp, Sides, Temperature, value_at

TOP_IDS = "logits.top_ids"
"""int64 [..., k]: the teacher's most likely answers."""
TOP_LOG_PROBABILITIES = "logits.top_log_probabilities"
"""float32 [..., k + 1]: what the teacher gives them at the objective's temperature, then what it gives all the rest."""


class LogitsKL(Objective):
    """`T^2 * mean D(softmax(t / T), softmax(s / T))` over examples, or over real tokens where logits are per token.

    With p the teacher's distribution and q the student's, D is

    - `forward`: `KL(p || q) = sum p log(p / q)`, the student covers all that the teacher might say (Hinton, Vinyals and
      Dean 2015);
    - `reverse`: `KL(q || p)`, the student says nothing that the teacher would not (MiniLLM, Gu et al. 2024);
    - `jensen-shannon`: `b KL(p || m) + (1 - b) KL(q || m)` with `m = b p + (1 - b) q` and b = `mix` (GKD, Agarwal et
      al. 2024).

    T^2 keeps the gradient's size independent of T. With `top_k` only the teacher's k most likely answers are told apart
    and all others are one, so that both sides stay distributions; a cache then holds k numbers instead of a vocabulary.

        logits-kl: {weight: 1, temperature: {start: 4, end: 1}, divergence: reverse}
        logits-kl: {temperature: 2, top_k: 64}
    """

    name = "logits-kl"
    tasks = LOGITS_TASKS

    temperature: Temperature = 2.0
    divergence: Literal["forward", "reverse", "jensen-shannon"] = "forward"
    mix: float = Field(0.5, gt=0, lt=1)
    """The teacher's share in the mixture of `jensen-shannon`."""
    top_k: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_temperature(self) -> Self:
        if self.top_k is not None and isinstance(self.temperature, Ramp):
            raise ValueError("top_k keeps the teacher's answers at one temperature, so that cannot be a ramp")
        return self

    def compares_tokens(self, task: Task) -> bool:
        return task.name != "text-classification"

    def pairs(self, sides: Sides) -> list[Pair]:
        ours, theirs = sides.student.output_width, sides.teacher.output_width
        if ours != theirs:
            raise UsageError(
                f"The objective {self.name!r} compares the same answers, but the student has {ours} and the teacher "
                f"{theirs} (labels, or entries of the vocabulary).",
                "Take a teacher with the same ones, or objectives that do not read the logits.",
            )
        return []

    def teacher_view(self, teacher: Outputs, task: Task, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        logits = teacher[task.output]
        if self.top_k is None:
            return {task.output: logits}
        kept = min(self.top_k, logits.shape[-1] - 1)  # the rest is at least one answer
        ids = logits.topk(kept, dim=-1).indices
        return {TOP_IDS: ids, TOP_LOG_PROBABILITIES: _top_and_rest(logits.float() / value_at(self.temperature, 0), ids)}

    def loss(self, seen: Comparison) -> torch.Tensor:
        temperature = value_at(self.temperature, seen.done)
        ours = _predictions(seen.student[seen.task.output], seen).float() / temperature
        if self.top_k is None:
            student = ours.log_softmax(dim=-1)
            theirs = _predictions(seen.teacher[seen.task.output], seen).float() / temperature
            teacher = theirs.log_softmax(dim=-1)
        else:
            student = _top_and_rest(ours, _predictions(seen.teacher[TOP_IDS], seen))
            teacher = _predictions(seen.teacher[TOP_LOG_PROBABILITIES], seen).float()
        return global_mean(self._between(student, teacher)) * temperature**2

    def _between(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [rows, answers] of both sides -> [rows]."""
        if self.divergence == "forward":
            return _kl(teacher, student)
        if self.divergence == "reverse":
            return _kl(student, teacher)
        mixture = torch.logaddexp(teacher + math.log(self.mix), student + math.log(1 - self.mix))
        return self.mix * _kl(teacher, mixture) + (1 - self.mix) * _kl(student, mixture)


class Labels(Objective):
    """`mean -log softmax(s)[label]` over all labels of the batch: the task's own loss, without a teacher. In text
    generation the label of a position is the next token (Hinton, Vinyals and Dean 2015 add it to the logits' term).

        labels: 0.5
    """

    name = "labels"
    tasks = LOGITS_TASKS
    needs_labels = True
    needs_teacher = False

    def loss(self, seen: Comparison) -> torch.Tensor:
        logits, labels = seen.student[seen.task.output], seen.batch["labels"]
        if seen.task.name == "text-generation":
            logits, labels = logits[:, :-1], labels[:, 1:]
        known = labels >= 0  # neither padding nor a tag that the data does not give
        return global_mean(functional.cross_entropy(logits[known].float(), labels[known], reduction="none"))


def _predictions(values: torch.Tensor, seen: Comparison) -> torch.Tensor:
    """[batch, answers] as it is, [batch, sequence, answers] at the real positions: [predictions, answers]."""
    return values[seen.real] if values.ndim == 3 else values


def _top_and_rest(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., k + 1] of the answers `ids` [..., k] and of all others together."""
    whole = logits.logsumexp(dim=-1, keepdim=True)
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), rest], dim=-1) - whole


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`KL(p || q)` of log-probabilities over the last axis."""
    return functional.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1)
