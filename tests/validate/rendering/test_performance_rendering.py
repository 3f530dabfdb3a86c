"""Scenarios, noise and energy in the renderings."""

from __future__ import annotations

import io
from html import unescape
from typing import Any

import pytest
from rich.console import Console

from limbeck.validate.records.performance import Latency, Noise, Scenario
from limbeck.validate.records.report import Candidate, Report
from limbeck.validate.rendering import render_html, render_markdown, render_table
from limbeck.validate.rendering.performance import remarks, scenario_rows

EVIL = "<script>alert(1)</script>|[red]\x1b[31m"


def candidate(name: str, **fields: Any) -> Candidate:
    return Candidate(name=name, kind="artifact", backend="onnx", precision="fp32", path=name, **fields)


def timed(
    name: str, speedup: float | None, low: float | None = None, high: float | None = None, **more: Any
) -> Candidate:
    latency = Latency(batch_size=1, sequence_length=8, threads=1, rounds=5, samples=30, p50_ms=1, p90_ms=2, p99_ms=3,
                      mean_ms=1, speedup=speedup, speedup_low=low, speedup_high=high, **more)  # fmt: skip
    return candidate(name, latencies=[latency])


def scenario(**fields: Any) -> Scenario:
    """A server that missed its bound."""
    given = {
        "name": "server", "batch_size": 1, "sequence_length": 128, "threads": 2, "duration_seconds": 10, "queries": 999,
        "samples_per_second": 198.7, "validity": "invalid", "percentiles_ms": {"50": 4.0, "90": 8.0, "99": 12.0},
        "target_qps": 200, "latency_bound_ms": 10, "loadgen": "6.0.17", "reason": "too late",
    }  # fmt: skip
    return Scenario.model_validate({**given, **fields})


def report(*candidates: Candidate, **fields: Any) -> Report:
    return Report(kind="benchmark", title="a", created="2026-01-01", command="a", candidates=list(candidates), **fields)


def renderings(of: Report) -> list[str]:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_table(of))
    return [console.export_text(), render_markdown(of), unescape(render_html(of))]


def test_a_scenario_stands_in_every_rendering_with_loadgens_verdict() -> None:
    found = timed("small", None).model_copy(update={"scenarios": [scenario()]})
    for words in renderings(report(found, energy="Energy is not measurable here: no.")):
        assert "Server, 200 queries a second, bound 10.0 ms" in words
        assert "INVALID: too late" in words
        assert "Energy is not measurable here: no." in words


def test_a_valid_and_a_searched_scenario_say_so() -> None:
    offline = scenario(name="offline", validity="valid", target_qps=None, percentiles_ms={})
    found = candidate("quick", scenarios=[scenario(validity="valid", searched=True), offline])
    rows = scenario_rows(report(found))
    assert rows[0] == ("quick", "Server, 200 queries a second (searched), bound 10.0 ms", "VALID", "4.00", "8.00",
                       "12.0", "199")  # fmt: skip
    assert rows[1] == ("quick", "Offline", "VALID", "–", "–", "–", "199")


def test_text_of_scenarios_and_remarks_stays_text() -> None:
    found = timed(EVIL, 1.0).model_copy(update={"scenarios": [scenario(reason=EVIL)]})
    of = report(found, noise=Noise(subject=EVIL, ratio=1.1, rounds=1), energy=EVIL)
    assert "<script" not in render_html(of) and "<script" not in render_markdown(of)
    assert "\x1b" not in renderings(of)[0]


def test_a_speed_up_within_the_noise_is_said_to_be_so() -> None:
    noise = Noise(subject="teacher", ratio=0.98, low=0.9, high=1.02, rounds=5)
    candidates = [
        timed("equal", 1.05, 1.01, 1.10),  # the other way round the noise reaches 1 / 0.9
        timed("slower", 0.92, 0.91, 0.95),
        timed("faster", 1.5, 1.2, 1.6),
        timed("bare", 1.2),
    ]
    found = report(*candidates, noise=noise)
    assert remarks(found) == [
        "Noise: teacher timed against itself gave a ratio of 0.980 (95% interval 0.900 to 1.02).",
        "The speed-up of equal, 1.05, is within the noise.",
        "The speed-up of slower, 0.920, is within the noise.",
    ]


def test_times_that_had_not_settled_are_said_to_be_so() -> None:
    found = report(timed("cold", 2.0, 1.9, 2.1, settled=False), timed("warm", None))
    assert remarks(found) == ["Not settled when timed: cold. Times may be of a warm-up."]


def test_noise_without_an_interval_reaches_as_far_as_its_ratio() -> None:
    noise = Noise(subject="teacher", ratio=0.5, rounds=1)
    assert noise.reach == pytest.approx(2.0)
    assert noise.hides(1.9, 1.9) and not noise.hides(2.1, 3.0) and not noise.hides(0.1, 0.4)
