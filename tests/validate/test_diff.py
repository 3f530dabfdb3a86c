"""Two reports compared: what is matched with what, what a change means, and what cannot be compared."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from limbeck.validate.diff import CandidateDiff, FigureChange, ReportDiff, compare_reports
from limbeck.validate.gates.applying import apply_gates
from limbeck.validate.records.report import Candidate, Check, Gate, GateResult, Latency, Metric, Report, Slice
from limbeck.validate.rendering import render_diff_markdown, render_diff_table

EVIL = "<script>alert(1)</script>\"'&|`@all [x](y) [red]\x1b[31m\x00"
ENVIRONMENT = {"cpu": {"name": "A", "cpus": 2}, "gpus": [], "versions": {"torch": "2.11", "python": "3.11"}}
FIGURES = st.floats(-1e6, 1e6)


def metric(value: float, low: float | None = None, high: float | None = None, **more: Any) -> Metric:
    given: dict[str, Any] = {"name": "accuracy", "higher_is_better": True, "description": "right answers", **more}
    return Metric(value=value, low=low, high=high, **given)


def latency(median: float, sequence_length: int = 128, threads: int = 2) -> Latency:
    return Latency(
        batch_size=1, sequence_length=sequence_length, threads=threads, rounds=3, samples=30, p50_ms=median,
        p90_ms=median * 1.2, p99_ms=median * 1.5, mean_ms=median, speedup=2.0, speedup_low=1.9, speedup_high=2.1,
    )  # fmt: skip


def candidate(*metrics: Metric, name: str = "a", **more: Any) -> Candidate:
    given: dict[str, Any] = {"kind": "artifact", "backend": "onnx", "precision": "fp32", "path": "out", **more}
    return Candidate(name=name, metrics=list(metrics), **given)


def report(*candidates: Candidate, **more: Any) -> Report:
    given: dict[str, Any] = {"environment": ENVIRONMENT, "data": ["x: 9 rows, fingerprint 01ab"], "command": "", **more}
    return Report(kind="validation", title="t", created="", candidates=list(candidates), **given)


def only(diff: ReportDiff) -> CandidateDiff:
    (found,) = diff.candidates
    return found


def change(old: Metric, new: Metric) -> FigureChange:
    (found,) = only(compare_reports(report(candidate(old)), report(candidate(new)))).figures
    return found


@pytest.mark.parametrize(
    ("old", "new", "meaning"),
    [
        # half-widths 0.03 and 0.04 make 0.05
        ((0.8, 0.77, 0.83), (0.851, 0.811, 0.891), "better"),
        ((0.8, 0.77, 0.83), (0.849, 0.809, 0.889), "no clear change"),
        ((0.8, 0.77, 0.83), (0.749, 0.709, 0.789), "worse"),
        ((0.8, 0.77, 0.83), (0.8, 0.77, 0.83), "no clear change"),
        ((0.8, None, None), (0.9, None, None), "changed"),
        ((0.8, None, None), (0.8, None, None), "equal"),
        ((0.8, 0.77, 0.83), (0.99, None, None), "changed"),
        ((0.8, 0.77, None), (0.9, 0.88, None), "no clear change"),
        ((math.nan, None, None), (math.nan, None, None), "equal"),
        ((0.8, 0.7, 0.9), (math.inf, 0.7, math.inf), "changed"),
    ],
)
def test_intervals_say_what_a_change_means(old: Any, new: Any, meaning: str) -> None:
    assert change(metric(*old), metric(*new)).meaning == meaning


def test_fewer_flips_are_better() -> None:
    flips = {"name": "flip_rate", "higher_is_better": False}
    found = change(metric(0.2, 0.19, 0.21, **flips), metric(0.1, 0.09, 0.11, **flips))
    assert found.meaning == "better"
    assert found.change is not None and found.change.value == -0.1
    assert found.change.high == pytest.approx(-0.1 + math.hypot(0.01, 0.01))


@settings(max_examples=80, deadline=None)
@given(st.tuples(FIGURES, FIGURES, FIGURES), st.tuples(FIGURES, FIGURES, FIGURES))
def test_the_other_way_round_better_is_worse(first: Any, second: Any) -> None:
    sides = []
    for values in (first, second):
        low, value, high = sorted(values)
        sides.append(metric(value, low, high))
    there, back = change(sides[0], sides[1]), change(sides[1], sides[0])
    assert {there.meaning, back.meaning} in ({"better", "worse"}, {"no clear change"})
    if there.meaning == "better":  # never against the values
        assert sides[1].value > sides[0].value


def test_another_unit_or_direction_is_not_compared() -> None:
    for more in ({"unit": "ms"}, {"higher_is_better": False}):
        found = change(metric(1, 0.9, 1.1), metric(2, 1.9, 2.1, **more))
        assert (found.meaning, found.change) == ("not comparable", None)


def test_candidates_are_matched_by_name_then_the_last_two() -> None:
    old = report(candidate(metric(1), name="x"), candidate(metric(2), name="old"))
    found = compare_reports(old, report(candidate(metric(2), name="new"), candidate(metric(1), name="x")))
    assert [(item.old_name, item.name, item.figures[0].meaning) for item in found.candidates] == [
        ("x", "x", "equal"),
        ("old", "new", "equal"),
    ]
    assert found.candidates[0].note is None and "old in the old report" in str(found.candidates[1].note)
    more = report(*(candidate(metric(1), name=name) for name in ("x", "new", "newer")))
    found = compare_reports(old, more)
    assert ([item.name for item in found.candidates], found.only_old, found.only_new) == (
        ["x"],
        ["old"],
        ["new", "newer"],
    )


@pytest.mark.parametrize(
    ("hashes", "meanings", "effects"),
    [
        (("aa", "bb"), {"flip_rate": "another teacher", "accuracy_kept": "another teacher", "accuracy": None},
         ["agreement and what is kept cannot be compared"]),
        (("aa", "aa"), {"flip_rate": None, "accuracy_kept": None, "accuracy": None}, []),
        ((None, "bb"), {"flip_rate": None, "accuracy_kept": None, "accuracy": None},
         ["agreement and what is kept are to another model"]),
    ],
)  # fmt: skip
def test_what_is_held_against_another_teacher_is_not_comparable(
    hashes: tuple[str | None, str | None], meanings: dict[str, str | None], effects: list[str]
) -> None:
    figures = [metric(0.5, name=name) for name in meanings]
    sides = [
        report(
            candidate(*figures), teacher=candidate(name="teacher", kind="teacher", path=path, checkpoint_hash=hashed)
        )
        for path, hashed in zip(("old", "new"), hashes, strict=True)
    ]
    found = compare_reports(*sides)
    changes = next(item for item in found.candidates if item.name != "teacher").figures
    assert {change.name: change.why for change in changes} == meanings
    assert [item.effect for item in found.differences if item.topic == "teacher"] == effects


def test_teachers_are_compared_as_teachers() -> None:
    both = [report(candidate(metric(1)), teacher=candidate(metric(value), name=name))
            for name, value in (("big", 1), ("teacher", 2))]  # fmt: skip
    assert [item.name for item in compare_reports(*both).candidates] == ["teacher", "a"]
    found = compare_reports(both[0], report(candidate(metric(1))))
    assert found.only_old == ["big"] and [item.name for item in found.candidates] == ["a"]


def test_what_one_report_has_alone_is_listed_with_its_value() -> None:
    old = candidate(metric(0.5), metric(3, name="cold_start_ms", unit="ms"), parameters=7)
    new = candidate(metric(0.5), metric(0.25, name="ece"), size_bytes=2_000_000, latencies=[latency(2)])
    found = only(compare_reports(report(old), report(new)))
    assert found.only_old == ["cold_start_ms: 3.000 ms", "parameters: 7.000"]
    assert found.only_new[0] == "ece: 0.2500" and found.only_new[-1] == "size: 2.000 MB"
    assert "latency p50, 1 x 128 tokens, 2 threads: 2.000 ms" in found.only_new


def test_times_are_matched_by_sizes_and_threads_and_told_once() -> None:
    figures = [metric(value, name="latency_p50_ms", unit="ms", higher_is_better=False) for value in (4, 5)]
    old = candidate(figures[0], latencies=[latency(4), latency(9, 256), latency(3, threads=1)])
    new = candidate(figures[1], latencies=[latency(8, 256), latency(5)])
    found = only(compare_reports(report(old), report(new)))
    medians = {row.name: (row.old.value, row.new.value, row.meaning) for row in found.figures if "p50" in row.name}
    assert medians == {
        "latency p50, 1 x 256 tokens, 2 threads": (9, 8, "changed"),
        "latency p50, 1 x 128 tokens, 2 threads": (4, 5, "changed"),
    }
    assert {row.meaning for row in found.figures if "speed-up" in row.name} == {"no clear change"}
    assert [row for row in found.only_old if "p50" in row] == ["latency p50, 1 x 128 tokens, 1 threads: 3.000 ms"]


def test_sizes_are_changed_or_equal() -> None:
    old = candidate(metric(2, name="size_mb", unit="MB"), size_bytes=2_000_000, parameters=10)
    new = candidate(metric(3, name="size_mb", unit="MB"), size_bytes=3_000_000, parameters=10)
    rows = {row.name: row.meaning for row in only(compare_reports(report(old), report(new))).figures}
    assert rows == {"size": "changed", "parameters": "equal"}


MIXED = [
    metric(0.5, 0.4, 0.6),
    metric(9, name="cold_start_ms", unit="ms", higher_is_better=False),
    metric(2, name="size_mb", unit="MB", higher_is_better=False),
]


@pytest.mark.parametrize(
    ("more", "topic", "refused"),
    [
        ({"data": ["y: 9 rows, fingerprint 02cd"]}, "data", {"accuracy": "other data"}),
        ({"data": ["moved: 9 rows, fingerprint 01ab"]}, None, {}),
        (
            {"environment": {**ENVIRONMENT, "cpu": {"name": "B", "cpus": 2}}},
            "CPU",
            {"cold_start_ms": "another CPU", "latency p50, 1 x 128 tokens, 2 threads": "another CPU"},
        ),
        (
            {"environment": {**ENVIRONMENT, "gpus": [{"name": "G"}]}},
            "GPU",
            {"cold_start_ms": "another GPU", "latency p50, 1 x 128 tokens, 2 threads": "another GPU"},
        ),
        ({"environment": {**ENVIRONMENT, "versions": {"torch": "2.13", "python": "3.11"}}}, "versions", {}),
        ({"command": "limbeck validate --samples 3"}, "command", {}),
        ({"environment": {**ENVIRONMENT, "cpu": ["no", "mapping"], "gpus": 3, "versions": None}}, "CPU", None),
    ],
)
def test_what_makes_figures_incomparable_is_said(more: Any, topic: str | None, refused: Any) -> None:
    item = candidate(*MIXED, latencies=[latency(4)])
    found = compare_reports(report(item), report(item, **more))
    assert [line.topic for line in found.differences][: 1 if topic else 0] == ([topic] if topic else [])
    if not topic:
        assert found.differences == []
    if refused is not None:
        whys = {row.name: row.why for row in only(found).figures if row.meaning == "not comparable"}
        assert {name: why for name, why in whys.items() if name in {*refused, "accuracy", "size_mb"}} == refused
        assert bool(whys) == bool(refused)


def test_versions_are_told_where_they_differ() -> None:
    newer = report(candidate(), environment={**ENVIRONMENT, "versions": {"torch": "2.13", "onnx": "1.2"}})
    (line,) = compare_reports(report(candidate()), newer).differences
    assert line.old == "torch 2.11, python 3.11, onnx absent" and line.new == "torch 2.13, python absent, onnx 1.2"


def test_threads_are_told_and_other_calls_not_compared() -> None:
    cold = metric(9, name="cold_start_ms", higher_is_better=False)
    sides = [report(candidate(cold, latencies=[latency(4, threads=threads)])) for threads in (2, 4)]
    found = compare_reports(*sides)
    assert [(line.topic, line.old, line.new) for line in found.differences] == [("threads", "2", "4")]
    assert [(row.name, row.why) for row in only(found).figures] == [("cold_start_ms", "other sizes or threads")]


def test_checks_and_gates_are_compared_by_name() -> None:
    def side(passed: bool, value: float, limit: float) -> Report:
        check = Check(name="parity", passed=passed, detail="")
        made = report(candidate(metric(value), metric(1, name="f1"), checks=[check]))
        asked = [Gate(metric="accuracy", min=0.5), Gate(metric="f1", min=limit)]
        return made.model_copy(update={"gates": apply_gates(made, asked)})

    found = only(compare_reports(side(False, 0.6, 0.1), side(True, 0.4, 0.2)))
    assert [(row.name, row.old, row.new, row.meaning) for row in found.verdicts] == [
        ("check parity", "fail", "pass", "better"),
        ("gate accuracy at least 0.5", "pass", "fail", "worse"),
    ]
    assert found.only_old[-1:] == ["gate f1 at least 0.1: pass"]  # another limit is another gate
    assert found.only_new[-1:] == ["gate f1 at least 0.2: pass"]


def full_diff(word: str) -> ReportDiff:
    def side(value: float, *more: Metric) -> Report:
        check = Check(name=word, passed=value > 0.5, detail="")
        figures = (metric(value, value - 0.01, value + 0.01), metric(1, name=word, unit=word), *more)
        item = candidate(*figures, name=word, checks=[check], latencies=[latency(value)])
        return report(item, candidate(name=f"{word} {value}"), command=f"{word} {value}", data=[f"{word} 9"])

    return compare_reports(side(0.4, metric(1, name=f"{word} old")), side(0.6))


@pytest.mark.parametrize("word", ["plain", EVIL])
def test_the_terminal_says_what_counts(word: str) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_diff_table(full_diff(word)))
    text = console.export_text()
    order = [text.index(words) for words in ("! command", "better", "Equal: ", "Only in OLD", "Pass, was Fail")]
    assert order == sorted(order)
    assert "+0.200 (+0.186 to +0.214)" in text and "+0.200 (+50 %)" in text
    assert "\x1b" not in text and "\x00" not in text


@pytest.mark.parametrize("word", ["plain", EVIL])
def test_markdown_is_fit_for_a_pull_request(word: str) -> None:
    text = render_diff_markdown(full_diff(word))
    assert text.startswith("## ✅ Pass, was Fail: 2 better, 1 without a clear change, 3 changed")
    assert text.index("**command**") < text.index("| Figure |") < text.index("### Only in OLD")
    assert "<script" not in text and "@all" not in text and "[x](y)" not in text
    table = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("| ")]
    assert len(table) > 4 and {line.count("|") for line in table} == {6}


def test_nothing_in_common_is_still_rendered() -> None:
    found = compare_reports(report(), report())
    assert "Nothing is in both reports" in render_diff_markdown(found)
    Console(quiet=True).print(render_diff_table(found))


def test_json_holds_figures_that_are_not_finite() -> None:
    found = compare_reports(report(candidate(metric(math.inf))), report(candidate(metric(0.5, 0.4))))
    read = json.loads(found.model_dump_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert read["candidates"][0]["figures"][0]["old"]["value"] == "Infinity"


def test_slices_are_compared_each_with_itself() -> None:
    def made(value: float, fingerprint: str, verdict: str) -> Report:
        parts = [
            Slice(name="typos", kind="perturbed", count=90, metrics=[metric(value, value - 0.01, value + 0.01)]),
            Slice(name="long", kind="file", count=90, metrics=[metric(value)]),
        ]
        asked = Gate(metric="accuracy", slice="typos", min=0.6)
        result = GateResult(gate=asked, candidate="a", observed=value, verdict=verdict, reason="", slice="typos")
        data = ["x: 9 rows, fingerprint 01ab", f"y, slice long: 9 rows, fingerprint {fingerprint}"]
        return report(candidate(metric(0.7), slices=parts), data=data, gates=[result])

    diff = compare_reports(made(0.5, "77", "fail"), made(0.7, "88", "pass"))
    meanings = {row.name: row.meaning for row in only(diff).rows}
    assert meanings == {
        "accuracy": "equal",
        "accuracy on typos": "better",
        "accuracy on long": "not comparable",
        "gate accuracy at least 0.6 on typos": "better",
    }
    assert [found.topic for found in diff.differences] == ["data of long"]
