"""Gates on figures of LoadGen's: what its own verdict on the test allows to be said."""

from __future__ import annotations

from ..records.performance import Scenario
from ..records.report import Candidate, GateResult


def on_scenario(result: GateResult, candidate: Candidate) -> GateResult:
    """The verdict, as far as the figure is a scenario's: of a test with too few queries it is `inconclusive` at best,
    and a rate whose bound was missed passes no gate."""
    scenario = _of(result.gate.metric, candidate)
    if scenario is None or scenario.validity == "valid" or result.verdict == "fail":
        return result
    if scenario.validity == "undecided":
        reason = f"{result.reason} But LoadGen calls the test INVALID: {scenario.reason}."
        return result.model_copy(update={"verdict": "inconclusive", "reason": reason})
    if not result.gate.metric.endswith("_per_second"):
        return result  # a latency is what it is, whatever bound was asked of it
    reason = f"At {scenario.target_qps:g} queries a second the bound was missed: {scenario.reason}."
    return result.model_copy(update={"verdict": "fail", "reason": reason})


def _of(metric: str, candidate: Candidate) -> Scenario | None:
    return next((each for each in candidate.scenarios if metric.startswith(f"{each.name}_")), None)
