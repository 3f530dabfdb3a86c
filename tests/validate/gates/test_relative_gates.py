"""Gates relative to the teacher and to the last release: what they compare, what they refuse, and their law."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.recipes.schema import Recipe
from limbeck.recipes.steps import ValidationAsked, validate
from limbeck.validate.gates.applying import apply_gates
from limbeck.validate.records.report import Candidate, Gate, GateResult, Latency, Metric, Report, Slice
from limbeck.validate.rendering import render_html, render_markdown

FIGURES = st.floats(0.01, 1e4)
RANK = {"pass": 0, "inconclusive": 1, "fail": 2}
CPU = {"cpu": {"name": "A", "cpus": 2, "instruction_sets": ["avx2"]}}


def metric(value: float, low: float | None = None, high: float | None = None, **more: Any) -> Metric:
    given: dict[str, Any] = {"name": "accuracy", "higher_is_better": True, "description": "right answers", **more}
    return Metric(value=value, low=low, high=high, **given)


def candidate(*metrics: Metric, name: str = "a", **more: Any) -> Candidate:
    given: dict[str, Any] = {"kind": "artifact", "backend": "onnx", "precision": "fp32", "path": "out", **more}
    return Candidate(name=name, metrics=list(metrics), **given)


def report(*candidates: Candidate, **more: Any) -> Report:
    given: dict[str, Any] = {"environment": CPU, "data": ["x.csv: 9 rows, fingerprint 01ab"], **more}
    return Report(kind="validation", title="t", created="", command="", candidates=list(candidates), **given)


def gate(relative_to: Literal["teacher", "previous"], **more: Any) -> Gate:
    return Gate.model_validate({"metric": "accuracy", "relative_to": relative_to, **more})


def judged(asked: Gate, new: Report, previous: Report | None = None) -> GateResult:
    (result,) = apply_gates(new, [asked], previous)
    return result


@pytest.mark.parametrize(
    ("limits", "verdict", "observed"),
    [
        ({"min": 0.95}, "pass", 0.96),
        ({"min": 0.96}, "inconclusive", 0.96),
        ({"min": 0.99}, "fail", 0.96),
        ({"max": 1.0}, "pass", 0.96),
        ({"as": "difference", "min": -0.03}, "pass", -0.02),
        ({"as": "difference", "min": -0.02}, "inconclusive", -0.02),
        ({"as": "difference", "min": 0}, "fail", -0.02),
    ],
)
def test_the_teacher_is_a_point(limits: dict[str, Any], verdict: str, observed: float) -> None:
    result = judged(gate("teacher", **limits), report(candidate(metric(0.48, 0.478, 0.482, teacher=0.5))))
    assert (result.verdict, result.observed) == (verdict, pytest.approx(observed))
    assert "The teacher's own uncertainty is not in the interval" in result.reason
    assert result.low is not None and result.low < observed
    assert result.gate == gate("teacher", **limits)  # as it was asked, not as it was judged


def test_a_paired_metric_goes_before_the_point() -> None:
    kept = metric(0.97, 0.95, 0.99, name="accuracy_kept")
    lost = metric(-0.03, -0.05, -0.01, name="accuracy_difference")
    new = report(candidate(metric(0.8, 0.5, 1.0, teacher=0.9), kept, lost))
    ratio, difference = (judged(gate("teacher", min=limit, **more), new) for limit, more in
                         ((0.94, {}), (-0.02, {"as": "difference"})))  # fmt: skip
    assert (ratio.observed, ratio.verdict) == (0.97, "pass")
    assert "accuracy_kept, which is paired" in ratio.reason and "own uncertainty" not in ratio.reason
    assert (difference.observed, difference.verdict) == (-0.03, "inconclusive")
    assert "accuracy_difference, which is paired" in difference.reason


def test_the_teachers_own_record_is_a_reference() -> None:
    """Times and sizes stand in the teacher's record, not beside the candidate's."""
    time = {"name": "latency_p50_ms", "higher_is_better": False}
    new = report(candidate(metric(4, **time)), teacher=candidate(metric(10, **time), name="teacher"))
    asked = Gate(metric="latency_p50_ms", relative_to="teacher", max=0.5)
    assert (judged(asked, new).observed, judged(asked, new).verdict) == (0.4, "pass")
    assert judged(asked, new).low is None
    assert "own uncertainty" not in judged(asked, new).reason  # there is no interval that could lack it


@pytest.mark.parametrize(
    ("limits", "verdict"),
    [
        # 0.88 +- 0.03 against 0.90 +- 0.04: the difference is -0.02 +- 0.05
        ({"as": "difference", "min": -0.071}, "pass"),
        ({"as": "difference", "min": -0.069}, "inconclusive"),
        ({"as": "difference", "min": 0.029}, "inconclusive"),
        ({"as": "difference", "min": 0.031}, "fail"),
        ({"min": 0.9}, "pass"),
        ({"min": 0.95}, "inconclusive"),
        ({"min": 1.05}, "fail"),
    ],
)
def test_the_last_release_has_an_interval_of_its_own(limits: dict[str, Any], verdict: str) -> None:
    new, old = report(candidate(metric(0.88, 0.85, 0.91))), report(candidate(metric(0.9, 0.86, 0.94)))
    assert judged(gate("previous", **limits), new, old).verdict == verdict


def test_points_are_compared_as_points() -> None:
    size = {"name": "size_mb", "higher_is_better": False}
    new, old = report(candidate(metric(21, **size))), report(candidate(metric(20, **size)))
    for limit, verdict in ((1.05, "pass"), (1.04, "fail")):
        assert judged(Gate(metric="size_mb", relative_to="previous", max=limit), new, old).verdict == verdict
    exact = report(candidate(metric(0.9))), report(candidate(metric(0.91)))
    assert judged(gate("previous", min=-0.01, **{"as": "difference"}), *exact).verdict == "pass"


def test_an_interval_on_one_side_only_is_said() -> None:
    new, old = report(candidate(metric(0.9, 0.8, 0.95))), report(candidate(metric(0.9)))
    assert "The uncertainty of the previous figure is not in" in judged(gate("previous", min=0.5), new, old).reason
    assert "The uncertainty of this figure is not in" in judged(gate("previous", min=0.5), old, new).reason


def latency(sequence_length: int) -> Latency:
    return Latency(batch_size=1, sequence_length=sequence_length, threads=2, rounds=3, samples=9, p50_ms=1, p90_ms=1,
                   p99_ms=1, mean_ms=1)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "new", "old", "said"),
    [
        ("accuracy", {}, {"data": ["y.csv: 9 rows, fingerprint 02cd"]}, "other data"),
        ("latency_p50_ms", {}, {"environment": {"cpu": {"name": "B"}}}, "another CPU"),
        ("latency_p50_ms", {"latencies": [latency(8)]}, {"latencies": [latency(16)]}, "other sizes or threads"),
    ],
)
def test_what_was_measured_on_something_else_decides_nothing(
    name: str, new: dict[str, Any], old: dict[str, Any], said: str
) -> None:
    sides = []
    for more in (new, old):
        own = {key: more[key] for key in ("latencies",) if key in more}
        sides.append(report(candidate(metric(1, name=name), **own),
                            **{key: value for key, value in more.items() if key not in own}))  # fmt: skip
    asked = Gate(metric=name, relative_to="previous", min=0.1)
    result = judged(asked, sides[0], sides[1])
    assert result.verdict == "inconclusive" and said in result.reason
    broken = report(candidate(metric(math.nan, name=name)))
    assert judged(asked, broken, report(candidate(metric(1, name=name)), data=["z"])).verdict == "fail"


def test_a_renamed_file_is_the_same_data_and_a_size_is_a_size() -> None:
    old = report(candidate(metric(1)), data=["moved.csv: 9 rows, fingerprint 01ab"])
    assert judged(gate("previous", min=0.9), report(candidate(metric(1))), old).verdict == "pass"
    size = metric(1, name="size_mb")
    elsewhere = report(candidate(size), data=["other"], environment={})
    assert judged(
        Gate(metric="size_mb", relative_to="previous", max=1), report(candidate(size)), elsewhere
    ).verdict == ("pass")


def test_a_missing_reference_is_an_error_that_says_what_there_is() -> None:
    new = report(candidate(metric(0.9)), candidate(metric(0.9, name="f1", teacher=0.9), name="b"))
    with pytest.raises(InputError, match="previous release, whose report was not given") as caught:
        apply_gates(new, [gate("previous", min=1)])
    assert "--previous" in str(caught.value.hint)
    others = report(candidate(name="onnx"), candidate(name="aa"))
    with pytest.raises(InputError, match=r"no such candidate\. It has aa, onnx\."):
        apply_gates(new, [gate("previous", candidate="a", min=1)], others)
    metrics = report(candidate(metric(1, name="size_mb"), metric(1, name="accuracy_kept")))
    with pytest.raises(InputError, match=r"no such metric of that candidate\. It has accuracy_kept, size_mb\."):
        apply_gates(new, [gate("previous", candidate="a", min=1)], metrics)
    with pytest.raises(InputError, match=r"relative to the teacher, which has no such metric.* It has nothing\."):
        apply_gates(new, [gate("teacher", min=1)])


def test_a_validation_refuses_such_a_gate_before_it_measures_anything() -> None:
    unread: Any = None  # neither artifact, teacher nor data is looked at
    with pytest.raises(InputError, match="previous release, whose report was not given"):
        validate({"a": Path("there-is-none")}, unread, unread, ValidationAsked(gates=[gate("previous", min=1)]))


@pytest.mark.parametrize(("reference", "said"), [(0.0, "a ratio means nothing"), (-0.1, "a ratio means nothing"),
                                                 (math.nan, "which is no figure")])  # fmt: skip
def test_a_reference_that_nothing_can_be_held_against(reference: float, said: str) -> None:
    new = report(candidate(metric(0.9, teacher=reference)))
    with pytest.raises(InputError, match=said):
        judged(gate("teacher", min=1), new)
    if math.isfinite(reference):
        assert judged(gate("teacher", min=0, **{"as": "difference"}), new).verdict == "pass"


def test_a_reference_that_may_be_zero_leaves_a_ratio_undecided() -> None:
    old = report(candidate(metric(0.1, -0.1, 0.3)))
    new = report(candidate(metric(0.9, 0.8, 1.0)))
    assert judged(gate("previous", min=0.01), new, old).verdict == "inconclusive"


def test_a_value_that_is_no_figure_fails() -> None:
    for value in (math.nan, math.inf):
        assert judged(gate("teacher", min=0), report(candidate(metric(value, teacher=1)))).verdict == "fail"


@st.composite
def metrics(draw: st.DrawFn) -> Metric:
    low, value, high = sorted(draw(st.tuples(FIGURES, FIGURES, FIGURES)))
    ends = draw(st.sampled_from([low, None])), draw(st.sampled_from([high, None]))
    return metric(value, *ends, teacher=draw(FIGURES), count=draw(st.none() | st.integers(0, 9999)))


@settings(max_examples=150, deadline=None)
@given(
    metrics(), metrics(), st.sampled_from(["teacher", "previous"]), st.sampled_from(["ratio", "difference"]),
    st.floats(-1e4, 1e4) | st.floats(0.5, 2), st.floats(0, 1e4) | st.floats(0, 0.1),
)  # fmt: skip
def test_tightening_a_relative_gate_never_betters_its_verdict(
    observed: Metric, before: Metric, relative_to: Any, how: str, limit: float, by: float
) -> None:
    new, old = report(candidate(observed)), report(candidate(before))
    for loose, tight in (
        ({"min": limit}, {"min": limit + by}),
        ({"max": limit}, {"max": limit - by}),
        ({"max": limit}, {"min": limit - by, "max": limit}),
    ):
        verdicts = [judged(gate(relative_to, **limits, **{"as": how}), new, old).verdict for limits in (tight, loose)]
        assert RANK[verdicts[0]] >= RANK[verdicts[1]]


@settings(max_examples=60, deadline=None)
@given(metrics(), st.floats(0.5, 2))
def test_a_release_that_is_the_last_one_again_is_neither_better_nor_worse(same: Metric, limit: float) -> None:
    new = report(candidate(same))
    asked = judged(gate("previous", min=limit), new, new)
    assert asked.observed == 1
    if limit <= 1:
        assert asked.verdict != "fail"
    else:
        assert asked.verdict != "pass"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min": 0.98}, "at least 0.98 × the teacher's"),
        ({"as": "difference", "min": -0.01}, "at least the teacher's − 0.01"),
        ({"as": "difference", "min": 0, "max": 5}, "at least the teacher's and at most the teacher's + 5"),
    ],
)
def test_limits_in_words(given: dict[str, Any], words: str) -> None:
    assert gate("teacher", **given).limits == words


def test_a_relative_gate_is_kept_in_the_report_and_drawn() -> None:
    new = report(candidate(metric(0.9, 0.8, 1.0)))
    old = report(candidate(metric(0.1, -0.1, 0.3)))  # a ratio without bounds
    done = new.model_copy(update={"gates": [judged(gate("previous", min=0.5, why="x"), new, old)]})
    stored = done.model_dump_json()
    assert json.loads(stored)["gates"][0]["gate"]["as"] == "ratio"
    assert Report.model_validate_json(stored) == done
    page = render_html(done)
    assert "0.5 × the previous" in page and "nan" not in page.split("</style>")[1].lower()
    assert "0.5 × the previous" in render_markdown(done)


def test_a_recipe_cannot_ask_for_the_last_release() -> None:
    """A run would find out only after hours of training that there is no report to compare with."""
    recipe = {
        "name": "r", "teacher": "t", "task": "sentence-similarity", "data": {"train": "a.csv", "validation": "b.csv"},
        "stages": [{"name": "s", "distill": {}}], "exports": [{"name": "onnx", "start": "s", "backend": "onnx"}],
        "gates": [{"metric": "size_mb", "max": 1, "relative_to": "teacher"}],
    }  # fmt: skip
    assert Recipe.model_validate(recipe).gates[0].relative_to == "teacher"
    recipe["gates"] = [{"metric": "size_mb", "max": 1, "relative_to": "previous"}]
    with pytest.raises(ValueError, match="limbeck gate --previous"):
        Recipe.model_validate(recipe)


def sliced(*metrics: Metric, whole: Metric, kind: Literal["file", "column"] = "column", **more: Any) -> Report:
    part = Slice(name="long", kind=kind, count=100, metrics=list(metrics))
    return report(candidate(whole, slices=[part]), **more)


def test_a_gate_on_a_slice_is_relative_to_the_same_slice() -> None:
    new = sliced(metric(0.4, teacher=0.5), whole=metric(0.9, teacher=0.9))
    on_slice = judged(gate("teacher", slice="long", min=0.9), new)
    assert (on_slice.verdict, on_slice.observed, on_slice.slice) == ("fail", pytest.approx(0.8), "long")
    assert judged(gate("teacher", min=0.9), new).verdict == "pass"
    old = sliced(metric(0.5), whole=metric(0.1))
    result = judged(gate("previous", slice="l*", min=0.75), new, old)
    assert (result.verdict, result.observed) == ("pass", pytest.approx(0.8))
    paired = sliced(metric(0.4, teacher=0.5), metric(0.95, name="accuracy_kept"), whole=metric(0.9, teacher=0.9))
    assert judged(gate("teacher", slice="long", min=0.9), paired).verdict == "pass"
    with pytest.raises(InputError, match=r"in which a has no such slice\. It has nothing"):
        judged(gate("previous", slice="long", min=0.9), new, report(candidate(metric(0.5))))


def test_a_teachers_figure_of_the_whole_is_no_reference_for_a_slice() -> None:
    teacher = Candidate(name="t", kind="teacher", backend="torch", precision="fp32", path="t", metrics=[metric(0.9)])
    new = sliced(metric(0.4), whole=metric(0.9), teacher=teacher)
    assert judged(gate("teacher", min=0.9), new).verdict == "pass"
    with pytest.raises(InputError, match="of long is relative to the teacher, which has no such metric"):
        judged(gate("teacher", slice="long", min=0.9), new)


def test_other_rows_of_a_slice_hinder_that_slice_alone() -> None:
    def made(fingerprint: str) -> Report:
        data = ["x.csv: 9 rows, fingerprint 01ab", f"y.csv, slice long: 9 rows, fingerprint {fingerprint}"]
        return sliced(metric(0.5), whole=metric(0.5), kind="file", data=data)

    asked = gate("previous", slice="long", min=0.9)
    assert judged(asked, made("77"), made("77")).verdict == "pass"
    assert judged(asked, made("77"), made("88")).verdict == "inconclusive"
    assert judged(gate("previous", min=0.9), made("77"), made("88")).verdict == "pass"
    without = report(candidate(metric(0.5)))
    assert judged(gate("previous", min=0.9), made("77"), without).verdict == "pass"
