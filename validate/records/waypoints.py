"""What is said of one step on the way from a teacher to what is deployed."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Point = Literal["teacher", "student", "graph", "program"]
"""Where quality is measured: the teacher and the student in eager torch, the student's graph in float32 on the
reference runtime, the compiled program."""


class Loss(BaseModel):
    """How much worse a point is than the one before, by one metric and in its unit, on the same examples: positive is
    worse, whichever way the metric runs. `low` and `high` are the ends of its 95% interval."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    metric: str
    value: float
    low: float | None = None
    high: float | None = None


class Parity(BaseModel):
    """How far the answers of a point lie from those of the one before on the validation rows.

    `largest` is the largest difference, `share` its share of the largest magnitude, `error` the norm of all differences
    over that of all answers, `cosine` that of all answers. `tolerance` is what the precision explains; without one (a
    student is another model than its teacher) nothing is judged. It is held against `share`, which sees a single wrong
    answer, but where activations or weights are quantised (`by_error`) against `error`: among thousands of texts some
    have an outlier that a range of 256 steps cuts off, and the largest difference would say more of the number of texts
    than of the program.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    rows: int = Field(ge=0)
    largest: float
    share: float
    error: float
    cosine: float
    tolerance: float | None = None
    by_error: bool = False

    @property
    def judged(self) -> float:
        """What the tolerance is held against."""
        return self.error if self.by_error else self.share

    @property
    def passed(self) -> bool:
        """Whether the difference is explained; not one that is no number."""
        return self.tolerance is None or (self.judged <= self.tolerance and math.isfinite(self.largest))
