"""What a cut hands back, and the check that comes before every cut."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..models.checkpoint import Checkpoint
from ..models.lineage import LayerWidths

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PruneResult:
    """A pruned copy of a model, and the record of what was cut."""

    model: PreTrainedModel
    method: str
    """What was done, in a few words: `ffn by taylor`, `2:4 by magnitude`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was decided beside what was asked for, for the history."""
    widths: list[LayerWidths] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Layers that were left as they were, each with the reason."""
    note: str | None = None


def skipped_note(skipped: list[tuple[str, str]]) -> str:
    """One sentence a reason, with the layers it holds for."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for layer, reason in skipped:
        by_reason[reason].append(layer)
    return " ".join(f"Left dense, since {reason}: {', '.join(layers)}." for reason, layers in by_reason.items())


def check_finite(checkpoint: Checkpoint) -> None:
    """Refuse a model with broken weights: a NaN ranks anywhere, so what is cut would be chance.

    Raises:
        InputError: a weight holds NaN or infinity; the message names it.
    """
    for name, weight in checkpoint.model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(
                f"The weight {name} of {checkpoint.source} holds NaN or infinity.",
                "The training that made this model diverged: go back to a checkpoint from before.",
            )
