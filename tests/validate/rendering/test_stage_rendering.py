"""The table of what each stage cost: its columns, its rows, and stages that did not follow each other."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.console import Console

from limbeck.validate.records.report import Candidate, Loss, Metric, Report, StageResult, Waypoint
from limbeck.validate.rendering import render_markdown, render_table
from limbeck.validate.rendering.stages import stages


def perplexity(value: float, **more: Any) -> Metric:
    return Metric(name="perplexity", value=value, higher_is_better=False, description="", **more)


def stage(name: str, value: float = 60.0, **more: Any) -> StageResult:
    known: dict[str, Any] = {
        "start": "teacher", "verb": "prune", "method": "layers by fisher", "checkpoint_hash": "0",
        "parameters": 8_000_000, "zeros": 0.0, "size_bytes": 32_000_000, "seconds": 12.3,
        "metrics": [perplexity(value, low=58.0, high=62.0)],
        "loss": Loss(metric="perplexity", value=2.5, low=2.0, high=3.0),
    }  # fmt: skip
    return StageResult(name=name, **{**known, **more})


def program(name: str, student: float, value: float) -> Candidate:
    points = [("student", student), ("graph", student), ("program", value)]
    waypoints = [Waypoint(name=point, runtime="", precision="", metrics=[perplexity(at)]) for point, at in points]
    figures = {"parameters": 8_000_000, "size_bytes": 9_000_000, "metrics": [perplexity(value, teacher=57.5)]}
    return Candidate(
        name=name, kind="artifact", backend="onnx", precision="fp32", path="", waypoints=waypoints, **figures
    )


def run(*made: StageResult, **more: Any) -> Report:
    teacher = Candidate(
        name="teacher", kind="teacher", backend="torch", precision="fp32", path="", parameters=10_000_000
    )
    known = {"teacher": teacher, "candidates": [program("onnx", 60.0, 61.5)]}
    return Report(kind="run", title="t", created="", command="", stages=list(made), **{**known, **more})


def test_rows_go_from_the_teacher_to_the_programs() -> None:
    found = stages(run(stage("shallow"), stage("narrow", 63.0, start="shallow")))
    assert found is not None
    assert found.headings == ["Parameters", "Size", "Perplexity", "Lost (95% interval)", "Time"]
    assert [row.name for row in found.rows] == ["teacher", "shallow", "narrow", "onnx"]
    teacher, shallow, narrow, onnx = found.rows
    assert teacher.figures == ["10.0 M", "–", "57.50", "–", "–"]
    assert shallow.figures == ["8.00 M", "32.0 MB", "60.00", "2.50 (2.00 to 3.00)", "12 s"]
    assert shallow.done == narrow.done == "prune: layers by fisher"
    assert onnx.done == "onnx fp32" and onnx.figures[1:4] == ["9.0 MB", "61.50", "1.50"]  # lost to its student


def test_a_stage_that_did_not_follow_the_one_above_says_where_it_started() -> None:
    found = stages(run(stage("a"), stage("b"), stage("c", start="a"), stage("d", start="c", verb=None, method="")))
    assert found is not None
    done = [row.done for row in found.rows[1:-1]]
    assert done == ["prune: layers by fisher", "teacher → prune: layers by fisher", "a → prune: layers by fisher",
                    "left as it was"]  # fmt: skip


def test_columns_are_there_where_something_has_them() -> None:
    speed = Metric(name="tokens_per_second", value=812.0, higher_is_better=True, description="")
    zeros = stage("sparse", zeros=0.4, metrics=[perplexity(60.0), speed])
    found = stages(run(stage("dense"), zeros))
    assert found is not None
    assert found.headings[1] == "Zeros" and found.headings[-2] == "Tokens/s"
    cells = [(row.figures[1], row.figures[-2]) for row in found.rows]
    assert cells == [("–", "–"), ("0%", "–"), ("40%", "812"), ("–", "–")]


def test_a_model_that_answers_nothing_has_no_figures() -> None:
    found = stages(run(stage("broken", metrics=[], loss=None), stage("next", math.inf, start="broken", loss=None)))
    assert found is not None
    assert [row.figures[2:4] for row in found.rows[1:3]] == [["–", "–"], ["∞", "–"]]


def test_every_rendering_has_it_and_a_validation_has_none() -> None:
    report = run(stage("shallow", method="a|b [red]"))
    out = io.StringIO()
    Console(file=out, width=110, color_system=None).print(render_table(report))
    assert "What each stage cost" in out.getvalue() and "prune: a|b [red]" in out.getvalue()
    assert "| shallow | prune: a\\|b \\[red\\] | 8.00 M |" in render_markdown(report)
    assert stages(run()) is None and "What each stage cost" not in render_markdown(run())
