"""Speed, memory and energy as metrics that gates can name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ..records.performance import Generation, Scenario
from ..records.report import Candidate, Metric
from .latency import BenchResult, SubjectRun
from .threads import check_threads
from .token_times import GenerationResult

_MEGABYTE = 1e6


def with_latency(candidate: Candidate, result: BenchResult, baseline: BenchResult | None) -> Candidate:
    """The candidate with its latency, memory, cold start and energy as metrics that gates can name."""
    latency = result.latency(baseline)
    where = f"batch {latency.batch_size} x {latency.sequence_length} tokens, {latency.threads} threads"
    figures = [
        ("latency_p50_ms", latency.p50_ms, "ms", "median time of one call"),
        ("latency_p90_ms", latency.p90_ms, "ms", "nine calls in ten are faster"),
        ("latency_p99_ms", latency.p99_ms, "ms", "99 calls in 100 are faster"),
        *_of_the_process(result),
    ]
    if result.energy_mj is not None:
        figures.append(("energy_mj", result.energy_mj, "mJ", f"of one call, idle draw included, by {result.meter}"))
    metrics = [_less_is_better(*figure, where, latency.samples) for figure in figures]
    if latency.speedup is not None:
        ends = latency.speedup, latency.speedup_low, latency.speedup_high
        metrics.append(_speedup("speedup_p50", ends, f"median of the eager teacher over this one's ({where})",
                                latency.samples))  # fmt: skip
    return _with(candidate, result, metrics, latencies=[*candidate.latencies, latency])


def with_generation(candidate: Candidate, result: GenerationResult, baseline: GenerationResult | None) -> Candidate:
    """The candidate with the times of its tokens as metrics that gates can name: those of the first shape under their
    bare names, and where there are several, those of each under names that end in its batch size and prompt length
    (`tpot_p50_ms/8x256`)."""
    found = result.generations(baseline)
    metrics = list(_token_metrics(found[0], ""))
    if len(found) > 1:
        metrics += [metric for each in found for metric in _token_metrics(each, f"/{shape_name(each)}")]
    first, known = found[0], {metric.name for metric in candidate.metrics}
    metrics += [
        _less_is_better(*figure, _where(first), first.ttft.samples)
        for figure in _of_the_process(result)
        if figure[0] not in known  # of its single calls
    ]
    return _with(candidate, result, metrics, generations=[*candidate.generations, *found])


def shape_name(generation: Generation) -> str:
    """`8x256`: batch size and prompt length, as metrics are named by it."""
    return f"{generation.batch_size}x{generation.prompt_tokens}"


def _where(generation: Generation) -> str:
    return (f"batch {generation.batch_size}, {generation.new_tokens} tokens after prompts of "
            f"{generation.prompt_tokens}, {generation.threads} threads")  # fmt: skip


def _token_metrics(found: Generation, ending: str) -> Iterator[Metric]:
    where, times = _where(found), (("ttft", found.ttft), ("tpot", found.tpot))
    meant = {"ttft": "time to first token", "tpot": "time per output token after the first"}
    for name, each in times:
        for percentile, value in (("p50", each.p50_ms), ("p90", each.p90_ms), ("p99", each.p99_ms)):
            told = f"{meant[name]}, {percentile}"
            yield _less_is_better(f"{name}_{percentile}_ms{ending}", value, "ms", told, where, each.samples)
    yield Metric(
        name=f"tokens_per_second{ending}",
        value=found.tokens_per_second,
        unit="/s",
        higher_is_better=True,
        description=f"of all texts together, after the first token ({where})",
        count=found.tpot.samples,
    )
    cache = found.cache_bytes / _MEGABYTE
    yield _less_is_better(f"cache_mb{ending}", cache, "MB", "what is kept of the texts in the end", where, None)
    for name, each in times:
        if each.speedup is not None:
            ends = each.speedup, each.speedup_low, each.speedup_high
            told = f"median {meant[name]} of the baseline over this one's ({where})"
            yield _speedup(f"{name}_speedup_p50{ending}", ends, told, each.samples)


def _of_the_process(result: SubjectRun) -> list[tuple[str, float, str, str]]:
    return [
        ("cold_start_ms", result.cold_start_ms, "ms", "from opening the folder to the first answer"),
        ("peak_memory_mb", result.peak_memory_mb, "MiB", "of the whole process, Python included"),
    ]


def _less_is_better(name: str, value: float, unit: str, told: str, where: str, count: int | None) -> Metric:
    return Metric(
        name=name, value=value, unit=unit, higher_is_better=False, description=f"{told} ({where})", count=count
    )


def _speedup(name: str, ends: tuple[float, float | None, float | None], told: str, count: int) -> Metric:
    value, low, high = ends
    return Metric(
        name=name, value=value, low=low, high=high, unit="x", higher_is_better=True, description=told, count=count
    )


def _with(candidate: Candidate, result: SubjectRun, metrics: list[Metric], **records: Any) -> Candidate:
    """With more metrics and records, and the check of threads as timed, in place of what was seen before."""
    threads, checks = check_threads(result), candidate.checks
    if threads is not None:
        checks = [*(each for each in checks if each.name != threads.name), threads]
    return candidate.model_copy(update={**records, "metrics": [*candidate.metrics, *metrics], "checks": checks})


def with_scenarios(candidate: Candidate, scenarios: Sequence[Scenario]) -> Candidate:
    """The candidate with MLPerf's scenarios, and what MLPerf reports of each as a metric that gates can name."""
    metrics = [metric for scenario in scenarios for metric in _figures(scenario)]
    found = {"scenarios": [*candidate.scenarios, *scenarios], "metrics": [*candidate.metrics, *metrics]}
    return candidate.model_copy(update=found)


