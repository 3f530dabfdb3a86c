"""A loaded artifact for whoever measures quality and does not care which sizes its program takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..errors import InputError
from .base import Runner
from .decoder import Decoder

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..exporters.settings import ShapeRange


class FittedRunner(Runner):
    """Batches are split and padded for the program; what is timed (`prepare`) is the program itself, at a size that it
    takes."""

    def __init__(self, runner: Runner, shapes: ShapeRange) -> None:
        from ..exporters.fitting import fitted

        self._runner, self._shapes = runner, shapes
        self._call = fitted(runner, shapes)
        self.properties = runner.properties

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        tokens, most = next(iter(batch.values())).shape[1], self._shapes.max_sequence
        if tokens > most:  # said here, for a program without bounds of its own would answer something
            raise InputError(
                f"The program takes sequences of {self._shapes.min_sequence} to {most} tokens, not of {tokens}.",
                "Cut the texts, or export it again with a wider --sequence.",
            )
        return dict(self._call(batch))

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        rows, tokens = next(iter(batch.values())).shape
        shapes = self._shapes
        if not (shapes.min_batch <= rows <= shapes.max_batch and shapes.min_sequence <= tokens <= shapes.max_sequence):
            raise InputError(
                f"The program cannot be timed at {rows} x {tokens} tokens: it takes batches of {shapes.min_batch} to "
                f"{shapes.max_batch} and {shapes.min_sequence} to {shapes.max_sequence} tokens.",
                "Ask for a --batch-size and a --sequence-length within that, or export it with others.",
            )
        return self._runner.prepare(batch)

    def decoder(self) -> Decoder:
        return self._runner.decoder()

    def close(self) -> None:
        self._runner.close()
