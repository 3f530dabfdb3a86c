"""What goes along with training: progress, a trace that can be read while it runs, zeros that stay zero, and changes of
the student that a caller brings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from ..files import write_text

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint

Progress = Callable[[int, int], None]
"""Steps done and steps in all."""

_PRUNED_SHARE = 0.1
"""A matrix with more zeros than this was pruned: training never makes an exact zero."""


class ProgressCallback(TrainerCallback):
    """Tells a progress bar of ours about every step."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps)


class LiveTrace(TrainerCallback):
    """Keeps `trace.jsonl` in the work folder: one line a log, to be followed while training goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:  # written whole: a resumed run must not repeat the steps that it trains again
            write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))


class KeepZeros(TrainerCallback):
    """Holds pruned weights at zero: what is zero in a sparse matrix when training starts stays zero after every step,
    so a 2:4 pattern survives distillation."""

    def __init__(self, module: nn.Module) -> None:
        matrices = [weight for weight in module.parameters() if weight.ndim == 2]
        self.masks = [(weight, weight != 0) for weight in matrices if _zero_share(weight) > _PRUNED_SHARE]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        for weight, mask in self.masks:
            weight.mul_(mask.to(weight.device))


class Modifier(Protocol):
    """Changes a student while it trains, by a callback, and has a state that checkpoints carry along."""

    @property
    def callback(self) -> TrainerCallback:
        """What the trainer tells of its steps."""

    @property
    def settled(self) -> bool:
        """Whether the student is by now what it shall become: before, its weights are never kept as the best."""

    def traced(self) -> Mapping[str, float]:
        """Values that join every entry of the training's log, each a curve under its name."""

    def save_state(self, folder: Path) -> None:
        """Write what is needed to go on beside a checkpoint's weights."""

    def load_state(self, folder: Path) -> None:
        """Go on from there."""

    def note(self) -> str:
        """What came of it, for the history."""


@dataclass(frozen=True)
class Modification:
    """A change of the student that goes along with its training, as a caller asks for it."""

    name: str
    """The key under which its settings stand in the history."""
    summary: str
    """What is done, in a few words: `80 % zeros by movement`."""
    settings: Mapping[str, Any]
    """As JSON: an interrupted training is gone on with only under the same ones."""
    start: Callable[[Checkpoint], Modifier]
    """Called with the student when it is settled what of it learns."""


def _zero_share(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())
