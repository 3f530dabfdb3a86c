"""The verdict that statistics allow on a metric.

A metric with a 95% interval passes when its whole interval is on the right side of the limit, fails when its whole
interval is on the wrong side, and is inconclusive otherwise: a point against a threshold would be a coin toss there.
Tightening a gate can therefore only ever make its verdict worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..records.report import Gate, GateResult, Metric, Verdict, exact_number, short_number

_HOPELESS = 1000  # times as many examples: beyond this "collect more data" is no advice
_POWER = ((1.959964 + 0.841621) / 1.959964) ** 2
_EQUAL = {"_difference": 0.0, "_kept": 1.0, "_ratio": 1.0}
"""The value of metrics of such names where candidate and teacher are equally good."""


@dataclass(frozen=True)
class Standing:
    """What a figure that compares is to (`teacher` or `previous`), and its value where both are equally good."""

    to: Literal["teacher", "previous"]
    equal: float


def judge(gate: Gate, candidate: str, metric: Metric, standing: Standing | None = None) -> GateResult:
    """The verdict of one gate on one metric, whatever the gate is relative to. A missing end of the interval is
    unbounded; without either end the value itself is compared; a value that is not finite always fails.

    Args:
        standing: what the metric compares with, where its name does not say it.
    """
    point = metric.low is None and metric.high is None
    low = metric.value if point else -math.inf if metric.low is None else metric.low
    high = metric.value if point else math.inf if metric.high is None else metric.high
    # judged on the value as well, which an interval that is not centred on it may leave out
    best, worst = max(high, metric.value), min(low, metric.value)
    misses_min = gate.min is not None and best < gate.min
    misses_max = gate.max is not None and worst > gate.max
    keeps_min = gate.min is None or worst >= gate.min
    keeps_max = gate.max is None or best <= gate.max
    verdict: Verdict
    if not math.isfinite(metric.value):
        verdict, reason = "fail", f"{_show(metric, gate)} is no figure that can be {gate.limits}."
    elif misses_min or misses_max:
        verdict, reason = "fail", f"{_show(metric, gate)} is not {gate.limits}."
    elif keeps_min and keeps_max:
        verdict, reason = "pass", f"{_show(metric, gate)} is {gate.limits}."
    else:
        verdict = "inconclusive"
        reason = f"{_show(metric, gate)} may or may not be {gate.limits}; {_examples_to_decide(gate, metric)}."
    in_words = _non_inferiority(gate, metric, standing or _standing_of(metric.name), verdict)
    return GateResult(
        gate=gate,
        candidate=candidate,
        observed=metric.value,
        low=metric.low,
        high=metric.high,
        verdict=verdict,
        reason=" ".join(filter(None, [reason, in_words])),
    )


def _standing_of(name: str) -> Standing | None:
    """Metrics that compare with the teacher say so at the end of their names: `accuracy_difference`."""
    ending = next((ending for ending in _EQUAL if name.endswith(ending)), None)
    return Standing("teacher", _EQUAL[ending]) if ending else None


def _non_inferiority(gate: Gate, metric: Metric, standing: Standing | None, verdict: Verdict) -> str:
    """The verdict in the words of a non-inferiority test, where the limit allows a loss: the margin. A 95% interval
    that keeps clear of it is a test at a one-sided level of 2.5 %."""
    limit = gate.min if metric.higher_is_better else gate.max
    other = gate.max if metric.higher_is_better else gate.min
    if standing is None or limit is None or other is not None or (metric.low is None and metric.high is None):
        return ""
    margin = (standing.equal - limit) * (1 if metric.higher_is_better else -1)
    if margin <= 0 or not math.isfinite(metric.value):  # it asks for a gain
        return ""
    at = f"a margin of {exact_number(float(f'{margin:.12g}'))}"  # 1 - 0.95 is 0.05, and not 0.050000000000000044
    reference = {"teacher": "the teacher", "previous": "the last release"}[standing.to]
    return {
        "pass": f"Non-inferior to {reference} at {at} (one-sided level 2.5 %).",
        "fail": f"Inferior to {reference} by more than {at} (one-sided level 2.5 %).",
        "inconclusive": f"Non-inferiority to {reference} at {at} is not shown.",
    }[verdict]


def _show(metric: Metric, gate: Gate) -> str:
    unit = f" {metric.unit}" if metric.unit else ""
    value = _apart(metric.value, gate) + unit
    if metric.low is None and metric.high is None:
        return value
    return f"{value} (95% interval {_apart(metric.low, gate)} to {_apart(metric.high, gate)})"


def _apart(value: float | None, gate: Gate) -> str:
    """The value with as many digits as tell it from the limits: "0.95 is not at least 0.95" helps nobody."""
    limits = (gate.min, gate.max)
    if value is None or value in limits or not math.isfinite(value):
        return short_number(value)
    texts = (short_number(value, digits) for digits in range(4, 16))
    return next((text for text in texts if float(text.replace(",", "")) not in limits), exact_number(value))


def _examples_to_decide(gate: Gate, metric: Metric) -> str:
    """A rough count of the examples that would decide four times in five, should the true value be the one observed."""
    factor = max(_growth(limit, metric) for limit in (gate.min, gate.max) if limit is not None)
    if not math.isfinite(factor) or factor > _HOPELESS:
        return "it lies so near the limit that more examples are unlikely to decide"
    if metric.count is None:
        return f"about {short_number(max(factor, 1.1), 2)} times as many examples would decide"
    more = max(1, math.ceil(metric.count * (factor - 1)))
    rounded = round(more, -max(0, len(str(more)) - 2))
    return f"about {rounded:,} more examples (there are {metric.count:,}) would decide"


def _growth(limit: float, metric: Metric) -> float:
    """How many times as many examples would keep the interval off `limit` four times in five; 1 when it is off already.

    An interval's half shrinks with the square root of the examples. Shrunk until it just touched the limit, it would
    decide every other time only, since the value moves too: the distance has to be that of both, z(0.975) + z(0.8)
    standard errors (Julious, "Sample sizes for clinical trials with normal data", Statistics in Medicine 23 (2004)).
    """
    distance = abs(metric.value - limit)
    end = metric.low if metric.value > limit else metric.high
    if end is None or not distance:
        return math.inf
    ratio = abs(metric.value - end) / distance
    return max(1.0, _POWER * ratio * ratio) if ratio > 1.0 else 1.0  # a product overflows to infinity; a power raises
