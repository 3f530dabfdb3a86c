"""The report: what was measured on a teacher and its candidates, which gates were asked, and what they answered.

`report.json` is this model; HTML, Markdown, JUnit and the terminal table are renderings of it (`validate.rendering`).
A figure that is not finite (a perplexity that overflowed) is kept as `"Infinity"` or `"NaN"`, since JSON has no word
for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator
from pydantic.json_schema import SkipJsonSchema

from ...errors import InputError
from ...files import read_json, write_json
from ...models.lineage import Curve, LayerSimilarity, LayerWidths, Step
from .bisection import StepDifferences
from .gate import REFERENCE_WORDS, Gate, GateResult, Verdict, exact_number
from .performance import Generation, Latency, Noise, Scenario
from .profile import Baseline
from .waypoints import Loss, Parity, Point

SCHEMA_VERSION: Final = 1
REPORT_FILE = "report.json"

__all__ = ["REFERENCE_WORDS", "Candidate", "ChangedExample", "Check", "Curve", "Gate", "GateResult", "Generation",
           "Latency", "LayerSimilarity", "LayerWidths", "Loss", "Matrix", "Metric", "Noise", "Parity", "Point",
           "ReliabilityBin", "Report", "Scenario", "Slice", "Step", "Temperature", "Verdict", "Waypoint",
           "exact_number", "load_report", "save_report"]  # fmt: skip

SliceKind = Literal[
    "file", "column", "length", "position", "perturbed", "invariance", "counterfactual", "bias", "prompts"
]
_PROBLEMS_SHOWN = 3
FEWEST_IN_A_SLICE = 30
"""Examples below which the figures of a slice are too uncertain to pass a gate."""


class _Record(BaseModel):
    """A fact: never changed once written."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class _Growing(BaseModel):
    """Filled in while measurements come in; what is assigned is checked as what is given at the start."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, ser_json_inf_nan="strings")


class Metric(_Record):
    """One number about a candidate. `low` and `high` are the ends of its 95% interval, `count` the examples behind it,
    `teacher` the teacher's value of the same metric; `name` is what gates name. `p_value` is that of no difference to
    the teacher, where there is an exact test of it."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    count: int | None = Field(default=None, ge=0)
    teacher: float | None = None
    higher_is_better: bool
    description: str
    data: str | None = None
    p_value: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _interval_in_order(self) -> Self:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"the interval of {self.name} starts at {self.low} and ends below it, at {self.high}")
        return self


class Check(_Record):
    """A yes-or-no proof (parity by shape, weight audit, sparsity) with the rows it rests on."""

    name: str
    passed: bool
    detail: str
    rows: list[dict[str, str | float | int | bool]] = []


class Matrix(_Record):
    """A weight matrix as a compiled program stores it. `layer` counts from 0 and is `None` outside the layers; `kind`
    is what it is for there (`q`, `up`, ...); `zeros` is a share of its weights, and `pattern` says that two of every
    four along the reduction axis are zero (2:4); `size_bytes` is without its scales."""

    name: str
    layer: int | None = Field(default=None, ge=0)
    kind: str | None = None
    shape: list[int]
    precision: str
    zeros: float = Field(ge=0, le=1)
    pattern: bool
    size_bytes: int = Field(ge=0)


class ReliabilityBin(_Record):
    """Mean confidence and accuracy (both 0 to 1) of the `count` predictions in one confidence bin."""

    confidence: float
    accuracy: float
    count: int = Field(ge=0)


class Temperature(_Record):
    """A number to divide a candidate's logits by, after which its probabilities are better. What it brings was measured
    on examples that it was not fitted on: negative log-likelihood (nats; `gain_low` and `gain_high` are the ends of the
    95% interval of its fall) and expected calibration error (bins of equal mass), before and after."""

    value: float = Field(gt=0)
    nll_before: float
    nll_after: float
    gain_low: float
    gain_high: float
    ece_before: float
    ece_after: float

    @property
    def in_words(self) -> str:
        """What to do, and what it is worth."""
        fall, nll, ece = (
            f"{short_number(before, 3)} to {short_number(after, 3)}"
            for before, after in (
                (self.gain_low, self.gain_high),
                (self.nll_before, self.nll_after),
                (self.ece_before, self.ece_after),
            )
        )
        return (
            f"its logits divided by {short_number(self.value, 3)} would be better calibrated: negative log-likelihood "
            f"{nll} (95% interval of the fall {fall}), calibration error {ece}, on examples that it was not fitted on."
        )


