"""Whether an int8 program was calibrated on text like that which it will meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...backends.registry import backend_of_format
from ...errors import BackendUnavailable
from ...exporters.activation_ranges import ActivationRange
from ...exporters.settings import CALIBRATED
from ...models.batching import batches_by_length
from ...models.checkpoint import Checkpoint
from ..records.report import Check
from .base import Subject, SubjectCheck, Unchecked

_LOST = 0.015
"""Share of the sum of squares that cutting takes away: a few outliers are cut on purpose, and cost next to nothing.
Real texts lose up to 1.3 % in one range (MiniLM, calibrated on 100), random tokens 2 % (ONNX) to 8 % (OpenVINO)."""
_USED = 1 / 8
"""Share of the range that real text must use: less wastes three of eight bits."""
_SHOWN = 3


class ActivationRanges(SubjectCheck):
    """The ranges to which an int8 program's activations are cut, against what its float student's activations are on
    the validation rows, product by product: too narrow and values are clipped, too wide and steps are wasted. Both are
    what calibration on noise, or on text of another kind, leaves behind. It needs the student; what a range costs in
    quality is for the metrics to say."""

    name = "activation ranges"

    def look(self, subject: Subject) -> Check | Unchecked | None:
        manifest = subject.manifest
        if manifest.settings.precision not in CALIBRATED or subject.standard is None:
            return None
        if subject.student is None:
            return Unchecked(subject.student_missing)
        try:
            ranges = backend_of_format(manifest.format).activation_ranges(subject.folder, manifest)
        except BackendUnavailable as error:
            return Unchecked(error.message)
        if ranges is None:
            return Unchecked(f"a {manifest.format} artifact shows its ranges to nobody")
        fixed = list(ranges)
        if not fixed:
            return None  # they are found as it runs
        used = _use_of(subject.student, fixed, subject)
        if not used:
            return Unchecked("none of its ranges has a known product")
        wrong = sorted((one for one in used if one.problem), key=lambda one: (-one.lost, one.used))
        if not wrong:
            return self.passes(
                f"{len(used)} ranges fit the validation texts: cutting loses {max(one.lost for one in used):.2%} of an "
                f"input's energy at most, and {min(one.used for one in used):.0%} of a range is used at least"
            )
        named = "; ".join(f"{one.module} {one.problem}" for one in wrong[:_SHOWN])
        rows: list[dict[str, Any]] = [
            {"module": one.module, "energy cut": one.lost, "range used": one.used} for one in wrong
        ]
        return self.fails(
            f"calibrated on other inputs than these texts: {len(wrong)} of {len(used)} ranges do not fit: {named}", rows
        )


@dataclass
class _Use:
    """How real activations lie in one range."""

    range: ActivationRange
    values: int = 0
    squares: float = 0.0
    cut: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    @property
    def module(self) -> str:
        return self.range.module

    @property
    def lost(self) -> float:
        """Share of the sum of squares that is cut."""
        return self.cut / max(self.squares, 1e-30)

    @property
    def used(self) -> float:
        return (self.high - self.low) / max(self.range.high - self.range.low, 1e-30)

    @property
    def problem(self) -> str:
        if self.lost > _LOST:
            return f"cuts its inputs ({self.lost:.1%} of their energy is lost)"
        return f"uses {self.used:.1%} of its range" if self.used < _USED else ""

    def add(self, values: torch.Tensor) -> None:
        if self.range.smoothing is not None:
            values = values * torch.from_numpy(self.range.smoothing).to(values.dtype)
        self.values += values.numel()
        self.squares += float(values.square().sum())
        self.cut += float((values - values.clamp(self.range.low, self.range.high)).square().sum())
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


def _use_of(student: Checkpoint, ranges: Sequence[ActivationRange], subject: Subject) -> list[_Use]:
    """The float student runs over the validation rows; padding is left out."""
    modules = dict(student.module.named_modules())
    known = [_Use(one) for one in ranges if one.module in modules]
    mask: Mapping[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for use in known:

            def hook(_: nn.Module, args: Any, use: _Use = use) -> None:
                values = args[0]
                real = mask["real"]
                use.add(values[real] if values.dim() == 3 and values.shape[:2] == real.shape else values)

            hooks.callback(modules[use.module].register_forward_pre_hook(hook).remove)
        for _, batch in batches_by_length(subject.examples, subject.tokenizer, 32):
            mask = {"real": batch["attention_mask"].bool()}
            student.run(batch)
    return [use for use in known if use.values]
