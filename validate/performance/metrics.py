"""Speed, memory and energy as metrics that gates can name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..records.performance import Scenario
from ..records.report import Candidate, Metric
from .latency import BenchResult
from .threads import check_threads


def with_latency(candidate: Candidate, result: BenchResult, baseline: BenchResult | None) -> Candidate:
    """The candidate with its latency, memory, cold start and energy as metrics that gates can name."""
    latency = result.latency(baseline)
    where = f"batch {latency.batch_size} x {latency.sequence_length} tokens, {latency.threads} threads"
    figures = [
        ("latency_p50_ms", latency.p50_ms, "ms", "median time of one call"),
        ("latency_p90_ms", latency.p90_ms, "ms", "nine calls in ten are faster"),
        ("latency_p99_ms", latency.p99_ms, "ms", "99 calls in 100 are faster"),
        ("cold_start_ms", result.cold_start_ms, "ms", "from opening the folder to the first answer"),
        ("peak_memory_mb", result.peak_memory_mb, "MiB", "of the whole process, Python included"),
    ]
    if result.energy_mj is not None:
        figures.append(("energy_mj", result.energy_mj, "mJ", f"of one call, idle draw included, by {result.meter}"))
    metrics = [
        Metric(
            name=name,
            value=value,
            unit=unit,
            higher_is_better=False,
            description=f"{description} ({where})",
            count=latency.samples,
        )
        for name, value, unit, description in figures
    ]
    if latency.speedup is not None:
        metrics.append(
            Metric(
                name="speedup_p50",
                value=latency.speedup,
                low=latency.speedup_low,
                high=latency.speedup_high,
                unit="x",
                higher_is_better=True,
                description=f"median of the eager teacher over this one's ({where})",
                count=latency.samples,
            )
        )
    threads, checks = check_threads(result), candidate.checks  # as timed, in place of what was seen before
    found = {
        "latencies": [*candidate.latencies, latency],
        "metrics": [*candidate.metrics, *metrics],
        "checks": checks if threads is None else [*(each for each in checks if each.name != threads.name), threads],
    }
    return candidate.model_copy(update=found)


def with_scenarios(candidate: Candidate, scenarios: Sequence[Scenario]) -> Candidate:
    """The candidate with MLPerf's scenarios, and what MLPerf reports of each as a metric that gates can name."""
    metrics = [metric for scenario in scenarios for metric in _figures(scenario)]
    found = {"scenarios": [*candidate.scenarios, *scenarios], "metrics": [*candidate.metrics, *metrics]}
    return candidate.model_copy(update=found)


def _figures(scenario: Scenario) -> list[Metric]:
    """Of SingleStream and MultiStream the early-stopping estimate of the percentile (as measured where there are too
    few queries for one), of Offline the throughput, of Server the latency and the rate that was answered."""
    percentile = "90" if scenario.name == "single_stream" else "99"
    shape = f"batch {scenario.batch_size} x {scenario.sequence_length} tokens, {scenario.threads} threads"
    at = f" at {scenario.target_qps:g} queries a second" if scenario.target_qps is not None else ""
    where = f"MLPerf LoadGen {scenario.loadgen}{at}, {shape}"
    latency = Metric(
        name=f"{scenario.name}_p{percentile}_ms",
        value=scenario.early_stopping_ms or scenario.percentiles_ms.get(percentile, math.nan),
        unit="ms",
        higher_is_better=False,
        description=f"{percentile} queries in 100 are answered faster ({where})",
        count=scenario.queries,
    )
    if scenario.name in ("single_stream", "multi_stream"):
        return [latency]
    rate = Metric(
        name="offline_samples_per_second" if scenario.name == "offline" else "server_queries_per_second",
        value=scenario.samples_per_second,
        unit="/s",
        higher_is_better=True,
        description=f"answered a second ({where})",
        count=scenario.queries,
    )
    return [rate] if scenario.name == "offline" else [latency, rate]
