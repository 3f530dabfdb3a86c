"""What every importance offers: scores for heads, feed-forward channels, layers and channels of the residual stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import InputError, UsageError, did_you_mean
from ..batching import Examples
from ..checkpoint import Checkpoint
from ..placement import placed

STRUCTURES = ("heads", "ffn", "layers", "width")
"""What can be scored, and cut: `width` are the channels of the residual stream."""

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


@dataclass(frozen=True)
class Calibration:
    """The examples that an importance looks at, and how it goes through them."""

    examples: Examples
    batch_size: int = 16
    seed: int = 0
    """Draws the random directions of a loss without labels."""
    progress: Progress | None = None


@dataclass(frozen=True)
class Scores:
    """How much is lost by cutting each part: the higher, the more. float64 on the CPU; `None` for what was not asked
    for. Lists have one tensor for each layer, first layer first."""

    heads: list[torch.Tensor] | None = None
    """[heads] each."""
    ffn: list[torch.Tensor] | None = None
    """[channels] each."""
    layers: torch.Tensor | None = None
    """[layers]."""
    width: torch.Tensor | None = None
    """[width] of the residual stream."""


class Importance(ABC):
    """One way to score the parts of a model."""

    name: ClassVar[str]
    structures: ClassVar[frozenset[str]] = frozenset(STRUCTURES)
    """What it can score, of `STRUCTURES`."""
    needs_data: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    """Scores estimate a change of the loss, so that they may be compared and added up over layers and structures;
    those of the others rank the parts of one layer (`layers` and `width`: of the model) only."""

    def scores(
        self, checkpoint: Checkpoint, structures: Collection[str], calibration: Calibration | None = None
    ) -> Scores:
        """Score these structures. The model is left as it was, wherever it is, and looked at on the GPU where one has
        room; memory does not depend on the number of examples.

        Raises:
            UsageError: a structure that is none or that this importance does not score, or `needs_data` and there is no
                calibration.
            InputError: an unknown architecture, no examples, or a loss that is not a number.
        """
        for structure in structures:
            self._check(structure)
        if not self.needs_data:
            return self._scores(checkpoint, frozenset(structures), None)
        if calibration is None:
            raise UsageError(f"Importance {self.name!r} needs examples.", "Add --data, or take --method magnitude.")
        if len(calibration.examples) == 0:
            raise InputError(f"There are no examples that importance {self.name!r} could look at.")
        return self._scores(placed(checkpoint), frozenset(structures), calibration)

    def _check(self, structure: str) -> None:
        if structure not in STRUCTURES:
            near = did_you_mean(structure, STRUCTURES)
            raise UsageError(f"There is no structure {structure!r}; valid are {', '.join(STRUCTURES)}.{near}")
        if structure not in self.structures:
            own = ", ".join(known for known in STRUCTURES if known in self.structures)
            raise UsageError(f"Importance {self.name!r} scores {own}, not {structure}.")

    @abstractmethod
    def _scores(self, checkpoint: Checkpoint, structures: frozenset[str], calibration: Calibration | None) -> Scores:
        """`scores` of checked arguments; there is a calibration where `needs_data`."""
