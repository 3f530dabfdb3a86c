"""MLPerf's scenarios as a table, and what is to be known of the times beside it, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from ..records.performance import Noise, Scenario
from ..records.report import Candidate, Report, short_number
from .figures import speedup_figure

SCENARIO_HEADINGS = ("Candidate", "Scenario", "LoadGen says", "p50 (ms)", "p90 (ms)", "p99 (ms)", "Samples a second")
"""Those from the fourth on are figures."""
_NAMES = {"single_stream": "SingleStream", "multi_stream": "MultiStream", "offline": "Offline", "server": "Server"}


def scenario_rows(report: Report) -> list[tuple[str, ...]]:
    """One row a scenario and candidate, under `SCENARIO_HEADINGS`."""
    return [_row(candidate, scenario) for candidate in report.measured for scenario in candidate.scenarios]


def _row(candidate: Candidate, scenario: Scenario) -> tuple[str, ...]:
    name = _NAMES[scenario.name]
    if scenario.target_qps is not None:
        searched = " (searched)" if scenario.searched else ""
        name += f", {short_number(scenario.target_qps, 3)} queries a second{searched}"
        name += f", bound {short_number(scenario.latency_bound_ms, 3)} ms"
    verdict = "VALID" if scenario.validity == "valid" else f"INVALID: {scenario.reason}"
    times = (short_number(scenario.percentiles_ms.get(percentile), 3) for percentile in ("50", "90", "99"))
    return candidate.name, name, verdict, *times, short_number(scenario.samples_per_second, 3)


def remarks(report: Report) -> list[str]:
    """What was not steady, what may be noise, and what became of energy."""
    unsettled = [
        candidate.name for candidate in report.measured if not all(each.settled for each in candidate.latencies)
    ]
    found = [f"Not settled when timed: {', '.join(unsettled)}. Times may be of a warm-up."] if unsettled else []
    if report.noise is not None:
        found += [_noise(report.noise), *_hidden(report, report.noise)]
    return found + ([report.energy] if report.energy else [])


def _noise(noise: Noise) -> str:
    interval = ""
    if noise.low is not None and noise.high is not None:
        interval = f" (95% interval {short_number(noise.low, 3)} to {short_number(noise.high, 3)})"
    return f"Noise: {noise.subject} timed against itself gave a ratio of {short_number(noise.ratio, 3)}{interval}."


def _hidden(report: Report, noise: Noise) -> Iterator[str]:
    for candidate in report.measured:
        ratio = speedup_figure(candidate)
        if ratio is None:
            continue
        low, high = (ratio.value if end is None else end for end in (ratio.low, ratio.high))
        if noise.hides(low, high):
            yield f"The speed-up of {candidate.name}, {ratio.text}, is within the noise."
