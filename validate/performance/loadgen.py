"""One test of MLPerf's LoadGen on a prepared call, in this process: LoadGen decides when queries come and what their
results are worth; limbeck only answers them.

The program's call takes a whole batch, and a sample of LoadGen's is one sequence: samples that wait are answered as
many at a time as the batch holds, and a query that brings fewer leaves the rest of its batch unused. What a scenario
is: Reddi et al., "MLPerf Inference Benchmark" (ISCA 2020, arXiv:1911.02549), section III; how few queries suffice:
"Early Stopping Criterion" in https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc. Every
result is read from LoadGen's own `mlperf_log_detail.txt`.

Token latencies (time to first token, time per output token) are a setting of LoadGen's, `use_token_latencies`, with
`FirstTokenComplete` called between issue and end. That takes a runner that generates token by token with a cache of
keys and values, which limbeck has none of yet; its place is a `_Program` of its own.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...environment import is_importable
from ...errors import BackendUnavailable, LimbeckError
from ..records.performance import ScenarioName

MULTI_STREAM_SAMPLES = 8
"""Samples of a MultiStream query: MLPerf's own number."""
_LEAD_IN_CALLS = 3
_SCENARIOS = {"single_stream": "SingleStream", "multi_stream": "MultiStream", "offline": "Offline", "server": "Server"}
_LOG_PREFIX = ":::MLLOG "
_LOG = "mlperf_log_detail.txt"
_PERCENTILES = ("50", "90", "95", "97", "99", "99.9")
_ROOM = 1.25
"""Offline's samples are counted beforehand; a machine that is so much faster than while it warmed up is still busy for
the whole duration."""


class LoadGenInterrupted(LimbeckError):
    """LoadGen ended without a result: its log stops before the end."""


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


def require_loadgen() -> None:
    """Raises:
    BackendUnavailable: LoadGen is not installed."""
    if not is_importable("mlperf_loadgen"):
        raise BackendUnavailable(
            "MLPerf's scenarios need LoadGen, which is not installed.", 'Install it: pip install "limbeck[perf]".'
        )


def run_loadgen(call: Callable[[], object], load: Load, logs: Path) -> Outcome:
    """Run one test and read its result.

    Args:
        call: the prepared call of one batch.
        logs: an empty folder that LoadGen writes its logs to.

    Raises:
        BackendUnavailable: LoadGen is not installed.
        LoadGenInterrupted: it ended without a result.
        Exception: what the call raised; LoadGen is let come to its end first, since it cannot be stopped.
    """
    require_loadgen()
    import mlperf_loadgen as loadgen

    program = _QueueingProgram(call, load.batch_size) if load.scenario == "server" else _Program(call, load.batch_size)
    sut = loadgen.ConstructSUT(program.issued, lambda: None)
    library = loadgen.ConstructQSL(1, 1, lambda _: None, lambda _: None)  # one input, bound already
    try:
        with program:
            loadgen.StartTestWithLogSettings(sut, library, _settings(load), _log_settings(logs), "")
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(sut)
    if program.failure is not None:
        raise program.failure
    return read_outcome(logs / _LOG, load)


class _Program:
    """LoadGen's "system under test": answers a query before LoadGen may issue the next.

    A call that fails is never made again: what is still asked is answered at once, so that LoadGen comes to its end,
    and `failure` says what was raised.
    """

    def __init__(self, call: Callable[[], object], batch_size: int) -> None:
        self._call = call
        self._batch_size = batch_size
        self.failure: Exception | None = None

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return

    def issued(self, samples: list[Any]) -> None:
        """LoadGen has issued a query."""
        self.answer(samples)

    def answer(self, samples: Sequence[Any]) -> None:
        """Run the program as often as these samples take, and tell LoadGen of each that is done."""
        import mlperf_loadgen as loadgen

        for start in range(0, len(samples), self._batch_size):
            self.compute()
            loadgen.QuerySamplesComplete(
                [loadgen.QuerySampleResponse(each.id, 0, 0) for each in samples[start : start + self._batch_size]]
            )

    def compute(self) -> None:
        """One call of the program."""
        if self.failure is None:
            try:
                self._call()
            except Exception as error:
                self.failure = error


