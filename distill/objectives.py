"""Objectives: what a student is told to match, each with its formula and its paper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn import functional

from ..errors import UsageError, did_you_mean
from ..models.batching import Batch
from ..models.tasks import Task

Outputs = Mapping[str, torch.Tensor]


class Objective(ABC):
    """A term of the loss; used in YAML as `objectives: {NAME: WEIGHT}`."""

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    """The tasks whose outputs it reads."""
    needs_labels: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    """Reads `last_hidden_state` [batch, sequence, width]."""

    @abstractmethod
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, task: Task) -> torch.Tensor:
        """The term for one batch: a float32 scalar, a mean over the batch so that its weight does not depend on it."""


_LOGITS_TASKS = ("text-classification", "token-classification", "fill-mask", "text-generation")


class EmbeddingCosine(Objective):
    """`mean_i (1 - cos(s_i, t_i))` over sentence embeddings s, t of width d: the student's vector points where the
    teacher's points (Reimers & Gurevych 2020, with the cosine in place of the squared error)."""

    name = "embedding-cosine"
    tasks = ("sentence-similarity",)

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, task: Task) -> torch.Tensor:
        cosine = functional.cosine_similarity(student[task.output].float(), teacher[task.output].float(), dim=-1)
        return (1 - cosine).mean()


class PairwiseSimilarity(Objective):
    """`mean_{i != j} (cos(s_i, s_j) - cos(t_i, t_j))^2` over the pairs of a batch: the student keeps the distances
    between texts, which is what embeddings are used for (similarity-preserving distillation, Tung & Mori 2019)."""

    name = "pairwise-similarity"
    tasks = ("sentence-similarity",)

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, task: Task) -> torch.Tensor:
        ours, theirs = _cosines(student[task.output]), _cosines(teacher[task.output])
        pairs = ours.shape[0] * (ours.shape[0] - 1)  # the diagonal is 1 on both sides and adds nothing
        return (ours - theirs).square().sum() / max(pairs, 1)


def _cosines(embeddings: torch.Tensor) -> torch.Tensor:
    unit = functional.normalize(embeddings.float(), dim=-1)
    return unit @ unit.T


class HiddenMSE(Objective):
    """`mean ||s - t||^2 / var(t)` over the real tokens' last hidden states of width d: as many targets as there are
    tokens instead of one a text, so a student learns more from the same texts (FitNets, Romero et al. 2015; TinyBERT,
    Jiao et al. 2020, there with a projection, which equal widths do not need). Dividing by the teacher's variance makes
    1 the error of a student that knows nothing but the mean."""

    name = "hidden-mse"
    tasks = ("sentence-similarity",)
    needs_hidden = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, task: Task) -> torch.Tensor:
        real = batch["attention_mask"].bool()
        ours, theirs = (side["last_hidden_state"].float()[real] for side in (student, teacher))
        return functional.mse_loss(ours, theirs) / theirs.var().clamp(min=1e-12)


class LogitsKL(Objective):
    """`T^2 * mean KL(softmax(t / T) || softmax(s / T))` over examples, or over real tokens where logits are per token
    (Hinton, Vinyals & Dean 2015). T = 2; T^2 keeps the gradient's size independent of T."""

    name = "logits-kl"
    tasks = _LOGITS_TASKS
    temperature = 2.0

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, task: Task) -> torch.Tensor:
        ours, theirs = student[task.output].float(), teacher[task.output].float()
        if ours.ndim == 3:
            real = batch["attention_mask"].bool()
            ours, theirs = ours[real], theirs[real]
        divergence = functional.kl_div(
            functional.log_softmax(ours / self.temperature, dim=-1),
            functional.log_softmax(theirs / self.temperature, dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        return divergence * self.temperature**2


class HardLabels(Objective):
    """The task's own loss against the labels of the data: cross-entropy."""

    name = "labels"
    tasks = _LOGITS_TASKS
    needs_labels = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, task: Task) -> torch.Tensor:
        if bool((batch["labels"] < 0).all()):
            return student[task.output].sum() * 0.0  # a batch in which nothing is labelled
        return task.loss(student, batch)


OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (EmbeddingCosine, PairwiseSimilarity, HiddenMSE, LogitsKL, HardLabels)
}

DEFAULT_OBJECTIVES: dict[str, dict[str, float]] = {
    "sentence-similarity": {"embedding-cosine": 1.0, "pairwise-similarity": 1.0, "hidden-mse": 1.0},
    **{task: {"logits-kl": 1.0} for task in _LOGITS_TASKS},
}


def build_objectives(weights: Mapping[str, float], task: Task, has_labels: bool) -> list[tuple[Objective, float]]:
    """The objectives of these names with their weights.

    Raises:
        UsageError: an unknown objective, one that does not fit the task, or one that needs labels where there are none.
    """
    built = []
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise UsageError(f"There is no objective {name!r}; there are {known}.{did_you_mean(name, OBJECTIVES)}")
        kind = OBJECTIVES[name]
        if task.name not in kind.tasks:
            fitting = ", ".join(other for other, known in OBJECTIVES.items() if task.name in known.tasks)
            raise UsageError(f"The objective {name!r} does not fit {task.name}; what fits is {fitting}.")
        if kind.needs_labels and not has_labels:
            raise UsageError(f"The objective {name!r} needs labels, and the data has none.", "Leave it out.")
        built.append((kind(), float(weight)))
    return built
