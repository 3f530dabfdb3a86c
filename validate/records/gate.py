"""A gate as people write it, and what it said: the records of both."""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Verdict = Literal["pass", "fail", "inconclusive"]
REFERENCE_WORDS: Final = {"teacher": "the teacher's", "previous": "the previous"}


class _Record(BaseModel):
    """A fact: never changed once written."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Gate(_Record):
    """A limit that candidates must keep: `metric` at least `min` and at most `max`, for every candidate whose name
    matches the glob `candidate`; with `slice`, on every slice whose name matches that glob, else on the whole.

    With `relative_to` the limits are not on the metric but on how it compares with a reference: the teacher's value, or
    that of the same candidate in the last release's report. `as` says how: the `ratio` to the reference (1 is as good),
    or the `difference` from it, in the metric's unit (0 is as good).

    ```yaml
    gates:
      - metric: spearman_kept
        min: 0.98
        why: below this the search team sees worse rankings
      - metric: latency_p99_ms
        candidate: "openvino-*"
        max: 5
      - metric: accuracy
        relative_to: previous
        as: difference
        min: -0.01
      - metric: accuracy_kept
        slice: typos
        min: 0.95
      - metric: accuracy_difference
        slice: "topic=*"
        min: -0.02
        correction: holm
    ```

    With `correction: holm` all slices that the glob matches are one question, whether some slice got worse than the
    limit (`gates.slices.together`).
    """

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)

    metric: str = Field(min_length=1)
    candidate: str = Field(default="*", min_length=1)
    min: float | None = Field(default=None, allow_inf_nan=False)
    max: float | None = Field(default=None, allow_inf_nan=False)
    relative_to: Literal["teacher", "previous"] | None = None
    as_: Literal["ratio", "difference"] = Field(default="ratio", alias="as")
    why: str | None = None
    slice: str | None = Field(default=None, min_length=1)
    correction: Literal["holm"] | None = None

    @field_validator("min", "max", mode="before")
    @classmethod
    def _limit_is_a_number(cls, value: object) -> object:
        if isinstance(value, bool):  # YAML reads `yes` as true, and pydantic would read that as 1.0
            raise ValueError("must be a number, not true or false")
        return value

    @model_validator(mode="after")
    def _limits_make_sense(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError(f"the gate on {self.metric} needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"the gate on {self.metric} has min {self.min:g} above max {self.max:g}")
        if self.as_ == "difference" and self.relative_to is None:
            raise ValueError(
                f"the gate on {self.metric} has as: difference but nothing to differ from; add relative_to: teacher or "
                "previous"
            )
        if self.correction and (self.slice is None or None not in (self.min, self.max)):
            raise ValueError(
                f"the gate on {self.metric} has correction: {self.correction}, which is for one limit, min or max, on "
                "many slices; give slice, a glob such as '*'"
            )
        return self

    @property
    def limits(self) -> str:
        """What is asked, in words: `at least 0.98`, `at least 0.98 × the teacher's`."""
        lower = [] if self.min is None else [f"at least {self._in_words(self.min)}"]
        upper = [] if self.max is None else [f"at most {self._in_words(self.max)}"]
        return " and ".join(lower + upper)

    def _in_words(self, limit: float) -> str:
        if self.relative_to is None:
            return exact_number(limit)
        reference = REFERENCE_WORDS[self.relative_to]
        if self.as_ == "ratio":
            return f"{exact_number(limit)} × {reference}"
        return f"{reference} {'−' if limit < 0 else '+'} {exact_number(abs(limit))}" if limit else reference


class GateResult(_Record):
    """What one gate said of one candidate, or of one `slice` of it: `observed` is the metric, or how it compares with
    what the gate is relative to; `low` and `high` are the ends of its 95% interval. `hindrance` is what makes it
    undecidable however many examples there are (`another CPU`)."""

    gate: Gate
    candidate: str
    slice: str | None = None
    observed: float | None
    low: float | None = None
    high: float | None = None
    verdict: Verdict
    reason: str
    hindrance: str | None = None

    @property
    def asked(self) -> str:
        """The gate as people name it: `accuracy at least 0.9 on typos`."""
        where = f" on {'every one of ' if self.gate.correction else ''}{self.slice}" if self.slice else ""
        return f"{self.gate.metric} {self.gate.limits}{where}"


def exact_number(value: float) -> str:
    """A limit as its author wrote it, without a needless `.0`."""
    return repr(value).removesuffix(".0")
