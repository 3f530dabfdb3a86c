"""Gates on slices: which slices a gate means, and what their size allows to be said."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..errors import InputError
from .relative import nearest_first
from .report import Candidate, Gate, GateResult, Metric, Slice


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
