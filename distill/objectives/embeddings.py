"""Objectives on sentence embeddings: each text's own vector, or how the texts of a batch lie to each other."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from ...errors import UsageError
from ...models.tasks import Task
from ..reduction import gathered, global_mean
from .base import SENTENCE_TASKS, Comparison, Objective, Sides, Temperature, value_at


class _OfSentences(Objective):
    """Reads one vector a text."""

    tasks = SENTENCE_TASKS

    def compares_tokens(self, task: Task) -> bool:
        return False

    def _vectors(self, seen: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides' embeddings, float32 [batch, width]; the student's projected where that is learnt."""
        ours, theirs = seen.student[seen.task.output].float(), seen.teacher[seen.task.output].float()
        return (seen.learned(ours) if seen.learned is not None else ours), theirs


class _InTheTeachersSpace(_OfSentences):
    """Compares a student's vector with a teacher's, so that the two need the same width."""

    project: bool = False
    """Learn a linear map from the student's width to the teacher's, where they differ."""

    def learned(self, sides: Sides) -> nn.Module | None:
        ours, theirs = sides.student.output_width, sides.teacher.output_width
        if ours == theirs:
            return None
        if not self.project:
            raise UsageError(
                f"The objective {self.name!r} compares the student's vectors with the teacher's, but they have "
                f"{ours} and {theirs} channels.",
                "Let it learn a map between them (project: true), or take pairwise-similarity or relational, which "
                "compare distances between texts.",
            )
        return nn.Linear(ours, theirs)


class EmbeddingCosine(_InTheTeachersSpace):
    """`mean_i 1 - cos(s_i, t_i)` over the texts' embeddings s, t: the student's vector points where the teacher's does
    (Reimers and Gurevych 2020, with the cosine in place of the squared error).

        embedding-cosine: 1
        embedding-cosine: {weight: 1, project: true}
    """

    name = "embedding-cosine"

    def loss(self, seen: Comparison) -> torch.Tensor:
        ours, theirs = self._vectors(seen)
        return global_mean(1 - functional.cosine_similarity(ours, theirs, dim=-1))


class PairwiseSimilarity(_OfSentences):
    """`mean_{i != j} (cos(s_i, s_j) - cos(t_i, t_j))^2` over the pairs of the global batch: the student keeps the
    angles between texts, which is what embeddings are used for (similarity-preserving distillation, Tung and Mori
    2019). Widths may differ.

        pairwise-similarity: 1
    """

    name = "pairwise-similarity"

    def loss(self, seen: Comparison) -> torch.Tensor:
        ours, theirs = (_cosines(gathered(side)) for side in self._vectors(seen))
        pairs = len(ours) * (len(ours) - 1)  # the diagonal is 1 on both sides and adds nothing
        return (ours - theirs).square().sum() / max(pairs, 1)


class Relational(_OfSentences):
    """`mean_{i != j} h(d_s(i, j) - d_t(i, j)) + a mean_{ijk} h(cos_s(i, j, k) - cos_t(i, j, k))` over the global batch
    (RKD, Park et al. 2019).

    d(i, j) is the distance of two texts in units of the batch's mean distance, cos(i, j, k) the cosine of the angle at
    j in the triangle of three texts, h Huber's loss with threshold 1, a = `angle`. Widths and scales may differ. Memory
    grows with the cube of the global batch: 256 texts take about half a gigabyte.

        relational: {weight: 1, angle: 2}
    """

    name = "relational"

    angle: float = Field(2.0, ge=0)
    """What angles weigh against distances (the paper's ratio); 0 leaves them out."""

    def loss(self, seen: Comparison) -> torch.Tensor:
        ours, theirs = (_relative_distances(gathered(side)) for side in self._vectors(seen))
        others = ~torch.eye(len(ours), dtype=torch.bool, device=ours.device)
        loss = functional.huber_loss(ours, theirs, reduction="sum") / others.sum().clamp(min=1)
        if self.angle:
            # texts that coincide on either side span no angle
            apart = others & (ours > _COINCIDE) & (theirs > _COINCIDE)
            triangles = apart[:, :, None] & apart[:, None, :] & others
            student, teacher = (_angles(side, apart)[triangles] for side in (ours, theirs))
            angle = functional.huber_loss(student, teacher, reduction="sum") / triangles.sum().clamp(min=1)
            loss = loss + self.angle * angle
        return loss