class _QueueingProgram(_Program):
    """Queries wait for a thread of their own, which takes as many at a time as a batch holds: LoadGen's goes on issuing
    them whenever they are due."""

    def __init__(self, call: Callable[[], object], batch_size: int) -> None:
        super().__init__(call, batch_size)
        self._waiting: SimpleQueue[list[Any] | None] = SimpleQueue()
        self._server = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> None:
        self._server.start()
        self._ready.wait()

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._server.join()

    def issued(self, samples: list[Any]) -> None:
        self._waiting.put(samples)

    def _serve(self) -> None:
        for _ in range(_LEAD_IN_CALLS):  # a runtime may have a pool of threads for every thread that calls it
            self.compute()
        self._ready.set()
        while (samples := self._waiting.get()) is not None:
            taken = list(samples)
            while len(taken) < self._batch_size:
                try:
                    taken += self._waiting.get_nowait() or []
                except Empty:
                    break
            self.answer(taken)


def _settings(load: Load) -> Any:
    import mlperf_loadgen as loadgen

    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, _SCENARIOS[load.scenario])
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = max(1, round(load.seconds * 1e3))
    settings.min_query_count = 1  # the duration decides, and early stopping says whether that was enough
    settings.sample_index_rng_seed = settings.schedule_rng_seed = settings.qsl_rng_seed = load.seed
    call_ns = load.typical_ms * 1e6
    # half of what is expected: LoadGen draws queries for the whole duration, and must not run out of them
    settings.single_stream_expected_latency_ns = max(1, round(call_ns / 2))
    settings.multi_stream_samples_per_query = MULTI_STREAM_SAMPLES
    calls = math.ceil(MULTI_STREAM_SAMPLES / load.batch_size)
    settings.multi_stream_expected_latency_ns = max(1, round(calls * call_ns / 2))
    settings.offline_expected_qps = _ROOM * load.batch_size * 1e9 / call_ns
    if load.target_qps is not None and load.latency_bound_ms is not None:
        settings.server_target_qps = load.target_qps
        settings.server_target_latency_ns = max(1, round(load.latency_bound_ms * 1e6))
        settings.server_target_latency_percentile = 0.99
    return settings


def _log_settings(folder: Path) -> Any:
    import mlperf_loadgen as loadgen

    settings = loadgen.LogSettings()
    settings.enable_trace = False
    settings.log_output.outdir = str(folder)
    settings.log_output.copy_summary_to_stdout = False
    return settings


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
            f"LoadGen was interrupted: its log has no result of the {_SCENARIOS[load.scenario]} scenario.",
            "Run it again; a test takes its whole --duration.",
        ) from error


def _outcome(found: dict[str, Any], load: Load) -> Outcome:
    scenario, queries = load.scenario, int(found["result_query_count"])
    per_query = "_per_query" if scenario == "multi_stream" else ""
    percentiles = {} if scenario == "offline" else {
        name: found[f"result_{float(name):.2f}_percentile{per_query}_latency_ns"] / 1e6 for name in _PERCENTILES
    }  # fmt: skip
    validity, reason = _validity(found, load, percentiles)
    key = {"single_stream": "early_stopping_latency_ss", "multi_stream": "early_stopping_latency_ms"}.get(scenario)
    estimate = found.get(key, 0) / 1e6 if key and found["early_stopping_met"] else None
    return Outcome(
        queries=queries,
        samples_per_second=_rate(found, load, queries),
        validity=validity,
        reason=reason,
        percentiles_ms=percentiles,
        early_stopping_ms=estimate or None,
        loadgen=str(found["loadgen_version"]).partition(" ")[0],
    )


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
        late = int(found["result_overlatency_query_count"])
        return "invalid", (
            f"99 % of queries took up to {percentiles_ms['99']:.3g} ms, over the bound of {load.latency_bound_ms:g} ms "
            f"({late:,} of {int(found['result_query_count']):,} were late)"
        )
    if not found["result_min_duration_met"]:
        return "undecided", f"it ran out of queries before the {load.seconds:g} seconds were over"
    told = str(found["early_stopping_result"]).replace("*", " ")
    more = re.search(r"at least (\d+ more|\d+) queries", told)
    wanted = f"LoadGen wants at least {more.group(1)}" if more else " ".join(told.split())
    return "undecided", f"{int(found['result_query_count']):,} queries are too few: {wanted} (a longer --duration)"
