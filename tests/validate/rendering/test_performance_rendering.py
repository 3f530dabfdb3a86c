"""Scenarios, noise and energy in the renderings."""

from __future__ import annotations

import io
from html import unescape
from typing import Any

import pytest
from rich.console import Console

from limbeck.validate.records.performance import Generation, Latency, Noise, Scenario, ScenarioTokens, TokenTimes
from limbeck.validate.records.report import Candidate, Metric, Report
from limbeck.validate.rendering import render_html, render_markdown, render_table
from limbeck.validate.rendering.performance import generation_rows, remarks, scenario_rows, token_rows

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


def generation(speedup: float | None = 2.5, **fields: Any) -> Generation:
    """A batch of 8 after prompts of 256."""
    ttft = TokenTimes(samples=10, p50_ms=600.0, p90_ms=650.0, p99_ms=700.0, speedup=speedup)
    tpot = TokenTimes(samples=310, p50_ms=9.3, p90_ms=9.9, p99_ms=12.0, speedup=speedup)
    given = {"batch_size": 8, "prompt_tokens": 256, "new_tokens": 32, "threads": 2, "rounds": 10, "ttft": ttft,
             "tpot": tpot, "tokens_per_second": 860.2, "cache_bytes": 23_511_040}  # fmt: skip
    return Generation.model_validate({**given, **fields})


def test_written_text_stands_in_every_rendering() -> None:
    found = report(candidate("writer", generations=[generation(), generation(None, batch_size=1)]))
    assert generation_rows(found) == [
        ("writer", "8 × 256", "600 (700)", "2.50×", "9.30 (12.0)", "2.50×", "860", "23.5 MB"),
        ("writer", "1 × 256", "600 (700)", "–", "9.30 (12.0)", "–", "860", "23.5 MB"),
    ]
    for words in renderings(found):
        assert "Written text" in words and "8 × 256" in words and "600 (700)" in words and "23.5 MB" in words
    assert "32 tokens were written after every prompt, greedily, with 2 threads" in unescape(render_html(found))


def test_token_latencies_of_a_scenario_stand_in_every_rendering() -> None:
    tokens = ScenarioTokens(new_tokens=32, per_second=1234.5, ttft_ms={"50": 11.0, "90": 22.0, "99": 333.0},
                            tpot_ms={"50": 1.5, "90": 2.5, "99": 3.5}, ttft_bound_ms=300, tpot_bound_ms=20)  # fmt: skip
    found = report(candidate("writer", scenarios=[scenario(latency_bound_ms=None, tokens=tokens)]))
    asked = "Server, 200 queries a second, first token within 300 ms, each after it within 20.0 ms"
    assert scenario_rows(found)[0][1] == asked
    assert token_rows(found) == [("writer", "Server", "11.0", "22.0", "333", "1.50", "2.50", "3.50", "1,234")]
    for words in renderings(found):
        assert asked in words and "MLPerf scenarios: tokens" in words and "333" in words


def test_a_report_without_texts_has_no_tables_of_them() -> None:
    for words in renderings(report(timed("small", None).model_copy(update={"scenarios": [scenario()]}))):
        assert "Written text" not in words and "MLPerf scenarios: tokens" not in words


def test_a_speed_up_per_token_within_the_noise_is_said_to_be_so() -> None:
    ratio = Metric(name="tpot_speedup_p50", value=1.1, low=1.02, high=1.2, higher_is_better=True, description="")
    unsettled = candidate("writer", generations=[generation(settled=False)], metrics=[ratio])
    found = report(unsettled, noise=Noise(subject="teacher", ratio=1.05, low=0.95, high=1.1, rounds=5))
    assert remarks(found) == [
        "Not settled when timed: writer. Times may be of a warm-up.",
        "Noise: teacher timed against itself gave a ratio of 1.05 (95% interval 0.950 to 1.10).",
        "The speed-up of writer per token, 1.10, is within the noise.",
    ]


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
