"""What goes along with training: progress, a trace that can be read while it runs, zeros that stay zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from ..files import write_text

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


def _zero_share(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())