class ChangedExample(_Record):
    """An example that the candidate answers far from how the teacher does. `row` counts from 1 in the data file;
    `distance` is in the unit that `measure` names; `text` is cut."""

    row: int = Field(ge=1)
    text: str
    label: str | None = None
    teacher: str
    candidate: str
    distance: float
    measure: str


class Slice(_Record):
    """A part of the rows, or rows beside them, with metrics of its own: those of the whole, and those that its kind
    adds (`invariance` where rows are perturbed). `note` says what of it cannot be judged, and why."""

    name: str
    kind: SliceKind
    count: int = Field(ge=0)
    """Examples: rows, or windows where long texts are cut into some; pairs or groups where rows belong together."""
    metrics: list[Metric] = []
    note: str | None = None
    changed: list[ChangedExample] = []
    """Of a slice that has rows of its own, those whose answers left the teacher's furthest, the furthest first."""

    def metric(self, name: str) -> Metric | None:
        """The metric of that name, or `None`."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    @property
    def too_small(self) -> bool:
        """Whether it has too few examples to be judged by."""
        return self.count < FEWEST_IN_A_SLICE


class Waypoint(_Record):
    """One of the points between a teacher and what is deployed, measured on the same rows: how it answers, what it lost
    to the point before, how far its answers moved, and whether its weights are the student's. `note` says what is
    missing here, and why."""

    name: Point
    runtime: str
    precision: str
    metrics: list[Metric] = []
    loss: Loss | None = None
    parity: Parity | None = None
    audit: Check | None = None
    note: str | None = None

    def metric(self, name: str) -> Metric | None:
        """The metric of that name, or `None`."""
        return next((metric for metric in self.metrics if metric.name == name), None)


class StageResult(_Record):
    """What one stage of a recipe made of the model that it started from (`start`: another stage, or `teacher`), in
    eager torch on the same rows. `zeros` is a share of its parameters, `size_bytes` that of its weights in float32,
    `seconds` what the change took; `loss` is to the start. A cycle that kept what it was given has no `verb`."""

    name: str
    start: str
    verb: Literal["distill", "prune"] | None
    method: str
    checkpoint_hash: str
    parameters: int = Field(ge=0)
    zeros: float = Field(ge=0, le=1)
    size_bytes: int = Field(ge=0)
    seconds: float = Field(ge=0)
    metrics: list[Metric] = []
    loss: Loss | None = None

    def metric(self, name: str) -> Metric | None:
        """The metric of that name, or `None`."""
        return next((metric for metric in self.metrics if metric.name == name), None)


class Candidate(_Growing):
    """One thing that was measured. `unverified` says in words what was never tried ("never run on a GPU")."""

    name: str
    kind: Literal["teacher", "checkpoint", "artifact"]
    backend: str
    precision: str
    path: str
    artifact_id: str | None = None
    checkpoint_hash: str | None = None
    """SHA-256 over configuration and weights of a teacher or checkpoint."""
    parameters: int | None = Field(default=None, ge=0)
    size_bytes: int | None = Field(default=None, ge=0)
    unverified: str | None = None
    baseline: bool = False
    """Measured for comparison only: no gate looks at it."""
    metrics: list[Metric] = []
    checks: list[Check] = []
    latencies: list[Latency] = []
    generations: list[Generation] = []
    """How fast it writes text, a record a batch size and prompt length."""
    scenarios: list[Scenario] = []
    reliability: list[ReliabilityBin] = []
    temperature: Temperature | None = None
    """Suggested where it is sure to make probabilities better."""
    slices: list[Slice] = []
    changed: list[ChangedExample] = []
    """The examples whose answers left the teacher's furthest, the furthest first."""
    matrices: list[Matrix] = []
    """What its program holds, in the program's order; empty where its files do not tell."""
    waypoints: list[Waypoint] = []
    """The way from the teacher to this, point by point; those in between are missing where they are not at hand."""
    modules: list[StepDifferences] = []
    """What each module hands on: student against exported graph, and that against the program; empty where nobody
    asked or nothing shows its inside."""

    def metric(self, name: str) -> Metric | None:
        """The metric of that name, or `None`."""
        return next((metric for metric in self.metrics if metric.name == name), None)


