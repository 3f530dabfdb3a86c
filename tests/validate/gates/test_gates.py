"""Gates: reading them, holding them against candidates, and the laws that their verdicts keep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import GateFailed, GateInconclusive, InputError
from limbeck.validate.gates.applying import apply_gates, judge, load_gates, raise_for_verdict
from limbeck.validate.records.report import Candidate, Check, Gate, GateResult, Metric, Report, Slice

FIGURES = st.floats(-1e6, 1e6)
RANK = {"pass": 0, "inconclusive": 1, "fail": 2}


def metric(value: float, low: float | None = None, high: float | None = None, **more: Any) -> Metric:
    words = "Share of right answers."
    return Metric(name="accuracy", value=value, low=low, high=high, higher_is_better=True, description=words, **more)


def candidate(name: str, *metrics: Metric) -> Candidate:
    return Candidate(name=name, kind="artifact", backend="onnx", precision="fp32", path="out", metrics=list(metrics))


def report(*candidates: Candidate, teacher: Candidate | None = None) -> Report:
    return Report(kind="validation", title="t", created="", command="", teacher=teacher, candidates=list(candidates))


@st.composite
def metrics(draw: st.DrawFn) -> Metric:
    low, value, high = sorted(draw(st.tuples(FIGURES, FIGURES, FIGURES)))
    return metric(
        value,
        draw(st.sampled_from([low, None])),
        draw(st.sampled_from([high, None])),
        count=draw(st.none() | st.integers(0, 9999)),
    )


@settings(max_examples=60, deadline=None)
@given(metrics(), FIGURES, st.floats(0, 1e6))
def test_tightening_a_gate_never_betters_its_verdict(observed: Metric, limit: float, by: float) -> None:
    for loose, tight in (
        (Gate(metric="accuracy", min=limit), Gate(metric="accuracy", min=limit + by)),
        (Gate(metric="accuracy", max=limit), Gate(metric="accuracy", max=limit - by)),
        (Gate(metric="accuracy", max=limit), Gate(metric="accuracy", min=limit - by, max=limit)),
    ):
        assert RANK[judge(tight, "a", observed).verdict] >= RANK[judge(loose, "a", observed).verdict]


@settings(max_examples=60, deadline=None)
@given(metrics(), FIGURES)
def test_a_verdict_is_what_the_interval_says(observed: Metric, limit: float) -> None:
    verdict = judge(Gate(metric="accuracy", min=limit), "a", observed).verdict
    if verdict == "pass":
        assert observed.value >= limit and (observed.low is None or observed.low >= limit)
    elif verdict == "fail":
        assert observed.value < limit and (observed.high is None or observed.high < limit)
    else:
        assert (observed.low, observed.high) != (None, None)


@pytest.mark.parametrize(
    ("observed", "verdict"),
    [
        (metric(0.95), "pass"),
        (metric(0.8999), "fail"),
        (metric(0.9), "pass"),
        (metric(0.95, 0.9, 0.97), "pass"),
        (metric(0.92, 0.89, 0.95), "inconclusive"),
        (metric(0.85, 0.8, 0.91), "inconclusive"),
        (metric(0.85, 0.8, 0.89), "fail"),
        (metric(float("nan")), "fail"),
        (metric(float("inf")), "fail"),
    ],
)
def test_the_whole_interval_decides(observed: Metric, verdict: str) -> None:
    assert judge(Gate(metric="accuracy", min=0.9), "a", observed).verdict == verdict


def test_the_reason_says_how_many_more_examples_decide() -> None:
    # the half below the value is 4 times its distance from the limit: 16 times the examples for the interval to touch
    # it, and (1.96 + 0.84)^2 / 1.96^2 = 2.04 times those to be clear of it four times in five
    told = judge(Gate(metric="accuracy", min=0.9), "a", metric(0.91, 0.87, 0.95, count=100)).reason
    assert "about 3,200 more examples (there are 100)" in told
    assert "33 times" in judge(Gate(metric="accuracy", min=0.9), "a", metric(0.91, 0.87, 0.95)).reason
    assert "unlikely" in judge(Gate(metric="accuracy", min=0.9), "a", metric(0.9, 0.87, 0.95, count=100)).reason


def test_the_reason_tells_value_and_limit_apart() -> None:
    assert "0.899999" in judge(Gate(metric="accuracy", min=0.9), "a", metric(0.899999)).reason


def test_a_gate_holds_every_candidate_that_has_the_metric_and_never_the_teacher() -> None:
    judged = report(
        candidate("a", metric(0.95)), candidate("b"), candidate("c", metric(0.5)), teacher=candidate("t", metric(1))
    )
    results = apply_gates(judged, [Gate(metric="accuracy", min=0.9)])
    assert [(item.candidate, item.verdict) for item in results] == [("a", "pass"), ("c", "fail")]
    assert [item.candidate for item in apply_gates(judged, [Gate(metric="accuracy", candidate="[c]", max=1)])] == ["c"]


def test_a_name_with_glob_characters_matches_itself() -> None:
    judged = report(candidate("onnx[fp32]", metric(0.95)))
    assert len(apply_gates(judged, [Gate(metric="accuracy", candidate="onnx[fp32]", min=0.9)])) == 1


def test_a_gate_that_holds_nothing_is_an_error() -> None:
    judged = report(candidate("a", metric(0.95)), teacher=candidate("t", metric(1)))
    with pytest.raises(InputError, match="Nearest: accuracy"):
        apply_gates(judged, [Gate(metric="acuracy", min=0.9)])
    with pytest.raises(InputError, match="Candidates: 'a'"):
        apply_gates(judged, [Gate(metric="accuracy", candidate="t", min=0.9)])


def test_a_gate_on_a_slice_holds_every_slice_that_it_matches() -> None:
    def part(name: str, value: float, count: int = 50) -> Slice:
        return Slice(name=name, kind="column", count=count, metrics=[metric(value)])

    a = candidate("a", metric(0.5))
    a.slices = [part("t=[x]", 0.95), part("t=y", 0.4), part("typos", 0.95, 29), part("t=few", 0.4, 29)]
    judged = report(a, candidate("b", metric(0.95)))

    def verdicts(wanted: str) -> list[tuple[str, str | None, str]]:
        results = apply_gates(judged, [Gate(metric="accuracy", slice=wanted, min=0.9)])
        return [(result.candidate, result.slice, result.verdict) for result in results]

    assert verdicts("t=[x]") == [("a", "t=[x]", "pass")]
    assert verdicts("t=?") == [("a", "t=y", "fail")]
    assert verdicts("typos") == [("a", "typos", "inconclusive")]  # 29 examples can fail a gate, never pass one
    assert verdicts("*few") == [("a", "t=few", "fail")]
    assert len(verdicts("*")) == 4
    with pytest.raises(InputError, match=r"'typo', which matches none. Slices, nearest first: typos, "):
        verdicts("typo")
    with pytest.raises(InputError, match=r"no slice that 't\*' matches has that metric.*nearest first: accuracy\."):
        apply_gates(judged, [Gate(metric="acuracy", slice="t*", min=0.9)])
    results = apply_gates(judged, [Gate(metric="accuracy", slice="typos", min=0.9)])
    with pytest.raises(GateInconclusive, match="accuracy of a on typos"):
        raise_for_verdict(judged.model_copy(update={"gates": results}))


def test_verdicts_and_failed_checks_become_errors() -> None:
    passes = judge(Gate(metric="accuracy", min=0.9), "a", metric(0.95))
    fails = judge(Gate(metric="accuracy", min=0.9), "b", metric(0.5))
    undecided = judge(Gate(metric="accuracy", min=0.9), "c", metric(0.91, 0.8, 0.95))
    judged = report(candidate("a"))
    raise_for_verdict(judged.model_copy(update={"gates": [passes]}))
    with pytest.raises(GateInconclusive, match=r"1 gate or check cannot be decided\. accuracy of c"):
        raise_for_verdict(judged.model_copy(update={"gates": [passes, undecided]}))
    with pytest.raises(GateFailed, match=r"1 gate or check failed\. accuracy of b"):
        raise_for_verdict(judged.model_copy(update={"gates": [undecided, fails, passes]}))
    broken = candidate("d").model_copy(update={"checks": [Check(name="parity", passed=False, detail="far off")]})
    with pytest.raises(GateFailed, match="parity of d: far off"):
        raise_for_verdict(report(broken))


def test_a_baseline_is_not_gated() -> None:
    judged = report(candidate("a", metric(0.95)), candidate("b", metric(0.1)).model_copy(update={"baseline": True}))
    assert [item.candidate for item in apply_gates(judged, [Gate(metric="accuracy", min=0.9)])] == ["a"]


@pytest.mark.parametrize("text", ["gates:\n  - {metric: accuracy, min: 0.9}\n", "- metric: accuracy\n  min: 0.9\n"])
def test_gates_are_read_from_a_list_or_under_a_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    assert load_gates(path) == [Gate(metric="accuracy", min=0.9)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no list"),
        ("gates: []", "no list"),
        ("- [", "not valid YAML.*line 1"),
        (
            "- {metric: a, min: 1}\n- {metric: a, minn: 1}",
            "line 2: 'minn' is not a key.*metric, candidate, min, max, relative_to, as, why",
        ),
        ("- metric: a", "line 1: .*needs min, max or both"),
        ("- {metric: a, min: 2, max: 1}", "min 2 above max 1"),
        ("- {metric: a, min: yes}", "not true or false"),
        ("- {metric: a, min: .nan}", "min: .*finite"),
        ("- {metric: a, min: 95%}", "min: .*number"),
        ("- {min: 1}", "metric: Field required"),
        ("- {metric: a, min: 1, min: 0}", "line 1: the key 'min' is given twice"),
        ("gate:\n- {metric: a, min: 1}", "'gate' at its top.*'gates'"),
        ("- accuracy > 0.9", "line 1: a gate is a mapping"),
        ("- 2024-99-99", "not valid YAML"),
        ("- {metric: a, min: 1, relative_to: student}", "relative_to: .*'teacher' or 'previous'"),
        ("- {metric: a, min: 1, relative_to: teacher, as: share}", "as: .*'ratio' or 'difference'"),
        ("- {metric: a, min: 1, as_: ratio}", "'as_' is not a key"),
        ("- {metric: a, min: 1, as: difference}", "nothing to differ from; add relative_to"),
    ],
)
def test_a_faulty_gate_is_named_with_what_is_valid(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        load_gates(path)
    assert str(path) in caught.value.message


def test_a_missing_gate_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_gates(tmp_path / "none.yaml")


def test_a_limit_on_a_comparison_is_told_as_a_test_of_non_inferiority() -> None:
    def told(
        name: str, value: float, low: float | None, high: float | None, better: bool = True, **limits: float
    ) -> str:
        observed = Metric(name=name, value=value, low=low, high=high, higher_is_better=better, description="")
        return judge(Gate(metric=name, **limits), "a", observed).reason  # type: ignore[arg-type]

    level = "(one-sided level 2.5 %)"
    assert f"Non-inferior to the teacher at a margin of 0.02 {level}" in told(
        "f1_difference", -0.01, -0.015, 0, min=-0.02
    )
    assert f"by more than a margin of 0.05 {level}" in told("spearman_kept", 0.9, 0.88, 0.92, min=0.95)
    assert "at a margin of 0.05 is not shown" in told("spearman_kept", 0.95, 0.9, 0.97, min=0.95)
    assert "Non-inferior" in told("perplexity_ratio", 1.01, 1.0, 1.02, better=False, max=1.05)
    for asked in (
        told("f1_difference", 0.05, 0.03, 0.07, min=0.02),  # a gain is asked for
        told("nll_difference", -0.1, -0.2, -0.01, better=False, max=0),
        told("f1_difference", -0.01, None, None, min=-0.02),  # without an interval nothing is tested
        told("accuracy", 0.95, 0.94, 0.96, min=0.9),
        told("accuracy_kept", 0.95, 0.94, 0.96, max=1.5),
        told("accuracy_kept", 0.95, 0.94, 0.96, min=0.9, max=1.5),
    ):
        assert "nferior" not in asked


def test_the_advice_of_more_examples_decides_four_times_in_five() -> None:
    """Were the true value the observed one, a sample of the size that is advised passes in 80 % of cases."""
    spread, n, random = 0.5, 100, np.random.default_rng(0)

    def judged(mean: float, count: int) -> GateResult:
        half = 1.96 * spread / count**0.5
        return judge(Gate(metric="accuracy", min=0.9), "a", metric(mean, mean - half, mean + half, count=count))

    told = judged(0.95, n)
    found = re.search(r"about ([\d,]+) more", told.reason)
    assert told.verdict == "inconclusive" and found
    count = n + int(found.group(1).replace(",", ""))
    means = random.normal(0.95, spread / count**0.5, 2000)
    assert np.mean([judged(mean, count).verdict == "pass" for mean in means]) == pytest.approx(0.8, abs=0.03)


def test_more_examples_are_no_advice_where_the_reference_is_the_hindrance() -> None:
    def undecided(*hindrances: str | None) -> str | None:
        gate = Gate(metric="accuracy", min=0.9)
        results = [
            GateResult(gate=gate, candidate="a", observed=1, verdict="inconclusive", reason="", hindrance=each)
            for each in hindrances
        ]
        with pytest.raises(GateInconclusive) as caught:
            raise_for_verdict(report().model_copy(update={"gates": results}))
        return caught.value.hint

    assert undecided(None) == "Validate on more examples, or move the limit."
    hint = undecided("another CPU", "other data")
    assert hint == "Measure the previous release anew, as this one is measured: it was on another CPU and other data."
    both = undecided("another CPU", None)
    assert both and both.startswith("Validate on more examples") and both.endswith("it was on another CPU.")
