"""Gates: limits read from YAML, and the verdict that statistics allow on each.

A metric with a 95% interval passes when its whole interval is on the right side of the limit, fails when its whole
interval is on the wrong side, and is inconclusive otherwise: a point against a threshold would be a coin toss there.
Tightening a gate can therefore only ever make its verdict worse.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import GateFailed, GateInconclusive, InputError
from .relative import References, compare
from .report import (
    Candidate,
    Gate,
    GateResult,
    Metric,
    Report,
    Slice,
    Verdict,
    describe_problems,
    exact_number,
    short_number,
)
from .slice_gates import on_slice, slices_of

__all__ = ["Gate", "GateResult", "apply_gates", "judge", "load_gates", "raise_for_verdict"]

_KEYS = [field.alias or name for name, field in Gate.model_fields.items()]
_EXAMPLE = "A gate looks like: {metric: spearman_kept, candidate: '*', min: 0.98, why: search quality}."
_HOPELESS = 1000  # times as many examples: beyond this "collect more data" is no advice


def load_gates(path: Path) -> list[Gate]:
    """Read gates from a YAML file: a list, or a mapping with the one key `gates`.

    Raises:
        InputError: the file is missing or is not YAML, or a gate is not one; the message has the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node, value = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.", "Give the path of a YAML file of gates.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that is none
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.", _EXAMPLE) from error
    _refuse_repeated_keys(path, node)
    if isinstance(value, dict):
        if set(value) != {"gates"}:
            unknown = ", ".join(repr(key) for key in value if key != "gates") or "nothing"
            raise InputError(f"{path} has {unknown} at its top; the only valid key is 'gates'.", _EXAMPLE)
        node, value = _value_of(node, "gates"), value["gates"]
    if not isinstance(value, list) or not value or not isinstance(node, yaml.SequenceNode):
        raise InputError(f"{path} holds no list of gates.", _EXAMPLE)
    return [
        _gate(item, f"{path}, line {child.start_mark.line + 1}") for item, child in zip(value, node.value, strict=True)
    ]


def _value_of(node: Any, key: str) -> Any:
    return next((value for name, value in node.value if name.value == key), None)


def _refuse_repeated_keys(path: Path, node: Any) -> None:
    """YAML keeps the last of two equal keys, which would drop a limit without a word."""
    if isinstance(node, yaml.MappingNode):
        seen = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, child in node.value:
            if isinstance(key, yaml.ScalarNode) and seen[key.value] > 1:
                raise InputError(f"{path}, line {key.start_mark.line + 1}: the key {key.value!r} is given twice.")
            _refuse_repeated_keys(path, child)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_repeated_keys(path, child)


def _gate(item: Any, where: str) -> Gate:
    if not isinstance(item, dict):
        raise InputError(f"{where}: a gate is a mapping with the keys {', '.join(_KEYS)}, not {item!r}.", _EXAMPLE)
    for key in item:
        if key not in _KEYS:
            raise InputError(f"{where}: {key!r} is not a key of a gate; valid keys are {', '.join(_KEYS)}.", _EXAMPLE)
    try:
        return Gate.model_validate(item)
    except ValidationError as error:
        raise InputError(f"{where}: {describe_problems(error)}.", _EXAMPLE) from error


def apply_gates(report: Report, gates: Sequence[Gate], previous: Report | None = None) -> list[GateResult]:
    """Hold every gate against every candidate that its glob matches and that has its metric; the teacher is never a
    candidate. Results are in the order of the gates.

    Args:
        previous: the last release's report, for gates that are relative to it.

    Raises:
        InputError: a gate that would hold nothing: its glob matches no candidate, or none that has its metric; or one
            that is relative to what is not there.
    """
    gated = [candidate for candidate in report.candidates if not candidate.baseline]
    references = References(report, previous)
    results = []
    for gate in gates:
        matching = _matching(gate, gated)
        if gate.slice is None:
            results += [_judge(gate, item, metric, references) for item, metric in _with_metric(gate, matching)]
            continue
        for candidate, part, metric in slices_of(gate, matching):
            results.append(on_slice(_judge(gate, candidate, metric, references, part), part))
    return results


def _matching(gate: Gate, candidates: Sequence[Candidate]) -> list[Candidate]:
    # a name may hold glob characters itself ("onnx[fp32]"): an equal name always matches
    found = [item for item in candidates if item.name == gate.candidate or fnmatchcase(item.name, gate.candidate)]
    if not found:
        names = ", ".join(repr(item.name) for item in candidates) or "none"
        raise InputError(
            f"The gate on {gate.metric} names {gate.candidate!r}, which matches no candidate. Candidates: {names}.",
            "Name one of them, or a glob such as '*'. The teacher is never gated.",
        )
    return found


