"""Where a model runs while it is only looked at: on the GPU, where there is one with room for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from .checkpoint import Checkpoint
from .mapped import copy_of

_ROOM = 2
"""Free memory that is asked for, in sizes of the weights: they are not all that a run takes."""


def placed(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a copy of its model on the GPU; the checkpoint itself where there is no GPU with room for
    twice its weights, or where it does not lie on the CPU."""
    model = checkpoint.model
    size = sum(weight.nbytes for weight in model.parameters())
    if model.device.type != "cpu" or not has_room(size):
        return checkpoint
    return replace(checkpoint, model=copy_of(model, lambda weight: weight.detach().cuda()).cuda())


def has_room(size: int) -> bool:
    """Whether there is a GPU that a model of so many bytes may be put on."""
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= _ROOM * size
