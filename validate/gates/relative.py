"""What a relative gate judges: how a metric compares with the teacher's value, or with that of the last release.

Each comparison is a metric of its own, with an interval, which is then judged as any other: it does not depend on the
gate's limits, so tightening those can only ever make the verdict worse.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...errors import InputError
from ..comparability import Comparability
from ..records.report import REFERENCE_WORDS, Candidate, Gate, Metric, Report, Slice, short_number
from ..statistics import mover

_PAIRED = {"ratio": ("_kept", "_ratio"), "difference": ("_difference",)}
"""How metrics end that compare candidate and teacher example by example (`metrics.quality`)."""


@dataclass(frozen=True)
class References:
    """What relative gates may refer to: the report that is judged, for its teacher, and the last release's."""

    report: Report
    previous: Report | None = None


@dataclass(frozen=True)
class Comparison:
    """What is judged in a metric's place. `lead` says in words what the figure is, `note` what is not in its interval,
    and `hindrance` why it may decide nothing."""

    metric: Metric
    lead: str
    note: str = ""
    hindrance: str | None = None


def check_references(gates: Iterable[Gate], previous_given: bool) -> None:
    """Say before anything is measured that a gate refers to a report which nobody gave.

    Raises:
        InputError: a gate is relative to the previous release, and its report is not given.
    """
    for gate in gates:
        if gate.relative_to == "previous" and not previous_given:
            raise InputError(
                f"The gate on {gate.metric} is relative to the previous release, whose report was not given.",
                "Give it: limbeck gate REPORT --gates FILE --previous OLD_REPORT.",
            )


def compare(
    gate: Gate, candidate: Candidate, metric: Metric, references: References, part: Slice | None = None
) -> Comparison:
    """The metric of a candidate, or of a slice of it, against what the gate is relative to.

    Raises:
        InputError: there is no such reference, or it is not a figure that a ratio can be to.
    """
    if gate.relative_to == "previous":
        return _to_previous(gate, candidate, metric, references, part)
    return _paired(gate, part or candidate) or _to_teacher(gate, part or candidate, metric, references.report)


def _paired(gate: Gate, measured: Candidate | Slice) -> Comparison | None:
    found = (measured.metric(gate.metric + ending) for ending in _PAIRED[gate.as_])
    metric = next((metric for metric in found if metric is not None), None)
    if metric is None:
        return None
    return Comparison(metric, f"By {metric.name}, which is paired with the teacher's answers:")


def _to_teacher(gate: Gate, measured: Candidate | Slice, metric: Metric, report: Report) -> Comparison:
    teacher = report.teacher if isinstance(measured, Candidate) else None  # its own record is of the whole
    own = teacher.metric(gate.metric) if teacher else None
    if metric.teacher is not None:
        reference = mover.estimate_of(metric.teacher, None, None)
    elif own is not None:
        reference = mover.estimate_of(own.value, own.low, own.high)
    else:
        known = [item.name for item in measured.metrics if item.teacher is not None]
        known += [item.name for item in (teacher.metrics if teacher else [])]
        raise InputError(
            f"The gate on {gate.metric} of {measured.name} is relative to the teacher, which has no such metric in "
            f"the report. It has {nearest_first(gate.metric, known)}.",
            "Name one of those, or gate the metric itself.",
        )
    certain = mover.has_interval(metric) and reference.low == reference.high
    note = "The teacher's own uncertainty is not in the interval." if certain else ""
    return Comparison(_compared(gate, metric, reference, metric.count), _lead(gate, metric, reference.value), note)


def _to_previous(
    gate: Gate, candidate: Candidate, metric: Metric, references: References, part: Slice | None
) -> Comparison:
    check_references([gate], references.previous is not None)
    assert references.previous is not None
    before = next((item for item in references.previous.candidates if item.name == candidate.name), None)
    if before is None:
        names = [item.name for item in references.previous.candidates]
        raise InputError(
            f"The gate on {gate.metric} of {candidate.name} is relative to the previous report, which has no such "
            f"candidate. It has {nearest_first(candidate.name, names)}.",
            "Name the gate's candidate, or give a previous report that has it.",
        )
    measured: Candidate | Slice = before if part is None else _same_slice(gate, before, part)
    old = measured.metric(gate.metric)
    if old is None:
        known = [item.name for item in measured.metrics]
        raise InputError(
            f"The gate on {gate.metric} of {candidate.name} is relative to the previous report, which has no such "
            f"metric of that candidate. It has {nearest_first(gate.metric, known)}.",
            "Name one of those, or give a previous report that has it.",
        )
    reference = mover.estimate_of(old.value, old.low, old.high)
    hindrance = Comparability(references.previous, references.report).hindrance(gate.metric, before, candidate, part)
    compared = _compared(gate, metric, reference, None)
    return Comparison(compared, _lead(gate, metric, old.value), _of_points(metric, old), hindrance)


def _same_slice(gate: Gate, before: Candidate, part: Slice) -> Slice:
    found = next((item for item in before.slices if item.name == part.name), None)
    if found is None:
        known = nearest_first(part.name, [item.name for item in before.slices])
        raise InputError(
            f"The gate on {gate.metric} on the slice {part.name} is relative to the previous report, in which "
            f"{before.name} has no such slice. It has {known}.",
            "Give a previous report that has it.",
        )
    return found


def _of_points(metric: Metric, old: Metric) -> str:
    sides = {"this": mover.has_interval(metric), "the previous": mover.has_interval(old)}
    if any(sides.values()) and not all(sides.values()):
        missing = next(side for side, known in sides.items() if not known)
        return f"The uncertainty of {missing} figure is not in the interval."
    return ""


def _compared(gate: Gate, metric: Metric, reference: mover.Estimate, count: int | None) -> Metric:
    """Ratio or difference as a metric: without an interval where neither side has one."""
    _check_reference(gate, reference.value)
    unit = metric.unit if gate.as_ == "difference" else ""
    if not math.isfinite(metric.value):
        return metric.model_copy(update={"low": None, "high": None, "unit": unit})
    own = mover.estimate_of(metric.value, metric.low, metric.high)
    found = (mover.ratio if gate.as_ == "ratio" else mover.difference)(own, reference)
    point = found.low == found.high
    ends = {"low": None, "high": None} if point else {"low": found.low, "high": found.high}
    return metric.model_copy(update={"value": found.value, "unit": unit, "count": count, **ends})


def _check_reference(gate: Gate, value: float) -> None:
    what = f"The gate on {gate.metric} compares with {_reference(gate)} {short_number(value)}"
    if not math.isfinite(value):
        raise InputError(f"{what}, which is no figure.", "Gate the metric itself, with min or max.")
    if gate.as_ == "ratio" and value <= 0:
        raise InputError(f"{what}, to which a ratio means nothing.", "Ask for the difference: as: difference.")


def _lead(gate: Gate, metric: Metric, reference: float) -> str:
    how = "over" if gate.as_ == "ratio" else "minus"
    return f"{short_number(metric.value)} {how} {_reference(gate)} {short_number(reference)}:"


def _reference(gate: Gate) -> str:
    assert gate.relative_to is not None
    return REFERENCE_WORDS[gate.relative_to]


def nearest_first(name: str, known: Sequence[str]) -> str:
    """What there is, the names most like this one first; `nothing` of nothing."""
    ordered = sorted(dict.fromkeys(known), key=lambda item: -difflib.SequenceMatcher(None, name, item).ratio())
    return ", ".join(ordered) or "nothing"
