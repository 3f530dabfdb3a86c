"""What the report keeps of speed: calls one after the other (`Latency`), texts that are written (`Generation`),
MLPerf's scenarios (`Scenario`), and how far the machine's noise reaches (`Noise`)."""

from __future__ import annotations

import itertools
import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

ScenarioName = Literal["single_stream", "multi_stream", "offline", "server"]


class _Record(BaseModel):
    """A fact: never changed once written."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Latency(_Record):
    """How long one call took, in milliseconds, for one batch size and sequence length. `histogram_edges_ms` has one
    entry more than `histogram_counts`; `speedup` is the teacher's time over this one; `properties` are the compile
    properties as read back from the runtime; `settled` says whether calls had become steady before they were timed;
    `cpus` are the logical CPUs that the process was bound to, as read back, empty where it was not."""

    batch_size: int = Field(ge=1)
    sequence_length: int = Field(ge=1)
    threads: int = Field(ge=0)
    rounds: int = Field(ge=0)
    samples: int = Field(ge=0)
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    histogram_edges_ms: list[float] = []
    histogram_counts: list[int] = []
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    properties: dict[str, str] = {}
    settled: bool = True
    cpus: list[int] = []

    @model_validator(mode="after")
    def _edges_enclose_counts(self) -> Self:
        edges, counts = self.histogram_edges_ms, self.histogram_counts
        if (edges or counts) and len(edges) != len(counts) + 1:
            raise ValueError(f"a histogram of {len(counts)} counts needs {len(counts) + 1} edges, not {len(edges)}")
        if any(right < left for left, right in itertools.pairwise(edges)):
            raise ValueError("the edges of a histogram must rise")
        return self


class TokenTimes(_Record):
    """How long tokens took, in milliseconds; `speedup` is the baseline's median over this one's, with the ends of its
    95 % interval."""

    samples: int = Field(ge=1)
    p50_ms: float
    p90_ms: float
    p99_ms: float
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None


class Generation(_Record):
    """How fast text was written, for one batch size and prompt length: `new_tokens` after each prompt, greedily, with a
    cache of keys and values. `ttft` is the time to the first token of a batch, its prompts read; `tpot` the time per
    output token after it, a step of the whole batch each. `tokens_per_second` are those of all texts of a batch
    together, after the first token; `cache_bytes` is what is kept of them in the end. The other fields are those of
    `Latency`."""

    batch_size: int = Field(ge=1)
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=2)
    threads: int = Field(ge=0)
    rounds: int = Field(ge=0)
    ttft: TokenTimes
    tpot: TokenTimes
    tokens_per_second: float
    cache_bytes: int = Field(ge=0)
    properties: dict[str, str] = {}
    settled: bool = True
    cpus: list[int] = []


class ScenarioTokens(_Record):
    """LoadGen's token latencies. `ttft_ms` and `tpot_ms` are percentiles as measured (`"99"`: milliseconds) of the time
    to first token, waiting included, and of the mean time per output token of a text; Offline has none.
    `..._early_stopping_ms` are SingleStream's estimates, as in `Scenario`; the bounds are the server's, for 99 %."""

    new_tokens: int = Field(ge=2)
    per_second: float
    """New tokens of all texts, their prompts' time included."""
    ttft_ms: dict[str, float] = {}
    tpot_ms: dict[str, float] = {}
    ttft_early_stopping_ms: float | None = None
    tpot_early_stopping_ms: float | None = None
    ttft_bound_ms: float | None = None
    tpot_bound_ms: float | None = None


class Scenario(_Record):
    """One test of MLPerf's LoadGen, in MLPerf's terms: a *sample* is one sequence, a *query* what is asked at once.

    `validity` is LoadGen's `result_validity`, but that INVALID for want of queries alone is `undecided`: LoadGen's
    early stopping asks for so many of them that the percentile is held with 99 % confidence. `reason` says why it is
    not valid. `percentiles_ms` are as measured (`"99"`: milliseconds of a query); Offline has none, since all of its
    samples wait from the start. `early_stopping_ms` is what MLPerf reports of SingleStream (90th percentile) and
    MultiStream (99th): the latency that the percentile is below with 99 % confidence.
    """

    name: ScenarioName
    batch_size: int = Field(ge=1)
    sequence_length: int = Field(ge=1)
    threads: int = Field(ge=0)
    duration_seconds: float = Field(gt=0)
    """For which queries were to be issued."""
    queries: int = Field(ge=0)
    samples_per_second: float
    validity: Literal["valid", "invalid", "undecided"]
    reason: str = ""
    percentiles_ms: dict[str, float] = {}
    early_stopping_ms: float | None = None
    target_qps: float | None = None
    latency_bound_ms: float | None = None
    tokens: ScenarioTokens | None = None
    """Where a sample is a text that is written: `sequence_length` is its prompt's then."""
    searched: bool = False
    """Whether `target_qps` was found by limbeck as the highest that is valid, and not given."""
    loadgen: str = ""
    """LoadGen's version."""


class Noise(_Record):
    """A subject timed twice, in two processes and the same rounds, and held against itself: `ratio` is ideally 1."""

    subject: str
    ratio: float = Field(gt=0, allow_inf_nan=False)
    low: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    high: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    rounds: int = Field(ge=1)

    @property
    def reach(self) -> float:
        """The factor (1 or more) within which a ratio may be noise: the farther end of the interval, whichever of the
        two was the faster."""
        ends = [end for end in (self.low, self.high) if end is not None] or [self.ratio]
        return math.exp(max(abs(math.log(end)) for end in ends))

    def hides(self, low: float, high: float) -> bool:
        """Whether a ratio with this interval could be noise."""
        return low <= self.reach and high >= 1 / self.reach
