"""Gates on slices: which slices a gate means, and what their size allows to be said."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from ..errors import InputError
from .report import Candidate, Gate, GateResult, Metric, Slice


def judge_slices(
    gate: Gate, candidates: Sequence[Candidate], judge: Callable[[Gate, str, Metric], GateResult]
) -> list[GateResult]:
    """The verdict of one gate on every slice of the candidates that its glob matches and that has its metric; on a
    slice with too few examples it is `inconclusive` at best.

    Raises:
        InputError: the gate would hold nothing: its glob matches no slice, or none that has its metric.
    """
    matching = [(candidate, part) for candidate in candidates for part in candidate.slices if _means(gate, part.name)]
    if not matching:
        names = dict.fromkeys(part.name for candidate in candidates for part in candidate.slices)
        raise InputError(
            f"The gate on {gate.metric} names the slice {gate.slice!r}, which matches none. "
            f"Slices, nearest first: {_nearest_first(gate.slice or '', names)}.",
            "Name one, or a glob such as 'length*'. Slices come from --slices, --slice and --slice-by of validate.",
        )
    found = [(candidate, part, metric) for candidate, part in matching if (metric := part.metric(gate.metric))]
    if not found:
        names = dict.fromkeys(metric.name for _, part in matching for metric in part.metrics)
        raise InputError(
            f"The gate on {gate.metric!r} holds nothing: no slice that {gate.slice!r} matches has that metric. "
            f"Measured there, nearest first: {_nearest_first(gate.metric, names)}.",
            "Mend the gate's metric.",
        )
    return [_on_slice(judge(gate, candidate.name, metric), part) for candidate, part, metric in found]


def _means(gate: Gate, name: str) -> bool:
    # a name may hold glob characters itself ("topic=[x]"): an equal name always matches
    return name == gate.slice or fnmatchcase(name, gate.slice or "")


def _nearest_first(asked: str, names: Iterable[str]) -> str:
    likeness = {name: difflib.SequenceMatcher(a=asked, b=name).ratio() for name in names}
    return ", ".join(map(repr, sorted(likeness, key=lambda name: -likeness[name]))) or "none"


def _on_slice(result: GateResult, part: Slice) -> GateResult:
    reason = f"On {part.name}: {result.reason}"
    if not (part.too_small and result.verdict == "pass"):
        return result.model_copy(update={"slice": part.name, "reason": reason})
    reason = f"{reason} But {part.count} examples are too few to judge a slice by."
    return result.model_copy(update={"slice": part.name, "reason": reason, "verdict": "inconclusive"})
