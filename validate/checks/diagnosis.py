"""Diagnosis by hypothesis: known defects are tried on the student until it computes what the program does."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ...errors import InputError
from ...models.batching import Batch, Run
from ...models.checkpoint import Checkpoint
from ..proofs.parity import without_padding
from .defects import defects_of

_RESTORED = 0.1
"""Share of the difference that may be left when a defect explains it."""
_LIKE_ROUNDING = 4.0
"""Times as large, or as small, as a precision's rounding: of its size."""
_HALVES = ((torch.bfloat16, "bfloat16"), (torch.float16, "float16"))

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Answers:
    """What something answered to some batches, padding left out of what is per token."""

    batches: Sequence[Batch]
    outputs: Sequence[Outputs]

    def differences(self, run: Run) -> Iterator[float]:
        """Batch by batch, how far `run` is from these, as a share of each output's largest magnitude here."""
        for batch, known in zip(self.batches, self.outputs, strict=True):
            found = _real(run(batch), batch)
            yield max(float(_furthest(found[name], known[name]) / self._largest[name]) for name in known)

    def typical_difference(self, run: Run) -> float:
        """The root mean square over all batches. It moves little from one program to another of the same rounding; the
        largest difference moves much."""
        apart = [
            ((_real(run(batch), batch)[name] - known[name]) / self._largest[name]).ravel()
            for batch, known in zip(self.batches, self.outputs, strict=True)
            for name in known
        ]
        return float(np.sqrt(np.mean(np.square(np.concatenate(apart)))))

    @cached_property
    def _largest(self) -> dict[str, float]:
        names = self.outputs[0]
        return {name: float(max(np.max(np.abs(each[name]), initial=0.0) for each in self.outputs)) or 1.0
                for name in names}  # fmt: skip


def _furthest(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.max(np.abs(left - right), initial=0.0)) if left.shape == right.shape else float("inf")


def _real(outputs: Outputs, batch: Batch) -> Outputs:
    return {name: without_padding(value, batch) for name, value in outputs.items()}


def diagnose(program: Run, student: Checkpoint, batches: Sequence[Batch], tolerance: float) -> str | None:
    """The defect under which the student computes what the program does, in words; `None` where no known one explains
    it. A defect counts when it takes away nine tenths of the difference, on every batch, and what is left is within
    the tolerance.

    Args:
        batches: what the difference was seen on; those that the program refuses are left out.
    """
    answers = _Answers(*zip(*_answered(program, batches), strict=True))
    before = max(answers.differences(student.run))
    if not np.isfinite(before):
        return None
    allowed = min(_RESTORED * before, tolerance)
    for defect in defects_of(student):
        with defect.applied():
            if all(difference <= allowed for difference in answers.differences(student.run)):
                return defect.cause
    return _half_arithmetic(answers, student)


def _half_arithmetic(answers: _Answers, student: Checkpoint) -> str | None:
    apart = answers.typical_difference(student.run)
    exact = _Answers(answers.batches, [_real(student.run(batch), batch) for batch in answers.batches])
    for dtype, name in _HALVES:
        half = replace(student, model=copy.deepcopy(student.model).to(dtype))
        rounded = exact.typical_difference(half.run)
        if rounded / _LIKE_ROUNDING <= apart <= rounded * _LIKE_ROUNDING:
            return f"{name} arithmetic (the difference is of the size of its rounding)"
    return None


def _answered(program: Run, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Outputs]]:
    for batch in batches:
        try:
            yield batch, _real(program(batch), batch)
        except InputError:
            continue
