"""What is trained: the student, with the objectives bound to it and whatever they learn beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models.batching import Batch
from ..models.checkpoint import Checkpoint
from .objectives.base import Comparison, Objective, Outputs, Pair, Shape, Sides, value_at
from .teacher import TeacherCall, teacher_inputs


@dataclass(frozen=True)
class Term:
    """An objective that knows which features it compares."""

    objective: Objective
    pairs: Sequence[Pair]
    learned: nn.Module | None

    @property
    def name(self) -> str:
        """The objective's."""
        return self.objective.name


def bind(objectives: Sequence[Objective], sides: Sides, seed: int) -> list[Term]:
    """Decide for each objective what it compares, and make what it learns beside the student.

    Raises:
        UsageError: a layer map, or widths, that do not fit the two models.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [Term(each, each.pairs(sides), each.learned(sides)) for each in objectives]


def shape_of(checkpoint: Checkpoint) -> Shape:
    """What objectives may have to know of a model."""
    config = checkpoint.model.config
    outputs = {"sentence-similarity": config.hidden_size, "fill-mask": getattr(config, "vocab_size", 0)}
    outputs["text-generation"] = outputs["fill-mask"]
    return Shape(
        depth=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        output_width=int(outputs.get(checkpoint.task.name, config.num_labels)),
    )


def student_features(terms: Sequence[Term]) -> tuple[str, ...]:
    """The student's features that the terms read, each once."""
    return tuple(dict.fromkeys(pair.student for term in terms for pair in term.pairs))


def teacher_features(terms: Sequence[Term]) -> tuple[str, ...]:
    """The teacher's features that the terms read, each once."""
    return tuple(dict.fromkeys(pair.teacher for term in terms for pair in term.pairs))


@dataclass(frozen=True)
class TeacherViews:
    """What the objectives read of the teacher for a training batch, reduced to what a cache would keep."""

    call: TeacherCall
    terms: Sequence[Term]
    checkpoint: Checkpoint

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Named tensors [batch, ...] or [batch, sequence, ...]."""
        outputs = self.call(teacher_inputs(batch))
        views: dict[str, torch.Tensor] = {}
        for term in self.terms:
            if term.objective.needs_teacher:
                views |= term.objective.teacher_view(outputs, self.checkpoint.task, term.pairs)
        return views


class Distillation(nn.Module):
    """Student and objectives as one module: the loss is computed inside its forward, so that every parameter is used
    where DistributedDataParallel, FSDP and DeepSpeed expect it.

    The teacher is not part of it: its outputs come in with the batch.
    """

    def __init__(self, student: Checkpoint, terms: Sequence[Term]) -> None:
        super().__init__()
        self.checkpoint = student
        """The student as it stands, without what is recorded while it trains."""
        self._recorded = student.recording(student_features(terms))
        self.student = self._recorded.module
        self.terms = list(terms)
        self.learned = nn.ModuleDict({term.name: term.learned for term in terms if term.learned is not None})
        self._no_split_modules = student.model._no_split_modules  # what FSDP wraps one by one

    def forward(self, batch: Batch, teacher: Outputs, done: float = 0.0) -> dict[str, torch.Tensor]:
        """The weighted sum of the objectives (`loss`), and each objective's own value under its name, unweighted.

        Args:
            batch: the student's inputs [batch, sequence], and `labels` where there are any.
            teacher: what `TeacherViews` gives for the same rows.
            done: share of the training that is behind, 0 to 1.
        """
        task = self._recorded.task
        outputs = self.student(**self._recorded.model_inputs(batch), **task.forward_flags())
        values: dict[str, torch.Tensor] = {}
        with torch.autocast(batch["input_ids"].device.type, enabled=False):  # objectives are sums of small differences
            for term in self.terms:
                seen = Comparison(outputs, teacher, batch, task, term.pairs, term.learned, done)
                values[term.name] = term.objective.loss(seen)
            loss = torch.stack([value_at(term.objective.weight, done) * values[term.name] for term in self.terms]).sum()
        return {"loss": loss, **values}