class Contrastive(_InTheTeachersSpace):
    """`mean_i -log(exp(cos(s_i, t_i) / T) / sum_j exp(cos(s_i, t_j) / T))` over the global batch: among the teacher's
    vectors of all its texts the student's is nearest to that of the same text (InfoNCE, van den Oord et al. 2018;
    between student and teacher in CRD, Tian et al. 2020). A larger batch makes it harder, and better.

        contrastive: {weight: 0.1, temperature: 0.05}
    """

    name = "contrastive"

    temperature: Temperature = 0.05

    def loss(self, seen: Comparison) -> torch.Tensor:
        ours, theirs = (functional.normalize(gathered(side), dim=-1) for side in self._vectors(seen))
        similarity = ours @ theirs.T / value_at(self.temperature, seen.done)
        return functional.cross_entropy(similarity, torch.arange(len(ours), device=ours.device))


class QueueSimilarity(_InTheTeachersSpace):
    """`mean_i KL(softmax_j(cos(t_i, q_j) / T) || softmax_j(cos(s_i, q_j) / T))` over the global batch, where q are the
    teacher's vectors of the last `size` texts: the student ranks many texts as the teacher does, for the price of one
    product (SEED, Fang et al. 2021, arXiv:2101.04731, with one temperature for both sides). Batches are of texts of
    like length; the queue holds texts of every length, as a search does that asks short questions of long passages.

        queue-similarity: {weight: 0.1, size: 4096}
    """

    name = "queue-similarity"

    temperature: Temperature = 0.05
    size: int = Field(4096, ge=1)
    """Texts that are remembered."""

    def learned(self, sides: Sides) -> nn.Module | None:
        return _Queue(self.size, sides.teacher.output_width, super().learned(sides))

    def loss(self, seen: Comparison) -> torch.Tensor:
        assert isinstance(seen.learned, _Queue)
        ours, theirs = (functional.normalize(gathered(side), dim=-1) for side in self._vectors(seen))
        known, temperature = seen.learned.after(theirs), value_at(self.temperature, seen.done)
        student, teacher = (functional.log_softmax(side @ known.T / temperature, dim=-1) for side in (ours, theirs))
        return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


class _Queue(nn.Module):
    """The teacher's last vectors, saved with what is learnt so that a resumed training goes on with them."""

    vectors: torch.Tensor
    seen: torch.Tensor

    def __init__(self, size: int, width: int, projection: nn.Module | None) -> None:
        super().__init__()
        self.projection = projection
        self.register_buffer("vectors", torch.zeros(size, width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ours: torch.Tensor) -> torch.Tensor:
        """The student's vectors, projected where that is learnt."""
        return ours if self.projection is None else self.projection(ours)

    @torch.no_grad()
    def after(self, vectors: torch.Tensor) -> torch.Tensor:
        """What is remembered once these, [texts, width], have taken the place of the oldest: [texts, width]."""
        size, seen = len(self.vectors), int(self.seen)
        places = torch.arange(seen, seen + len(vectors), device=vectors.device) % size
        self.vectors[places[-size:]] = vectors[-size:].to(self.vectors.dtype)
        self.seen += len(vectors)
        return self.vectors[: min(seen + len(vectors), size)].clone()


_COINCIDE = 1e-3
"""Distances below this share of the mean are rounding."""


def _cosines(embeddings: torch.Tensor) -> torch.Tensor:
    unit = functional.normalize(embeddings, dim=-1)
    return unit @ unit.T


def _relative_distances(vectors: torch.Tensor) -> torch.Tensor:
    """Euclidean [texts, texts], in units of their mean over pairs; the gradient is 0 where two texts coincide."""
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = len(vectors) * (len(vectors) - 1)
    return distances / (distances.sum() / max(pairs, 1)).clamp(min=1e-12)


def _angles(distances: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    """Cosines [texts, texts, texts] of the angle at the first between the other two, by the law of cosines."""
    sides, squares = distances.masked_fill(~apart, 1), distances.square()
    return (squares[:, :, None] + squares[:, None, :] - squares) / (2 * sides[:, :, None] * sides[:, None, :])
