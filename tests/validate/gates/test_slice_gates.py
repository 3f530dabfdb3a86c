"""Gates that take many slices as one question: did some slice get worse?"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from scipy import stats

from limbeck.errors import InputError
from limbeck.validate.gates.applying import apply_gates
from limbeck.validate.records.report import Candidate, Gate, GateResult, Metric, Report, Slice

GATE = Gate(metric="accuracy_difference", min=-0.02, slice="*", correction="holm")


def part(name: str, value: float, half: float | None = 0.05, count: int = 100, **more: Any) -> Slice:
    ends = {} if half is None else {"low": value - half, "high": value + half}
    metric = Metric(name="accuracy_difference", value=value, count=count, higher_is_better=True, description="", **ends)
    return Slice(name=name, kind="column", count=count, metrics=[metric], **more)


def report(*slices: Slice, name: str = "a") -> Report:
    candidate = Candidate(name=name, kind="artifact", backend="onnx", precision="fp32", path="out", slices=list(slices))
    return Report(kind="validation", title="t", created="", command="", candidates=[candidate])


def judged(*slices: Slice, gate: Gate = GATE) -> GateResult:
    (result,) = apply_gates(report(*slices), [gate])
    return result


def test_one_slice_that_misses_by_itself_is_an_alarm_only_when_it_would_be_among_many() -> None:
    unlucky = part("unlucky", -0.072)  # its interval ends at -0.022
    alone = Gate(metric="accuracy_difference", min=-0.02, slice="*")
    assert [each.verdict for each in apply_gates(report(unlucky), [alone])] == ["fail"]
    assert judged(unlucky).verdict == "fail"
    fine = [part(f"fine {number}", 0.01, 0.02) for number in range(9)]
    together = judged(unlucky, *fine)
    assert together.verdict == "pass" and together.slice == "*"
    assert "None of 10 slices" in together.reason and "unlucky -0.0720 (95%" in together.reason
    assert (together.observed, together.gate) == (-0.072, GATE)


def test_a_slice_that_is_lost_is_named_with_its_adjusted_p_value() -> None:
    result = judged(part("lost", -0.15), *(part(f"fine {number}", 0.0) for number in range(9)))
    p = 10 * stats.norm.sf(0.13 / 0.05 * stats.norm.ppf(0.975))
    assert result.verdict == "fail"
    assert "1 of 10 slices shown to be below -0.02" in result.reason
    assert f"lost -0.1500 (95% interval -0.2000 to -0.1000), adjusted p {float(f'{p:.2g}')}"[:60] in result.reason
    assert result.asked == "accuracy_difference at least -0.02 on every one of *"


def test_an_upper_limit_is_missed_above_it() -> None:
    gate = Gate(metric="accuracy_difference", max=0.02, slice="*", correction="holm")
    assert judged(part("up", 0.2), part("down", -0.3), gate=gate).verdict == "fail"
    assert judged(part("down", -0.3), gate=gate).verdict == "pass"


def test_a_tighter_limit_never_betters_the_verdict() -> None:
    slices = [part("a", -0.08), part("b", 0.01), part("c", -0.02)]
    verdicts = [judged(*slices, gate=GATE.model_copy(update={"min": limit})).verdict for limit in (-0.1, -0.02, 0, 0.1)]
    assert verdicts == ["pass", "pass", "fail", "fail"]


def test_slices_with_few_examples_are_left_out_and_said() -> None:
    result = judged(part("few", -0.9, 0.1, count=29), part("enough", 0.0))
    assert result.verdict == "pass" and "Too few examples to be judged by: few." in result.reason
    assert judged(part("few", -0.9, 0.1, count=29)).verdict == "inconclusive"


def test_a_point_is_certain_and_a_missing_figure_fails() -> None:
    assert judged(part("identical", 0.0, 0.0), part("b", 0.0)).verdict == "pass"
    assert judged(part("gone", -0.5, 0.0), part("b", 0.0)).verdict == "fail"
    assert judged(part("broken", float("nan"), None)).verdict == "fail"
    with pytest.raises(InputError, match="on pointlike that metric has no interval"):
        judged(part("pointlike", 0.0, None))


def test_relative_to_another_release_it_is_hindered_as_a_whole() -> None:
    gate = Gate.model_validate(
        {"metric": "accuracy_difference", "relative_to": "previous", "as": "difference", "min": -0.01, "slice": "*",
         "correction": "holm"}
    )  # fmt: skip
    old, new = report(part("a", 0.0), part("b", 0.0)), report(part("a", -0.4), part("b", 0.0))
    (same,) = apply_gates(new, [gate], old)
    assert same.verdict == "fail"
    (other,) = apply_gates(new, [gate], old.model_copy(update={"data": ["y: 9 rows, fingerprint 02cd"]}))
    assert (other.verdict, other.hindrance) == ("inconclusive", "other data")


def test_every_candidate_has_one_verdict() -> None:
    both = report(part("a", 0.0), part("b", 0.0))
    both.candidates = [*both.candidates, both.candidates[0].model_copy(update={"name": "second"})]
    assert [(each.candidate, each.slice) for each in apply_gates(both, [GATE])] == [("a", "*"), ("second", "*")]


@pytest.mark.parametrize("given", [{"min": 0.1}, {"slice": "*", "min": 0.1, "max": 0.2}])
def test_a_correction_is_for_one_limit_on_slices(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="which is for one limit, min or max, on many slices"):
        Gate(metric="accuracy", correction="holm", **given)