def _figures(scenario: Scenario) -> list[Metric]:
    """Of SingleStream and MultiStream the early-stopping estimate of the percentile (as measured where there are too
    few queries for one), of Offline the throughput, of Server the latency and the rate that was answered. Where text is
    written, times of tokens stand in the place of those of queries."""
    found = [*_token_times(scenario)] if scenario.tokens else [] if scenario.name == "offline" else [_latency(scenario)]
    if scenario.name == "server" or (scenario.name == "offline" and not scenario.tokens):
        name = "offline_samples_per_second" if scenario.name == "offline" else "server_queries_per_second"
        found.append(_rate(scenario, name, scenario.samples_per_second, "answered a second"))
    if scenario.tokens:
        name = f"{scenario.name}_tokens_per_second"
        found.append(_rate(scenario, name, scenario.tokens.per_second, "new tokens a second, prompts' time included"))
    return found


def _percentile(scenario: Scenario) -> str:
    return "90" if scenario.name == "single_stream" else "99"


def _latency(scenario: Scenario) -> Metric:
    percentile = _percentile(scenario)
    value = scenario.early_stopping_ms or scenario.percentiles_ms.get(percentile, math.nan)
    told = f"{percentile} queries in 100 are answered faster"
    name = f"{scenario.name}_p{percentile}_ms"
    return _less_is_better(name, value, "ms", told, _of_loadgen(scenario), scenario.queries)


def _token_times(scenario: Scenario) -> Iterator[Metric]:
    tokens, percentile = scenario.tokens, _percentile(scenario)
    assert tokens is not None
    for name, times, estimate, told in (
        ("ttft", tokens.ttft_ms, tokens.ttft_early_stopping_ms, "have their first token sooner"),
        ("tpot", tokens.tpot_ms, tokens.tpot_early_stopping_ms, "take less time per output token"),
    ):
        if times:
            value, meant = estimate or times[percentile], f"{percentile} texts in 100 {told}"
            metric = f"{scenario.name}_{name}_p{percentile}_ms"
            yield _less_is_better(metric, value, "ms", meant, _of_loadgen(scenario), scenario.queries)


def _rate(scenario: Scenario, name: str, value: float, told: str) -> Metric:
    return Metric(
        name=name,
        value=value,
        unit="/s",
        higher_is_better=True,
        description=f"{told} ({_of_loadgen(scenario)})",
        count=scenario.queries,
    )


def _of_loadgen(scenario: Scenario) -> str:
    shape = f"batch {scenario.batch_size} x {scenario.sequence_length} tokens, {scenario.threads} threads"
    if scenario.tokens:
        shape = (f"batch {scenario.batch_size}, {scenario.tokens.new_tokens} tokens after prompts of "
                 f"{scenario.sequence_length}, {scenario.threads} threads")  # fmt: skip
    at = f" at {scenario.target_qps:g} queries a second" if scenario.target_qps is not None else ""
    return f"MLPerf LoadGen {scenario.loadgen}{at}, {shape}"
