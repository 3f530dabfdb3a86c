"""Gates: limits read from YAML, held against every candidate that they mean, and what comes of the verdicts."""

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

from ...errors import GateFailed, GateInconclusive, InputError
from ..records.report import (
    Candidate,
    Gate,
    GateResult,
    Metric,
    Report,
    Slice,
    describe_problems,
)
from .judging import Standing, judge
from .relative import References, compare
from .scenarios import on_scenario
from .slices import Judged, on_slice, slices_of, together

__all__ = ["Gate", "GateResult", "apply_gates", "judge", "load_gates", "raise_for_verdict"]

_KEYS = [field.alias or name for name, field in Gate.model_fields.items()]
_EXAMPLE = "A gate looks like: {metric: spearman_kept, candidate: '*', min: 0.98, why: search quality}."


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
            results += [
                on_scenario(_judge(gate, item, metric, references), item)
                for item, metric in _with_metric(gate, matching)
            ]
            continue
        found = slices_of(gate, matching)
        on_slices = [
            Judged(candidate.name, part, _judge(gate, candidate, metric, references, part))
            for candidate, part, metric in found
        ]
        each_alone = (on_slice(each.result, each.part) for each in on_slices)
        results += together(gate, on_slices) if gate.correction else each_alone
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
    equal = 1.0 if gate.as_ == "ratio" else 0.0
    result = judge(limits, candidate.name, compared.metric, Standing(gate.relative_to, equal))
    verdict, said = result.verdict, f"{compared.lead} {result.reason}"
    if compared.hindrance and math.isfinite(metric.value):
        verdict = "inconclusive"
        said = f"{compared.lead} nothing can be said of it, since the previous was measured on {compared.hindrance}."
    return result.model_copy(
        update={
            "gate": gate,
            "verdict": verdict,
            "reason": " ".join(filter(None, [said, compared.note])),
            "hindrance": compared.hindrance,
        }
    )


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
    undecided = [result for result in report.gates if result.verdict == "inconclusive"]
    if undecided:
        named = [_said(result) for result in undecided]
        raise GateInconclusive(f"{_counted(named)} cannot be decided. {' '.join(named)}", _way_out(undecided))


def _way_out(undecided: Sequence[GateResult]) -> str:
    """What would decide gates: more examples do not where a reference was measured on something else."""
    more = "Validate on more examples, or move the limit."
    hindrances = sorted({result.hindrance for result in undecided if result.hindrance})
    if not hindrances:
        return more
    anew = f"Measure the previous release anew, as this one is measured: it was on {' and '.join(hindrances)}."
    return anew if all(result.hindrance for result in undecided) else f"{more} {anew}"


def _said(result: GateResult) -> str:
    """Its name: what was observed stands in the table above the error, and in the report."""
    return f"{result.gate.metric} of {result.candidate}{f' on {result.slice}' if result.slice else ''}."


def _counted(lines: list[str]) -> str:
    return "1 gate or check" if len(lines) == 1 else f"{len(lines)} gates and checks"
