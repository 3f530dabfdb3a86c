"""What a budgeted search is asked for."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import UsageError

_KINDS = ("latency_ms", "size_mb", "flops")


class Budget(BaseModel):
    """What the pruned model may cost: exactly one of `latency_ms`, `size_mb` and `flops`. In a recipe,
    `prune: {budget: {latency_ms: 2.0, backend: openvino}, method: fisher}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    latency_ms: float | None = Field(None, description="Median milliseconds of one call on this machine.")
    size_mb: float | None = Field(None, description="Megabytes (1e6 bytes) of weights as the precision stores them.")
    flops: float | None = Field(None, description="Share of the model's floating-point operations, 0 to 1.")
    backend: str | None = Field(None, description="The runtime that latency is measured on.")
    precision: Literal["fp32", "fp16", "bf16", "int8", "native"] | None = Field(
        None, description="The export's precision; fp32 where not given."
    )
    batch_size: int = Field(1, ge=1, description="Rows of the batch that is timed.")
    sequence_length: int = Field(128, ge=1, description="Tokens of a row that is timed, or that FLOPs are counted for.")
    threads: int | None = Field(None, ge=1, description="Threads of the runtime; every CPU where not given.")
    protect: tuple[int, ...] = Field((), description="Layers, from 0, that are left whole.")

    @model_validator(mode="after")
    def _consistent(self) -> Budget:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"A budget is exactly one of {', '.join(_KINDS)}; given were {', '.join(given) or 'none'}.",
                "Use latency_ms=2.0, size_mb=40 or flops=0.5.",
            )
        if not 0 < self.limit < math.inf or (self.flops is not None and self.flops > 1):
            valid = "more than 0 and at most 1" if self.flops is not None else "more than 0"
            raise UsageError(f"The budget {self.kind} is {self.limit:g}; it must be {valid}.")
        if self.latency_ms is not None and self.backend is None:
            raise UsageError(
                "A budget in latency needs the backend that it is measured on.", "Add backend=openvino, or onnx."
            )
        if self.latency_ms is None and self.threads is not None:
            raise UsageError(f"A budget in {self.kind} is counted, not timed: threads change nothing. Leave them out.")
        if self.flops is not None and (self.backend or self.precision):
            raise UsageError("FLOPs are the same on every backend and in every precision: leave both out.")
        return self

    @property
    def kind(self) -> str:
        """`latency_ms`, `size_mb` or `flops`."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @property
    def limit(self) -> float:
        """The number that was given, in the unit of `kind`."""
        return float(getattr(self, self.kind))
