"""Eager PyTorch in float32: the reference that everything is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from ..environment import available_cpus
from ..models.checkpoint import Checkpoint
from .base import Runner


class EagerRunner(Runner):
    """A checkpoint's module, called as a user of transformers would call it."""

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        self._checkpoint = checkpoint
        torch.set_num_threads(threads or available_cpus())
        self.properties = {
            "runtime": f"torch {torch.__version__} eager",
            "dtype": str(next(checkpoint.module.parameters()).dtype).removeprefix("torch."),
            "threads": str(torch.get_num_threads()),
        }

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return self._checkpoint.run(batch)

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        module = self._checkpoint.module
        inputs = {**self._checkpoint.model_inputs(batch), **self._checkpoint.task.forward_flags()}

        def call() -> object:
            with torch.inference_mode():
                return module(**inputs)

        return call
