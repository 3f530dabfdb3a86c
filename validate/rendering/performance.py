"""Written text and MLPerf's scenarios as tables, and what is to be known of the times beside them, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from ..records.performance import Generation, Noise, Scenario, ScenarioTokens, TokenTimes
from ..records.report import Candidate, Report, short_number, size_text
from .figures import Figure, figure_of, speedup_figure

GENERATION_HEADINGS = ("Candidate", "Batch × prompt", "First token (ms)", "Speed-up", "Per token (ms)", "Speed-up",
                       "Tokens a second", "Cache")  # fmt: skip
"""Those from the second on are figures. Times are medians, with the 99th percentile after them."""
TOKEN_HEADINGS = ("Candidate", "Scenario", "First token p50 (ms)", "p90", "p99", "Per token p50 (ms)", "p90", "p99",
                  "Tokens a second")  # fmt: skip
"""LoadGen's token latencies; those from the third on are figures."""

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
        name += "".join(f", {bound}" for bound in _bounds(scenario))
    verdict = "VALID" if scenario.validity == "valid" else f"INVALID: {scenario.reason}"
    times = (short_number(scenario.percentiles_ms.get(percentile), 3) for percentile in ("50", "90", "99"))
    return candidate.name, name, verdict, *times, short_number(scenario.samples_per_second, 3)


def _bounds(scenario: Scenario) -> Iterator[str]:
    tokens = scenario.tokens
    for what, bound in (
        ("bound", scenario.latency_bound_ms),
        ("first token within", tokens.ttft_bound_ms if tokens else None),
        ("each after it within", tokens.tpot_bound_ms if tokens else None),
    ):
        if bound is not None:
            yield f"{what} {short_number(bound, 3)} ms"


def token_rows(report: Report) -> list[tuple[str, ...]]:
    """One row a candidate and scenario of texts, under `TOKEN_HEADINGS`."""
    return [
        (candidate.name, _NAMES[scenario.name], *_token_cells(scenario.tokens))
        for candidate in report.measured
        for scenario in candidate.scenarios
        if scenario.tokens
    ]


def _token_cells(tokens: ScenarioTokens) -> Iterator[str]:
    for times in (tokens.ttft_ms, tokens.tpot_ms):
        yield from (short_number(times.get(percentile), 3) for percentile in ("50", "90", "99"))
    yield short_number(tokens.per_second, 3)


def generation_rows(report: Report) -> list[tuple[str, ...]]:
    """One row a candidate and shape, under `GENERATION_HEADINGS`."""
    return [_written(candidate.name, each) for candidate in report.measured for each in candidate.generations]


def _written(name: str, found: Generation) -> tuple[str, ...]:
    shape = f"{found.batch_size} × {found.prompt_tokens}"
    times = (cell for each in (found.ttft, found.tpot) for cell in (_times(each), _ratio(each)))
    return name, shape, *times, short_number(found.tokens_per_second, 3), size_text(found.cache_bytes)


def _times(found: TokenTimes) -> str:
    return f"{short_number(found.p50_ms, 3)} ({short_number(found.p99_ms, 3)})"


def _ratio(found: TokenTimes) -> str:
    return "–" if found.speedup is None else f"{short_number(found.speedup, 3)}×"


def generation_note(report: Report) -> str:
    """What the table of written text is about; nothing where there is none."""
    found = [each for candidate in report.measured for each in candidate.generations]
    if not found:
        return ""
    threads = f"{found[0].threads} thread{'' if found[0].threads == 1 else 's'}"
    return (
        f"Medians, and the 99th percentile after each. {found[0].new_tokens} tokens were written after every prompt, "
        f"greedily, with {threads}; a batch takes one step for each token. Tokens a second are those of all its texts "
        "after the first token; the cache is what is kept in the end. Speed-ups are to the first candidate."
    )


def remarks(report: Report) -> list[str]:
    """What was not steady, what may be noise, and what became of energy."""
    unsettled = [
        candidate.name
        for candidate in report.measured
        if not all(each.settled for each in candidate.latencies)
        or not all(each.settled for each in candidate.generations)
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
        for what, ratio in _speedups(candidate):
            low, high = (ratio.value if end is None else end for end in (ratio.low, ratio.high))
            if noise.hides(low, high):
                yield f"The speed-up of {candidate.name}{what}, {ratio.text}, is within the noise."


def _speedups(candidate: Candidate) -> Iterator[tuple[str, Figure]]:
    """What noise is held against: the speed-up of single calls; of text that of a token, at the first shape."""
    for what, figure in (
        ("", speedup_figure(candidate)),
        (" per token", figure_of(candidate.metric("tpot_speedup_p50"))),
    ):
        if figure is not None:
            yield what, figure
