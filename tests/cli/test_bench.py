"""`limbeck bench` with MLPerf's scenarios, written text, its noise and its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.validate.records.report import Report, load_report

Limbeck = Callable[..., Any]
CALL = ("--batch-size", 1, "--sequence-length", 8, "--threads", 1, "--rounds", 1)


@pytest.fixture(scope="module")
def speed(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """Where the report of two scenarios on a checkpoint goes."""
    from limbeck.cli.main import _run

    out = tmp_path_factory.mktemp("bench") / "speed"
    load = ("--duration", 0.2, "--target-qps", 20, "--latency-bound-ms", 5_000)
    words = ("bench", tiny_checkpoint("bert"), *CALL, "--scenario", "single-stream, server", *load, "--out", out)
    assert _run([str(word) for word in words]) == 0
    return out


@pytest.fixture(scope="module")
def report(speed: Path) -> Report:
    return load_report(speed)


def test_scenarios_are_in_the_report(report: Report, speed: Path) -> None:
    (candidate,) = report.candidates
    assert [scenario.name for scenario in candidate.scenarios] == ["single_stream", "server"]
    assert candidate.scenarios[1].target_qps == 20 and candidate.scenarios[1].latency_bound_ms == 5_000
    assert {"single_stream_p90_ms", "server_p99_ms", "server_queries_per_second"} <= {
        metric.name for metric in candidate.metrics
    }
    assert "SingleStream" in (speed / "report.html").read_text(encoding="utf-8")


def test_the_threads_are_checked_and_energy_is_told(report: Report) -> None:
    (candidate,) = report.candidates
    assert [(check.name, check.passed) for check in candidate.checks] == [("threads", True)]
    assert report.energy is not None and report.energy.startswith("Energy ")
    assert report.noise is None  # nothing to compare with


def test_gates_may_name_what_loadgen_found(speed: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text("- {metric: single_stream_p90_ms, max: 0.0001}\n")
    shown = limbeck("gate", speed, "--gates", gates)
    assert shown.code == 1
    assert "single_stream_p90_ms at most 0.0001" in shown.out


@pytest.mark.thorough
def test_noise_and_cpus_are_told(model: Path, limbeck: Limbeck) -> None:
    shown = limbeck("bench", model, *CALL, "--noise", "--json")
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    assert found["noise"]["ratio"] > 0 and found["noise"]["rounds"] == 1
    assert found["candidates"][0]["cpus"] != []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scenario", "singel-stream"), "no scenario 'singel-stream'; there are single-stream, multi-stream"),
        (("--scenario", "server"), "server scenario needs a bound"),
        (("--scenario", "offline", "--target-qps", "9"), "the server scenario's, which was not asked for"),
        (("--scenario", "offline", "--duration", "0"), "--duration: input should be greater than 0"),
        (("--scenario", "server", "--tpot-bound-ms", "9"), "is for texts that are written"),
        (("--prompt-length", "9"), "--prompt-length is of texts, and none are asked for"),
        (("--batch-size", "1,8"), "Several batch sizes are for texts"),
        (("--generate", "--sequence-length", "9"), "--sequence-length is of a single call"),
        (("--generate", "--prompt-length", "9,"), "--prompt-length takes a size (8) or several (1,8), not '9,'"),
        (("--generate", "--new-tokens", "1"), "--new-tokens: input should be greater than or equal to 2"),
        (("--generate", "--scenario", "server"), "needs a bound on its first tokens"),
        (("--generate", "--scenario", "multi-stream"), "MultiStream is for queries"),
        (("--latency-bound-ms", "9"), "--latency-bound-ms is for MLPerf's scenarios, and none was asked for"),
    ],
)
def test_wrong_scenarios_are_refused(words: tuple[str, ...], said: str, model: Path, limbeck: Limbeck) -> None:
    limbeck("bench", model, *words).assert_refused(2, said)


def test_a_report_is_not_written_over(speed: Path, model: Path, limbeck: Limbeck) -> None:
    limbeck("bench", model, "--out", speed).assert_refused(2, "speed", "--overwrite")


def test_scenarios_without_loadgen_are_refused_before_anything_is_timed(model: Path, limbeck_child: Limbeck) -> None:
    hidden = "import sys; sys.modules['mlperf_loadgen'] = None"
    shown = limbeck_child("bench", model, "--scenario", "offline", before=hidden)
    shown.assert_refused(3, "LoadGen, which is not installed", 'pip install "limbeck[perf]"')
    assert "warming up" not in shown.err


# --- written text --------------------------------------------------------------------------------------------------

WRITTEN = ("--generate", "--prompt-length", "6,12", "--new-tokens", 4, "--threads", 1, "--rounds", 1)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """Where the report of texts and of one scenario of them went."""
    from limbeck.cli.main import _run

    out = tmp_path_factory.mktemp("bench") / "written"
    llama = tiny_checkpoint("llama", "text-generation")
    scenario = ("--batch-size", "1,2", "--task", "text-generation", "--scenario", "single-stream", "--duration", 0.2)
    assert _run([str(word) for word in ("bench", llama, *WRITTEN, *scenario, "--out", out)]) == 0
    return out


@pytest.mark.thorough
def test_texts_are_in_the_report_and_gates_may_name_them(written: Path, tmp_path: Path, limbeck: Limbeck) -> None:
    report = load_report(written)
    (candidate,) = report.candidates
    assert [(each.batch_size, each.prompt_tokens) for each in candidate.generations] == [
        (1, 6),
        (1, 12),
        (2, 6),
        (2, 12),
    ]
    assert all(each.new_tokens == 4 and each.cache_bytes > 0 for each in candidate.generations)
    assert candidate.latencies == [] and report.energy is None
    assert "Written text" in (written / "report.html").read_text(encoding="utf-8")
    assert candidate.scenarios[0].tokens is not None and candidate.scenarios[0].sequence_length == 6
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "- {metric: tokens_per_second, min: 0.001}\n"
        "- {metric: tpot_p50_ms/2x12, max: 0.00001}\n"
        "- {metric: single_stream_tpot_p90_ms, max: 0.00001}\n"
    )
    shown = limbeck("gate", written, "--gates", gates)
    assert shown.code == 1
    assert "tpot_p50_ms/2x12 at most 1e-05" in shown.out and "single_stream_tpot_p90_ms" in shown.out


@pytest.mark.thorough
def test_texts_as_json(tiny_checkpoint: Callable[..., Path], limbeck: Limbeck) -> None:
    llama = tiny_checkpoint("llama", "text-generation")
    shown = limbeck("bench", llama, *WRITTEN, "--task", "text-generation", "--json")
    assert shown.code == 0, shown.err
    (found,) = json.loads(shown.out)["candidates"]
    assert [each["prompt_tokens"] for each in found["generations"]] == [6, 12]
    assert found["generations"][0]["tpot"]["p50_ms"] > 0 and found["peak_memory_mb"] > 0
    assert "p50_ms" not in found


def test_what_writes_no_text_is_refused(model: Path, limbeck: Limbeck) -> None:
    shown = limbeck("bench", model, "--generate", "--threads", 1)
    shown.assert_refused(4, "It is for sentence-similarity, so it writes no text")
    assert "warming up" not in shown.err
