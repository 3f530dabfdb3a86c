"""What is asked of MLPerf's LoadGen, and what its own log says that came of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...errors import LimbeckError
from ..records.performance import ScenarioName, ScenarioTokens

MULTI_STREAM_SAMPLES = 8
"""Samples of a MultiStream query: MLPerf's own number."""
SCENARIOS = {"single_stream": "SingleStream", "multi_stream": "MultiStream", "offline": "Offline", "server": "Server"}
_LOG_PREFIX = ":::MLLOG "
LOG = "mlperf_log_detail.txt"
_STOPPED = ("early_stopping_result", "early_stopping_ttft_result", "early_stopping_tpot_result")
"""Where LoadGen says what early stopping asks for; of tokens where text is written."""
_PERCENTILES = ("50", "90", "95", "97", "99", "99.9")


class LoadGenInterrupted(LimbeckError):
    """LoadGen ended without a result: its log stops before the end."""


class Texts(BaseModel):
    """What is asked where text is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    new_tokens: int = Field(ge=2)
    ttft_bound_ms: float | None = Field(default=None, gt=0)
    """Server only: what 99 % of texts must have their first token within."""
    tpot_bound_ms: float | None = Field(default=None, gt=0)
    """Server only: what a token after it may take, on average of a text, in 99 % of texts."""


class Load(BaseModel):
    """What is asked of LoadGen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenario: ScenarioName
    batch_size: int = Field(ge=1)
    seconds: float = Field(gt=0)
    typical_ms: float = Field(gt=0)
    """About what a call takes: LoadGen draws its queries beforehand."""
    target_qps: float | None = Field(default=None, gt=0)
    """Server only: queries a second, arriving as a Poisson process."""
    latency_bound_ms: float | None = Field(default=None, gt=0)
    """Server only: what 99 % of queries must be answered within."""
    seed: int = Field(default=0, ge=0)
    texts: Texts | None = None
    """A call writes a batch of texts: it is given what to call once their first tokens are there."""