class Report(_Growing):
    """Everything that one `validate`, `bench` or `run` found. `created` is ISO 8601 in UTC, `data` names the data sets
    by fingerprint or credit, `environment` is `environment.facts()`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["validation", "benchmark", "run"]
    title: str
    created: str
    command: str
    teacher: Candidate | None = None
    candidates: list[Candidate] = []
    stages: list[StageResult] = []
    """Of a run, what its stages made, each after its start."""
    steps: list[Step] = []
    constraints: list[str] = []
    gates: list[GateResult] = []
    environment: dict[str, Any] = {}
    data: list[str] = []
    notes: list[str] = []
    monitoring: SkipJsonSchema[Baseline | None] = Field(default=None, exclude=True)
    """What live traffic will be held against; written beside the report, in a file of its own."""
    noise: Noise | None = None
    """How far from 1 the ratio of a subject to itself came, where that was measured."""
    energy: str | None = None
    """What energy was measured by, or why it was not, in a sentence; `None` where nothing was timed."""

    @model_validator(mode="before")
    @classmethod
    def _verdict_is_computed(cls, value: Any) -> Any:
        """A stored verdict is never believed: it follows from the gates and checks."""
        return {key: item for key, item in value.items() if key != "verdict"} if isinstance(value, dict) else value

    @property
    def measured(self) -> list[Candidate]:
        """The teacher, if any, then the candidates."""
        return [*([self.teacher] if self.teacher else []), *self.candidates]

    def checks(self) -> Iterator[tuple[Candidate, Check]]:
        """Every check with the candidate it belongs to."""
        return ((candidate, check) for candidate in self.measured for check in candidate.checks)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict | None:
        """`fail` when any gate or check fails, else `inconclusive` when any gate is, else `pass`; `None` when nothing
        was asked."""
        verdicts = {result.verdict for result in self.gates}
        verdicts |= {"pass" if check.passed else "fail" for _, check in self.checks()}
        ranking: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")
        return next((verdict for verdict in ranking if verdict in verdicts), None)


def save_report(report: Report, folder: Path) -> Path:
    """Write `report.json` into `folder`, whole or not at all, and return its path; beside it `monitoring.json`, where
    there is a baseline."""
    path = folder / REPORT_FILE
    # through pydantic's own JSON, which knows paths, dates and figures that are not finite
    write_json(path, json.loads(report.model_dump_json()))
    if report.monitoring is not None:
        report.monitoring.save(folder)
    return path


def load_report(path: Path) -> Report:
    """Read a report from `report.json`, or from the folder that holds one.

    Raises:
        InputError: the file is missing, is not a report, or was written by a newer limbeck.
    """
    path = path / REPORT_FILE if path.is_dir() else path
    value = read_json(path)
    if not isinstance(value, dict) or "schema_version" not in value:
        raise InputError(
            f"{path} is not a limbeck report: it has no schema_version.", "Give the path of a report.json."
        )
    version = value["schema_version"]
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"{path} has report schema version {version}; this limbeck reads version {SCHEMA_VERSION}.",
            "Upgrade: pip install --upgrade limbeck.",
        )
    try:
        return Report.model_validate(value)
    except ValidationError as error:
        raise InputError(
            f"{path} is not a valid report: {describe_problems(error)}.",
            "Write it again with limbeck validate or bench.",
        ) from error


def describe_problems(error: ValidationError) -> str:
    """The first problems that pydantic found, each with the path of the key it is about."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [
        ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, "))))
        for problem in problems[:_PROBLEMS_SHOWN]
    ]
    left = len(problems) - len(shown)
    return "; ".join(shown) + (f"; and {left} more" if left else "")


def short_number(value: float | None, digits: int = 4) -> str:
    """A figure for people: `digits` significant digits (as many decimals from 0.01 to 1, where figures stand in columns
    of their like), thousands grouped, an exponent only far from one."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size = abs(value)
    if size and not 1e-4 <= size < 1e12:
        return f"{value:.{digits - 1}e}"
    leading = math.floor(math.log10(size)) if size else digits
    decimals = max(0, digits if -2 <= leading < 0 else digits - 1 - leading)
    return f"{value:,.{decimals}f}" if size >= 1000 else f"{value:.{decimals}f}"


def size_text(size: int) -> str:
    """Bytes for people, in powers of 1000."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:,.1f} {unit}"
    return f"{size} bytes"
