"""Batches of any size on a program that takes certain sizes: split where they are too large, padded where too small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..errors import InputError
from .base import Runner

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..exporters.settings import ShapeRange


class FittedRunner(Runner):
    """A program whose sizes are static or bounded, for whoever measures quality and does not care. What is timed
    (`prepare`) is the program itself, at a size that it takes."""

    def __init__(self, runner: Runner, shapes: ShapeRange) -> None:
        self._runner, self._shapes = runner, shapes
        self.properties = runner.properties

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        import numpy as np

        size = self._shapes.max_batch
        rows = len(next(iter(batch.values())))
        parts = [
            self._fitted({name: value[start : start + size] for name, value in batch.items()})
            for start in range(0, rows, size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _fitted(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        rows, tokens = next(iter(batch.values())).shape
        missing_rows, missing_tokens = max(self._shapes.min_batch - rows, 0), max(self._shapes.min_sequence - tokens, 0)
        if not missing_rows and not missing_tokens:
            return self._run(batch)
        outputs = self._run({name: _padded(value, missing_rows, missing_tokens) for name, value in batch.items()})
        longer = (rows + missing_rows, tokens + missing_tokens)
        return {
            # Per token [batch, sequence, ...], per text [batch, ...].
            name: value[:rows, :tokens] if value.ndim >= 3 and value.shape[:2] == longer else value[:rows]
            for name, value in outputs.items()
        }

    def _run(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        try:
            return self._runner(batch)
        except InputError as error:
            tokens, least, most = (
                next(iter(batch.values())).shape[1],
                self._shapes.min_sequence,
                self._shapes.max_sequence,
            )
            if tokens <= most:
                raise
            raise InputError(
                f"The program takes sequences of {least} to {most} tokens, not of {tokens}.",
                "Cut the texts, or export it again with a wider --sequence.",
            ) from error

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        return self._runner.prepare(batch)

    def close(self) -> None:
        self._runner.close()


def _padded(value: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
    """Zeros on the right, where the mask's zeros say that nothing is, and copies of the last row below."""
    import torch

    longer = torch.nn.functional.pad(value, (0, tokens))
    return torch.cat([longer, longer[-1:].expand(rows, -1)]) if rows else longer
