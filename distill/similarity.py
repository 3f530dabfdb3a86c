"""What each layer of a student has learnt: how alike its hidden states are to those of every layer of its teacher."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ..errors import InputError
from ..models.anatomy import anatomy_of
from ..models.batching import Batch
from ..models.checkpoint import Checkpoint
from ..models.embedding import pool
from ..models.features import hidden
from .teacher import teacher_inputs


class StreamingCKA:
    """Linear centred kernel alignment of every pair of layers, over samples that come in batches.

    For centred X [samples, p] and Y [samples, q] it is ||Y'X||^2 / (||X'X|| ||Y'Y||) in Frobenius norms (Kornblith et
    al., "Similarity of neural network representations revisited", ICML 2019, section 3): 1 for the same representation
    up to rotation and scale, 0 where no direction of one can be told from the other. Products and means are carried
    from batch to batch in float64, each batch centred on its own mean and moved to the common one (Chan, Golub and
    LeVeque 1983), so memory is student layers x teacher layers x p x q numbers whatever the number of samples.

    With fewer samples than channels everything looks alike: give it some thousands.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._means: list[torch.Tensor] = []
        self._own: list[torch.Tensor] = []
        """Of each side, [layers, width, width]."""
        self._both = torch.zeros(0, 0)
        """All pairs of layers in one matrix, [student layers * width, teacher layers * width]."""

    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Hidden states [layers, samples, width] of both sides: layers and widths may differ, samples are the same."""
        sides = [student.double(), teacher.to(student.device).double()]
        new = student.shape[1]
        if new == 0:
            return
        if self.samples == 0:
            self._means = [side.new_zeros(side.shape[0], side.shape[2]) for side in sides]
            self._own = [side.new_zeros(side.shape[0], side.shape[2], side.shape[2]) for side in sides]
            self._both = sides[0].new_zeros(self._means[0].numel(), self._means[1].numel())
        means = [side.mean(dim=1) for side in sides]
        moved = [mean - old for mean, old in zip(means, self._means, strict=True)]
        centred = [side - mean[:, None] for side, mean in zip(sides, means, strict=True)]
        weight = self.samples * new / (self.samples + new)
        self.samples += new
        for own, side, far in zip(self._own, centred, moved, strict=True):
            own.baddbmm_(side.mT, side).baddbmm_(far[:, :, None], far[:, None], alpha=weight)
        wide = [side.transpose(1, 2).flatten(0, 1) for side in centred]
        self._both.addmm_(wide[0], wide[1].T).addr_(moved[0].flatten(), moved[1].flatten(), alpha=weight)
        for old, far in zip(self._means, moved, strict=True):
            old += far * (new / self.samples)

    def matrix(self) -> np.ndarray:
        """float64 [student layers, teacher layers], each in [0, 1]; 0 where a layer says the same of every sample.

        Raises:
            InputError: no samples.
        """
        if self.samples == 0:
            raise InputError("There is no text to compare layers on.", "Give at least one row with text.")
        norms = [own.norm(dim=(1, 2)) for own in self._own]
        blocks = self._both.view(*self._means[0].shape, *self._means[1].shape)
        alike = blocks.square().sum(dim=(1, 3)) / torch.outer(*norms).clamp(min=torch.finfo(torch.float64).tiny)
        return np.asarray(alike.clamp(0, 1).cpu().numpy())


@torch.no_grad()
def layer_similarity(student: Checkpoint, teacher: Checkpoint, batches: Iterable[Batch]) -> np.ndarray:
    """Linear CKA (see `StreamingCKA`) of what leaves each layer, float64 [student layer, teacher layer].

    A sample is a token of the text; where the batches hold inputs of the teacher's own, because it splits text
    otherwise, it is a text, as the mean over its tokens. Both models are left in evaluation mode.

    Raises:
        InputError: no text, or an architecture whose layers are not known.
    """
    measured = StreamingCKA()
    for batch in batches:
        asked = teacher_inputs(batch)
        by_text = asked is not batch
        measured.add(_samples(student, batch, by_text), _samples(teacher, asked, by_text))
    return measured.matrix()


def _samples(checkpoint: Checkpoint, batch: Batch, by_text: bool) -> torch.Tensor:
    """Hidden states of every layer, [layers, tokens or texts, width]."""
    names = [hidden(layer) for layer in range(len(anatomy_of(checkpoint.model).layers(checkpoint.model)))]
    recorded = checkpoint.recording(names)
    inputs = {name: value.to(checkpoint.model.device) for name, value in recorded.model_inputs(batch).items()}
    outputs = recorded.module(**inputs, **recorded.task.forward_flags())
    mask = inputs["attention_mask"]
    if by_text:
        return torch.stack([pool(outputs[name], mask, "mean") for name in names])
    return torch.stack([outputs[name][mask.bool()] for name in names])
