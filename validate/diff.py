"""What changed from one report to the next: figures, checks and verdicts of the same candidates.

A figure with a 95% interval on both sides is better or worse when the interval of the difference excludes 0, and shows
no clear change otherwise. Two reports keep no values by example, so the two intervals are treated as independent and
added in square (`statistics.mover`: Newcombe 1998; Zou and Donner 2008). Where an interval is lacking, figures are told
as changed or equal, which judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from .comparability import Comparability, Difference
from .records.report import Candidate, Latency, Metric, Report, Slice, Verdict, short_number
from .statistics import mover

Meaning = Literal["better", "worse", "no clear change", "changed", "equal", "not comparable"]

_BYTES_PER_MB = 1_000_000
_IN_LATENCIES = ("latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "speedup_p50")
_RANKS = {"fail": 0, "inconclusive": 1, "pass": 2}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Value(_Record):
    """A figure of one report, with the ends of its 95% interval where known."""

    value: float
    low: float | None = None
    high: float | None = None


class FigureChange(_Record):
    """One figure in both reports. `change` is new minus old in `unit`, with its 95% interval where both have one; none
    where `meaning` is `not comparable`, for the reason that `why` gives."""

    name: str
    unit: str = ""
    old: Value
    new: Value
    change: Value | None = None
    meaning: Meaning
    why: str | None = None


class VerdictChange(_Record):
    """What a check or a gate said in both reports."""

    name: str
    old: Verdict
    new: Verdict
    meaning: Meaning


class CandidateDiff(_Record):
    """One candidate in both reports; `only_old` and `only_new` name, with their values, what one of them lacks."""

    name: str
    old_name: str
    note: str | None = None
    figures: list[FigureChange]
    verdicts: list[VerdictChange]
    only_old: list[str]
    only_new: list[str]

    @property
    def rows(self) -> list[FigureChange | VerdictChange]:
        """Figures, then verdicts."""
        return [*self.figures, *self.verdicts]


class Side(_Record):
    """A report that is compared."""

    title: str
    created: str
    verdict: Verdict | None


class ReportDiff(_Record):
    """Everything that differs between two reports; `differences` are about what was measured on, not what was found."""

    old: Side
    new: Side
    differences: list[Difference]
    candidates: list[CandidateDiff]
    only_old: list[str]
    only_new: list[str]

    def count(self, *meanings: Meaning) -> int:
        """How many figures and verdicts of all candidates have one of these meanings."""
        return sum(row.meaning in meanings for item in self.candidates for row in item.rows)


@dataclass(frozen=True)
class _Figure:
    """A figure of one candidate. `metric` is the metric that says what it depends on, `None` for a time whose name has
    the sizes of its call; `higher_is_better` is `None` where neither is better in itself."""

    value: Value
    unit: str
    metric: str | None
    higher_is_better: bool | None
    part: Slice | None = None
    """The slice that it was measured on, where it is not the whole."""

    @property
    def text(self) -> str:
        return f"{short_number(self.value.value)} {self.unit}".rstrip()


def compare_reports(old: Report, new: Report) -> ReportDiff:
    """Match candidates by name (and those that are left over, when it is one on each side), figures by name, latencies
    by batch size, sequence length and threads, checks and gates by name."""
    comparability = Comparability(old, new)
    pairs, only_old, only_new = _matched(old, new)
    return ReportDiff(
        old=Side(title=old.title, created=old.created, verdict=old.verdict),
        new=Side(title=new.title, created=new.created, verdict=new.verdict),
        differences=comparability.differences(),
        candidates=[_candidate_diff(before, after, comparability) for before, after in pairs],
        only_old=only_old,
        only_new=only_new,
    )


def _matched(old: Report, new: Report) -> tuple[list[tuple[Candidate, Candidate]], list[str], list[str]]:
    """Candidates of both, in the order of the new report, teachers first; and the names of those that one has alone."""
    pairs = [(old.teacher, new.teacher)] if old.teacher and new.teacher else []
    left, found = {item.name: item for item in old.candidates}, {item.name: item for item in new.candidates}
    pairs += [(left.pop(name), found.pop(name)) for name in list(found) if name in left]
    if len(left) == len(found) == 1:
        pairs.append((left.popitem()[1], found.popitem()[1]))
    teachers = [[report.teacher.name] if report.teacher and not both else [] for report, both in
                ((old, new.teacher), (new, old.teacher))]  # fmt: skip
    return pairs, [*teachers[0], *left], [*teachers[1], *found]


def _candidate_diff(old: Candidate, new: Candidate, comparability: Comparability) -> CandidateDiff:
    timed, sized = bool(old.latencies and new.latencies), old.size_bytes is not None and new.size_bytes is not None
    restated = {*(_IN_LATENCIES if timed else ()), *(("size_mb",) if sized else ())}
    before, after = ({name: figure for name, figure in _figures(side) if name not in restated} for side in (old, new))
    figures = [
        _figure_change(name, before[name], figure, _hindrance(figure, old, new, comparability))
        for name, figure in after.items()
        if name in before
    ]
    said, says = _verdicts(comparability.old, old), _verdicts(comparability.new, new)
    renamed = old.name != new.name
    return CandidateDiff(
        name=new.name,
        old_name=old.name,
        note=f"{old.name} in the old report; compared because it is the only one left in each." if renamed else None,
        figures=figures,
        verdicts=[_verdict_change(name, said[name], verdict) for name, verdict in says.items() if name in said],
        only_old=[*_alone(before, after), *(f"{name}: {said[name]}" for name in said if name not in says)],
        only_new=[*_alone(after, before), *(f"{name}: {says[name]}" for name in says if name not in said)],
    )


def _hindrance(figure: _Figure, old: Candidate, new: Candidate, comparability: Comparability) -> str | None:
    if figure.metric is None:
        return comparability.other_machine
    return comparability.hindrance(figure.metric, old, new, figure.part)


def _alone(figures: dict[str, _Figure], others: dict[str, _Figure]) -> list[str]:
    return [f"{name}: {figure.text}" for name, figure in figures.items() if name not in others]


def _figures(candidate: Candidate) -> Iterator[tuple[str, _Figure]]:
    """Quality first, then times, then sizes; each under a name that says all it is matched by."""
    for metric in candidate.metrics:
        yield metric.name, _of_metric(metric)
    for part in candidate.slices:
        for metric in part.metrics:
            yield f"{metric.name} on {part.name}", _of_metric(metric, part)
    for latency in candidate.latencies:
        yield from _of_latency(latency)
    if candidate.size_bytes is not None:
        yield "size", _Figure(Value(value=candidate.size_bytes / _BYTES_PER_MB), "MB", "size_mb", False)
    if candidate.parameters is not None:
        yield "parameters", _Figure(Value(value=candidate.parameters), "", "parameters", None)


def _of_metric(metric: Metric, part: Slice | None = None) -> _Figure:
    value = Value(value=metric.value, low=metric.low, high=metric.high)
    return _Figure(value, metric.unit, metric.name, metric.higher_is_better, part)


def _of_latency(latency: Latency) -> Iterator[tuple[str, _Figure]]:
    call = f"{latency.batch_size} x {latency.sequence_length} tokens, {latency.threads} threads"
    for name in ("p50", "p90", "p99"):
        time = Value(value=getattr(latency, f"{name}_ms"))
        yield f"latency {name}, {call}", _Figure(time, "ms", None, False)
    if latency.speedup is not None:
        speedup = Value(value=latency.speedup, low=latency.speedup_low, high=latency.speedup_high)
        yield f"speed-up, {call}", _Figure(speedup, "x", None, True)


def _figure_change(name: str, old: _Figure, new: _Figure, hindrance: str | None) -> FigureChange:
    if (old.unit, old.higher_is_better) != (new.unit, new.higher_is_better):
        hindrance = "another unit or direction"
    if hindrance:
        return FigureChange(
            name=name, unit=new.unit, old=old.value, new=new.value, meaning="not comparable", why=hindrance
        )
    change, meaning = _change(old.value, new.value, bool(new.higher_is_better))
    return FigureChange(name=name, unit=new.unit, old=old.value, new=new.value, change=change, meaning=meaning)


def _change(old: Value, new: Value, higher_is_better: bool) -> tuple[Value | None, Meaning]:
    """What an interval of the difference says; without intervals on both sides, or without a finite figure, nothing
    more than whether the values are the same."""
    same: Meaning = (
        "equal" if old.value == new.value or (math.isnan(old.value) and math.isnan(new.value)) else "changed"
    )
    if not (math.isfinite(old.value) and math.isfinite(new.value)):
        return None, same
    if not (_bounded(old) and _bounded(new)):
        return Value(value=new.value - old.value), same
    found = mover.difference(*(mover.estimate_of(side.value, side.low, side.high) for side in (new, old)))
    change = Value(value=found.value, low=found.low, high=found.high)
    if found.low <= 0 <= found.high:
        return change, "no clear change"
    return change, "better" if (found.low > 0) == higher_is_better else "worse"


def _bounded(value: Value) -> bool:
    return value.low is not None or value.high is not None


def _verdicts(report: Report, candidate: Candidate) -> dict[str, Verdict]:
    """What checks and gates said of a candidate, by name."""
    found: dict[str, Verdict] = {
        f"check {check.name}": "pass" if check.passed else "fail" for check in candidate.checks
    }
    gates = (result for result in report.gates if result.candidate == candidate.name)
    return found | {f"gate {result.asked}": result.verdict for result in gates}


def _verdict_change(name: str, old: Verdict, new: Verdict) -> VerdictChange:
    rise = _RANKS[new] - _RANKS[old]
    meaning: Meaning = "better" if rise > 0 else "worse" if rise < 0 else "equal"
    return VerdictChange(name=name, old=old, new=new, meaning=meaning)
