"""Gates on slices: which slices a gate means, what their size allows to be said, and many of them as one question."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

from scipy import stats

from ...errors import InputError
from ..records.report import Candidate, Gate, GateResult, Metric, Slice, Verdict, exact_number, short_number
from ..statistics.paired_tests import holm_adjusted
from .relative import nearest_first

_LEVEL = 0.025
"""One-sided, as that of a limit that a 95% interval has to keep."""
_TOLD = 5
"""Slices that a reason names."""


@dataclass(frozen=True)
class Judged:
    """What a gate says of one slice by itself."""

    candidate: str
    part: Slice
    result: GateResult


def slices_of(gate: Gate, candidates: Sequence[Candidate]) -> list[tuple[Candidate, Slice, Metric]]:
    """Every slice of the candidates that the gate's glob matches, with the gate's metric on it.

    Raises:
        InputError: the gate would hold nothing: its glob matches no slice, or none that has its metric.
    """
    matching = [(candidate, part) for candidate in candidates for part in candidate.slices if _means(gate, part.name)]
    if not matching:
        names = [part.name for candidate in candidates for part in candidate.slices]
        raise InputError(
            f"The gate on {gate.metric} names the slice {gate.slice!r}, which matches none. "
            f"Slices, nearest first: {nearest_first(gate.slice or '', names)}.",
            "Name one, or a glob such as 'length*'. Slices come from --slices, --slice and --slice-by of validate.",
        )
    found = [(candidate, part, metric) for candidate, part in matching if (metric := part.metric(gate.metric))]
    if not found:
        names = [metric.name for _, part in matching for metric in part.metrics]
        raise InputError(
            f"The gate on {gate.metric!r} holds nothing: no slice that {gate.slice!r} matches has that metric. "
            f"Measured there, nearest first: {nearest_first(gate.metric, names)}.",
            "Mend the gate's metric.",
        )
    return found


def _means(gate: Gate, name: str) -> bool:
    # a name may hold glob characters itself ("topic=[x]"): an equal name always matches
    return name == gate.slice or fnmatchcase(name, gate.slice or "")


def on_slice(result: GateResult, part: Slice) -> GateResult:
    """The verdict as one on a slice: with too few examples it is `inconclusive` at best."""
    if not (part.too_small and result.verdict == "pass"):
        return result.model_copy(update={"slice": part.name})
    reason = f"{result.reason} But {part.count} examples are too few to judge a slice by."
    return result.model_copy(update={"slice": part.name, "reason": reason, "verdict": "inconclusive"})


def together(gate: Gate, judged: Sequence[Judged]) -> Iterator[GateResult]:
    """One verdict a candidate on all the slices of a gate with `correction: holm`: did some slice get worse?

    It fails when at least one slice is shown to miss the limit, at a one-sided level of 2.5 % for all of them together
    (Holm 1979), and passes otherwise: it is an alarm that does not cry wolf over many slices, and no proof that each of
    them keeps the limit, for which every one is gated by itself. Slices with too few examples are left out; it is
    inconclusive when no others are there.

    Raises:
        InputError: a slice on which the metric has no interval.
    """
    for _, of_one in groupby(judged, key=lambda each: each.candidate):
        everywhere = list(of_one)
        large = [each for each in everywhere if not each.part.too_small]
        small = [each.part.name for each in everywhere if each.part.too_small]
        left_out = f"Too few examples to be judged by: {', '.join(small)}." if small else ""
        hindered = next((each.result for each in everywhere if each.result.hindrance), None)
        if hindered:
            yield hindered.model_copy(update={"slice": gate.slice})
        elif not large:
            first = everywhere[0].result
            yield first.model_copy(update={"slice": gate.slice, "verdict": "inconclusive", "reason": left_out})
        else:
            yield _all_of(gate, large, left_out)


def _all_of(gate: Gate, large: list[Judged], left_out: str) -> GateResult:
    p_values = [_p_value(gate, each) for each in large]
    found = sorted(zip(holm_adjusted(p_values), p_values, large, strict=True), key=lambda each: each[:2])
    missed = [(each, adjusted) for adjusted, _, each in found if adjusted < _LEVEL]
    side, limit = ("below", gate.min) if gate.max is None else ("above", gate.max)
    assert limit is not None
    limits = f"{side} {exact_number(limit)}"
    by = "by Holm's method at a one-sided level of 2.5 %"
    verdict: Verdict = "fail" if missed else "pass"
    if missed:
        told = "; ".join(
            f"{_figure(each)}, adjusted p {short_number(adjusted, 2)}" for each, adjusted in missed[:_TOLD]
        )
        reason = f"{len(missed)} of {len(large)} slices shown to be {limits} {by}: {told}."
    else:
        reason = f"None of {len(large)} slices is shown to be {limits} {by}. Nearest to it: {_figure(found[0][2])}."
    update = {
        "gate": gate, "slice": gate.slice, "verdict": verdict, "reason": " ".join(filter(None, [reason, left_out]))
    }  # fmt: skip
    return found[0][2].result.model_copy(update=update)


def _figure(each: Judged) -> str:
    value, low, high = (short_number(end) for end in (each.result.observed, each.result.low, each.result.high))
    return f"{each.part.name} {value} (95% interval {low} to {high})"


def _p_value(gate: Gate, each: Judged) -> float:
    """How likely a figure at least so far on the wrong side of the limit is, were the true value at it: by the normal
    distribution whose 95% interval reaches as far that way as the figure's does."""
    value, limit = each.result.observed, gate.min if gate.max is None else gate.max
    assert limit is not None
    end = each.result.high if gate.max is None else each.result.low
    if value is None or not math.isfinite(value):
        return 0.0
    if end is None:
        raise InputError(
            f"The gate on {gate.metric} has correction: {gate.correction}, and on {each.part.name} that metric has no "
            "interval to reckon with.",
            "Gate a metric that has one, or leave correction out.",
        )
    reach, beyond = abs(end - value), (limit - value) * (1 if gate.max is None else -1)
    if not reach:
        return 0.0 if beyond > 0 else 1.0
    return float(stats.norm.sf(stats.norm.ppf(0.975) * beyond / reach))
