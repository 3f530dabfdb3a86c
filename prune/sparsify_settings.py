"""What is asked of sparsity that is reached while a model trains."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import UsageError
from ..models.sparsity import parse_pattern
from .schedules import get_schedule

_OF_A_SCHEDULE = ("schedule", "end", "every", "allocation", "block")
_DECAY = 2e-4


class SparsifySettings(BaseModel):
    """Zeros that come while a model trains. In a recipe, beside a stage's `distill`: `sparsify: {target: 0.8}`,
    `sparsify: {target: 0.9, method: movement, schedule: linear}` or `sparsify: {pattern: "2:4", method: sr-ste}`.

    Raises:
        UsageError: values out of range, or settings that contradict each other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: float | None = Field(None, description="Share of zeros at the end, between 0 and 1.")
    pattern: str | None = Field(None, description='At most N of M consecutive weights are not zero: "2:4".')
    method: Literal["magnitude", "movement", "sr-ste"] = Field(
        "magnitude",
        description="What chooses: the size of a weight; how training moves it (away from zero or towards it); or, for "
        "a pattern, its size anew at every step.",
    )
    schedule: str = Field("cubic", description="How the share grows: cubic, linear, exponential, one-shot.")
    begin: float = Field(0.1, description="Share of the training steps after which the first mask is made.")
    end: float = Field(0.7, description="Share of the training steps after which the last mask is made, and stays.")
    every: int | None = Field(None, ge=1, description="Steps between two masks; a twentieth of the way if not given.")
    allocation: Literal["uniform", "global"] = Field(
        "uniform", description="The same share in every matrix, or whatever ranks lowest among all."
    )
    block: tuple[int, int] | None = Field(
        None, description="[rows, columns] (outputs, inputs) that become zero together."
    )
    decay: float | None = Field(
        None, ge=0, description="sr-ste only: how strongly a weight that is cut is drawn to zero; 2e-4 if not given."
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML 1.1 reads 2:4 as a number to the base of 60
            raise UsageError("The pattern of sparsify reads as a number.", 'Write it in quotes: pattern: "2:4".')
        if isinstance(value, str):
            parse_pattern(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SparsifySettings:
        get_schedule(self.schedule)
        if (self.target is None) == (self.pattern is None):
            raise UsageError(
                "sparsify takes exactly one of target and pattern.", 'Say target: 0.8, or pattern: "2:4" in quotes.'
            )
        if self.target is not None and not 0 < self.target < 1:
            raise UsageError(
                f"The target of sparsify is {self.target:g}; it must be more than 0 and less than 1.",
                "0.8 leaves a fifth of the weights.",
            )
        if not 0 <= self.begin < self.end <= 1 and self.pattern is None:
            raise UsageError(
                f"sparsify begins at {self.begin:g} and ends at {self.end:g} of the training; it must be "
                "0 <= begin < end <= 1."
            )
        if self.block is not None and min(self.block) < 1:
            raise UsageError(f"The block of sparsify is {list(self.block)}; its sizes must be 1 or more.")
        self._method_fits()
        return self

    def _method_fits(self) -> None:
        if self.decay is not None and self.method != "sr-ste":
            raise UsageError(f"decay belongs to sr-ste, not to {self.method}: leave it out.")
        if self.pattern is None:
            if self.method == "sr-ste":
                raise UsageError("sr-ste needs a pattern.", 'Say pattern: "2:4", or take method: movement.')
            return
        if self.method == "movement":
            raise UsageError(
                "movement chooses single weights or blocks, not a pattern.", "Take method: sr-ste or magnitude."
            )
        unread = [*_OF_A_SCHEDULE, *(["begin"] if self.method == "sr-ste" else [])]
        for name in unread:
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                when = "from the first step on" if self.method == "sr-ste" else "once, at `begin`"
                raise UsageError(f"A pattern by {self.method} is made {when}: leave {name} out.")
        if not 0 <= self.begin < 1:
            raise UsageError(f"sparsify begins at {self.begin:g} of the training; it must be 0 or more, less than 1.")

    @property
    def zeros(self) -> float:
        """The share of zeros at the end."""
        if self.target is not None:
            return self.target
        n, m = parse_pattern(self.pattern or "")
        return 1 - n / m

    @property
    def pull(self) -> float:
        """SR-STE's decay."""
        return _DECAY if self.decay is None else self.decay

    @property
    def summary(self) -> str:
        """In a few words, for the history: `80 % zeros by movement`, `2:4 by sr-ste`."""
        return f"{self.pattern or f'{100 * self.zeros:g} % zeros'} by {self.method}"