class Outcome(BaseModel):
    """What LoadGen found; the fields are those of `records.performance.Scenario`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queries: int
    samples_per_second: float
    validity: Literal["valid", "invalid", "undecided"]
    reason: str
    percentiles_ms: dict[str, float]
    early_stopping_ms: float | None
    loadgen: str
    tokens: ScenarioTokens | None = None


def read_outcome(log: Path, load: Load) -> Outcome:
    """The result in LoadGen's detailed log.

    Raises:
        LoadGenInterrupted: the log is missing, or stops before the result, or tells of an error of LoadGen's.
    """
    found: dict[str, Any] = {}
    try:
        for line in log.read_text(encoding="utf-8").splitlines():
            if line.startswith(_LOG_PREFIX):
                entry = json.loads(line.removeprefix(_LOG_PREFIX))
                if entry["metadata"]["is_error"]:
                    raise LoadGenInterrupted(f"LoadGen reports an error: {entry['key']}, {entry['value']}.")
                found[entry["key"]] = entry["value"]
        return _outcome(found, load)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadGenInterrupted(
            f"LoadGen was interrupted: its log has no result of the {SCENARIOS[load.scenario]} scenario.",
            "Run it again; a test takes its whole --duration.",
        ) from error


def _outcome(found: dict[str, Any], load: Load) -> Outcome:
    scenario, queries = load.scenario, int(found["result_query_count"])
    per_query = "_per_query" if scenario == "multi_stream" else ""
    key = f"result_{{}}_percentile{per_query}_latency_ns"
    percentiles = {} if scenario == "offline" else _percentiles(found, key)
    validity, reason = _validity(found, load, percentiles)
    stopped = {"single_stream": "early_stopping_latency_ss", "multi_stream": "early_stopping_latency_ms"}.get(scenario)
    stopped = None if load.texts else stopped  # LoadGen puts that of first tokens there
    estimate = found.get(stopped, 0) / 1e6 if stopped and found["early_stopping_met"] else None
    return Outcome(
        queries=queries,
        samples_per_second=_rate(found, load, queries),
        validity=validity,
        reason=reason,
        percentiles_ms=percentiles,
        early_stopping_ms=estimate or None,
        loadgen=str(found["loadgen_version"]).partition(" ")[0],
        tokens=_tokens(found, load.scenario, load.texts) if load.texts else None,
    )


def _tokens(found: dict[str, Any], scenario: ScenarioName, texts: Texts) -> ScenarioTokens:
    """Its token latencies."""
    if scenario == "offline":
        return ScenarioTokens(new_tokens=texts.new_tokens, per_second=float(found["result_tokens_per_second"]))
    single = scenario == "single_stream"
    return ScenarioTokens(
        **texts.model_dump(),
        per_second=float(found["result_completed_tokens_per_second"]),
        ttft_ms=_percentiles(found, "result_first_token_{}_percentile_latency_ns"),
        tpot_ms=_percentiles(found, "result_time_per_output_token_{}_percentile_ns"),
        ttft_early_stopping_ms=_estimate(found["early_stopping_ttft_result"]) if single else None,
        tpot_early_stopping_ms=_estimate(found["early_stopping_tpot_result"]) if single else None,
    )


def _percentiles(found: dict[str, Any], key: str) -> dict[str, float]:
    return {name: found[key.format(f"{float(name):.2f}")] / 1e6 for name in _PERCENTILES}


def _estimate(told: str) -> float | None:
    """The 90th percentile that LoadGen tells of in words alone, in nanoseconds; as milliseconds."""
    estimate = re.search(r"90\.0th percentile estimate: (\d+)", told)
    return int(estimate.group(1)) / 1e6 if estimate else None


def _rate(found: dict[str, Any], load: Load, queries: int) -> float:
    if load.scenario == "offline":
        return float(found["result_samples_per_second"])
    if load.scenario == "server":
        return float(found["result_completed_samples_per_sec"])
    if load.scenario == "single_stream":
        return float(found["result_qps_with_loadgen_overhead"])
    return MULTI_STREAM_SAMPLES * 1e9 / float(found["result_mean_query_latency_ns"])


def _validity(
    found: dict[str, Any], load: Load, percentiles_ms: dict[str, float]
) -> tuple[Literal["valid", "invalid", "undecided"], str]:
    """LoadGen's verdict, and why it is not VALID."""
    if found["result_validity"] == "VALID":
        return "valid", ""
    if not found.get("result_perf_constraints_met", True):
        return "invalid", _missed(found, load, percentiles_ms)
    if not found["result_min_duration_met"]:
        return "undecided", f"it ran out of queries before the {load.seconds:g} seconds were over"
    told = " ".join(str(found.get(key, "")) for key in _STOPPED).replace("*", " ")
    numbers = re.findall(r"at least (\d+ more|\d+) queries", told)
    most = max(numbers, key=lambda number: int(number.split()[0]), default=None)
    wanted = f"LoadGen wants at least {most}" if most else " ".join(told.split())
    return "undecided", f"{int(found['result_query_count']):,} queries are too few: {wanted} (a longer --duration)"


def _missed(found: dict[str, Any], load: Load, percentiles_ms: dict[str, float]) -> str:
    """Which bound, and by how much."""
    if load.texts is None:
        late = int(found["result_overlatency_query_count"])
        return (
            f"99 % of queries took up to {percentiles_ms['99']:.3g} ms, over the bound of {load.latency_bound_ms:g} ms "
            f"({late:,} of {int(found['result_query_count']):,} were late)"
        )
    tokens = _tokens(found, load.scenario, load.texts)
    bounds = (
        ("the first token of a text", tokens.ttft_ms["99"], tokens.ttft_bound_ms),
        ("a token after it", tokens.tpot_ms["99"], tokens.tpot_bound_ms),
    )
    over = [
        f"{what} took up to {took:.3g} ms in 99 % of texts, over the bound of {bound:g} ms"
        for what, took, bound in bounds
        if bound is not None and took > bound
    ]
    return "; ".join(over) or " ".join(str(found["result_invalid_reason"]).replace("*", " ").split())