def _with_metric(gate: Gate, candidates: Sequence[Candidate]) -> list[tuple[Candidate, Metric]]:
    found = [(candidate, metric) for candidate in candidates if (metric := candidate.metric(gate.metric))]
    if not found:
        names = sorted({metric.name for candidate in candidates for metric in candidate.metrics})
        nearest = difflib.get_close_matches(gate.metric, names, n=3, cutoff=0.5)
        listed = f"Nearest: {', '.join(nearest)}" if nearest else f"Measured: {', '.join(names) or 'nothing'}"
        raise InputError(
            f"The gate on {gate.metric!r} holds nothing: no candidate that {gate.candidate!r} matches has that metric. "
            f"{listed}.",
            "Mend the gate's metric, or measure it: limbeck validate and bench say what they measure.",
        )
    return found


def _judge(
    gate: Gate, candidate: Candidate, metric: Metric, references: References, part: Slice | None = None
) -> GateResult:
    """One gate on a metric of the whole, or of a slice."""
    if gate.relative_to is None:
        return judge(gate, candidate.name, metric)
    compared = compare(gate, candidate, metric, references, part)
    limits = gate.model_copy(update={"relative_to": None, "as_": "ratio"})  # said of the ratio or difference itself
    result = judge(limits, candidate.name, compared.metric)
    verdict, said = result.verdict, f"{compared.lead} {result.reason}"
    if compared.hindrance and math.isfinite(metric.value):
        verdict = "inconclusive"
        said = f"{compared.lead} nothing can be said of it, since the previous was measured on {compared.hindrance}."
    return result.model_copy(
        update={"gate": gate, "verdict": verdict, "reason": " ".join(filter(None, [said, compared.note]))}
    )


def judge(gate: Gate, candidate: str, metric: Metric) -> GateResult:
    """The verdict of one gate on one metric, whatever the gate is relative to. A missing end of the interval is
    unbounded; without either end the value itself is compared; a value that is not finite always fails."""
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
    return GateResult(
        gate=gate,
        candidate=candidate,
        observed=metric.value,
        low=metric.low,
        high=metric.high,
        verdict=verdict,
        reason=reason,
    )


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
    """A rough count of the examples that would decide: the interval's half shrinks with the square root of them."""
    factor = max(_growth(limit, metric) for limit in (gate.min, gate.max) if limit is not None)
    if not math.isfinite(factor) or factor > _HOPELESS:
        return "it lies so near the limit that more examples are unlikely to decide"
    if metric.count is None:
        return f"about {short_number(max(factor, 1.1), 2)} times as many examples would decide"
    more = max(1, math.ceil(metric.count * (factor - 1)))
    rounded = round(more, -max(0, len(str(more)) - 2))
    return f"about {rounded:,} more examples (there are {metric.count:,}) would decide"


def _growth(limit: float, metric: Metric) -> float:
    """How many times as many examples would move the interval off `limit`; 1 when it is off already."""
    distance = abs(metric.value - limit)
    end = metric.low if metric.value > limit else metric.high
    if end is None or not distance:
        return math.inf
    ratio = abs(metric.value - end) / distance
    return max(1.0, ratio * ratio)  # a product overflows to infinity, where a power would raise


def raise_for_verdict(report: Report) -> None:
    """Turn what checks and gates said into the exit of a command; returns when all passed.

    Raises:
        GateFailed: at least one check or gate failed.
        GateInconclusive: none failed, and at least one gate cannot be decided.
    """
    failed = [
        f"{check.name} of {candidate.name}: {check.detail}." for candidate, check in report.checks() if not check.passed
    ]
    failed += [_said(result) for result in report.gates if result.verdict == "fail"]
    if failed:
        raise GateFailed(
            f"{_counted(failed)} failed. {' '.join(failed)}",
            "Do not release this candidate; the report says where the quality or time went.",
        )
    undecided = [_said(result) for result in report.gates if result.verdict == "inconclusive"]
    if undecided:
        raise GateInconclusive(
            f"{_counted(undecided)} cannot be decided. {' '.join(undecided)}",
            "Validate on more examples, or move the limit.",
        )


def _said(result: GateResult) -> str:
    """Its name: what was observed stands in the table above the error, and in the report."""
    return f"{result.gate.metric} of {result.candidate}{f' on {result.slice}' if result.slice else ''}."


def _counted(lines: list[str]) -> str:
    return "1 gate or check" if len(lines) == 1 else f"{len(lines)} gates and checks"
