"""The report's model: what it refuses, how it is saved and read, and the verdict that follows from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from limbeck.errors import InputError
from limbeck.validate.records.report import (
    SCHEMA_VERSION,
    Candidate,
    Check,
    Curve,
    Gate,
    GateResult,
    Latency,
    LayerSimilarity,
    Metric,
    Report,
    Step,
    Verdict,
    load_report,
    save_report,
    short_number,
)

FIGURES = st.floats(allow_nan=False)
WORDS = st.text(st.characters(codec="utf-8"), max_size=20)


def metric(name: str = "accuracy", value: float = 0.9, **more: Any) -> Metric:
    return Metric(name=name, value=value, higher_is_better=True, description="Share of right answers.", **more)


def candidate(name: str = "student", **more: Any) -> Candidate:
    return Candidate(name=name, kind="artifact", backend="onnx", precision="fp32", path="out", **more)


def report(**more: Any) -> Report:
    return Report(kind="validation", title="t", created="2026-01-01T00:00:00Z", command="limbeck validate", **more)


def result(verdict: Verdict) -> GateResult:
    gate = Gate(metric="accuracy", min=0.5)
    return GateResult(gate=gate, candidate="student", observed=0.9, verdict=verdict, reason="because")


@st.composite
def reports(draw: st.DrawFn) -> Report:
    verdicts: list[Verdict] = ["pass", "fail", "inconclusive"]
    metrics = st.builds(metric, name=WORDS, value=FIGURES, unit=WORDS, teacher=st.none() | FIGURES)
    cells = st.dictionaries(
        WORDS, WORDS | st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)
    )
    checks = st.builds(Check, name=WORDS, passed=st.booleans(), detail=WORDS, rows=st.lists(cells, max_size=2))
    candidates = st.builds(
        candidate, name=WORDS, metrics=st.lists(metrics, max_size=2), checks=st.lists(checks, max_size=2)
    )
    matrices = st.lists(st.tuples(FIGURES, FIGURES).map(list), min_size=2, max_size=2)
    steps = st.builds(
        Step,
        verb=st.sampled_from(["distill", "prune"]),
        method=WORDS,
        settings=st.dictionaries(WORDS, WORDS | st.integers()),
        similarity=st.none() | st.builds(LayerSimilarity, before=matrices, after=matrices),
    )
    return report(
        teacher=draw(st.none() | candidates),
        candidates=draw(st.lists(candidates, max_size=2)),
        steps=draw(st.lists(steps, max_size=2)),
        gates=[result(verdict) for verdict in draw(st.lists(st.sampled_from(verdicts)))],
        notes=draw(st.lists(WORDS, max_size=2)),
    )


@settings(max_examples=40, deadline=None)
@given(reports())
def test_what_is_saved_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, saved: Report) -> None:
    folder = tmp_path_factory.mktemp("report")
    path = save_report(saved, folder)
    assert load_report(path) == load_report(folder) == saved


def test_a_figure_that_is_not_finite_survives_in_valid_json(tmp_path: Path) -> None:
    path = save_report(report(candidates=[candidate(metrics=[metric(value=math.nan)])]), tmp_path)
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert math.isnan(load_report(path).candidates[0].metrics[0].value)


def test_a_newer_report_is_refused_with_the_version_that_is_read(tmp_path: Path) -> None:
    path = save_report(report(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(InputError, match=rf"version {SCHEMA_VERSION + 1}; this limbeck reads version {SCHEMA_VERSION}"):
        load_report(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": 1}', "title: Field required"),
        ('{"schema_version": 0}', "schema_version"),
        ('{"schema_version": 1, "colour": 3}', "and 2 more|colour"),
    ],
)
def test_what_is_no_report_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        load_report(path)
    assert str(path) in caught.value.message


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.json does not exist"):
        load_report(tmp_path)


@pytest.mark.parametrize(
    ("verdicts", "checks", "expected"),
    [
        ([], [], None),
        (["pass"], [], "pass"),
        ([], [True], "pass"),
        (["pass", "inconclusive"], [True], "inconclusive"),
        (["inconclusive", "fail"], [], "fail"),
        (["pass"], [True, False], "fail"),
    ],
)
def test_the_worst_answer_is_the_verdict(verdicts: list[Verdict], checks: list[bool], expected: Verdict | None) -> None:
    made = [Check(name="parity", passed=passed, detail="") for passed in checks]
    judged = report(candidates=[candidate(checks=made)], gates=[result(verdict) for verdict in verdicts])
    assert judged.verdict == expected


def test_a_stored_verdict_is_not_believed(tmp_path: Path) -> None:
    path = save_report(report(gates=[result("fail")]), tmp_path)
    path.write_text(path.read_text().replace('"verdict": "fail"\n}', '"verdict": "pass"\n}'))
    assert load_report(path).verdict == "fail"


def test_models_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValidationError, match="ends below it"):
        metric(low=0.9, high=0.8)
    with pytest.raises(ValidationError, match="2 steps and 1 values"):
        Curve(name="loss", steps=[1, 2], values=[1])
    with pytest.raises(ValidationError, match="needs 2 edges"):
        Latency(
            batch_size=1, sequence_length=8, threads=1, rounds=1, samples=1, p50_ms=1, p90_ms=1, p99_ms=1, mean_ms=1,
            histogram_edges_ms=[1.0], histogram_counts=[1],
        )  # fmt: skip
    with pytest.raises(ValidationError):
        report().title = 3  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.031, "0.031"), (0.00123, "0.00123"), (20.04, "20.0"), (12345.6, "12,346"),
     (1e-9, "1.00e-09"), (math.nan, "not a number"), (math.inf, "∞")],
)  # fmt: skip
def test_figures_are_short(value: float | None, text: str) -> None:
    assert short_number(value, 3) == text
