"""One test of MLPerf's LoadGen on a prepared call, in this process: LoadGen decides when queries come and what their
results are worth; limbeck only answers them (`loadgen_log.py` reads what it found).

The program's call takes a whole batch, and a sample of LoadGen's is one sequence: samples that wait are answered as
many at a time as the batch holds, and a query that brings fewer leaves the rest of its batch unused. What a scenario
is: Reddi et al., "MLPerf Inference Benchmark" (ISCA 2020, arXiv:1911.02549), section III; how few queries suffice:
"Early Stopping Criterion" in https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc. Every
result is read from LoadGen's own `mlperf_log_detail.txt`.

Where a sample is a text that is written, LoadGen also times its tokens (`use_token_latencies`): it is told when a text
has its first (`FirstTokenComplete`) and how many there are in the end. Offline has a rate of tokens only, since all of
its samples wait from the start.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ...environment import is_importable
from ...errors import BackendUnavailable
from .loadgen_log import LOG, MULTI_STREAM_SAMPLES, SCENARIOS, Load, Outcome, read_outcome

_LEAD_IN_CALLS = 3
_NEVER_NS = 10**15
_ROOM = 1.25
"""Offline's samples are counted beforehand; a machine that is so much faster than while it warmed up is still busy for
the whole duration."""


def require_loadgen() -> None:
    """Raises:
    BackendUnavailable: LoadGen is not installed."""
    if not is_importable("mlperf_loadgen"):
        raise BackendUnavailable(
            "MLPerf's scenarios need LoadGen, which is not installed.", 'Install it: pip install "limbeck[perf]".'
        )


def run_loadgen(call: Callable[..., object], load: Load, logs: Path) -> Outcome:
    """Run one test and read its result.

    Args:
        call: the prepared call of one batch; of texts with one argument (see `Load.texts`).
        logs: an empty folder that LoadGen writes its logs to.

    Raises:
        BackendUnavailable: LoadGen is not installed.
        LoadGenInterrupted: it ended without a result.
        Exception: what the call raised; LoadGen is let come to its end first, since it cannot be stopped.
    """
    require_loadgen()
    import mlperf_loadgen as loadgen

    answering = _Writing(call, load.texts.new_tokens) if load.texts else _Answering(call)
    kind = _QueueingProgram if load.scenario == "server" else _Program
    program = kind(answering, load.batch_size)
    sut = loadgen.ConstructSUT(program.issued, lambda: None)
    library = loadgen.ConstructQSL(1, 1, lambda _: None, lambda _: None)  # one input, bound already
    try:
        with program:
            loadgen.StartTestWithLogSettings(sut, library, _settings(load), _log_settings(logs), "")
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(sut)
    if answering.failure is not None:
        raise answering.failure
    return read_outcome(logs / LOG, load)


class _Answering:
    """Answers as many samples as the batch holds, by one call.

    A call that fails is never made again: what is still asked is answered at once, so that LoadGen comes to its end,
    and `failure` says what was raised.
    """

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call
        self.failure: Exception | None = None

    def __call__(self, samples: Sequence[Any]) -> None:
        """Run the program, and tell LoadGen of these samples that they are done; of none while it warms up."""
        import mlperf_loadgen as loadgen

        self._tried(self._call)
        if samples:
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(each.id, 0, 0) for each in samples])

    def _tried(self, work: Callable[[], object]) -> None:
        if self.failure is None:
            try:
                work()
            except Exception as error:
                self.failure = error


class _Writing(_Answering):
    """The same where a sample is a text."""

    def __init__(self, call: Callable[..., object], new_tokens: int) -> None:
        super().__init__(call)
        self._new_tokens = new_tokens

    def __call__(self, samples: Sequence[Any]) -> None:
        import mlperf_loadgen as loadgen

        told: list[bool] = []

        def first_tokens() -> None:
            told.append(True)
            if samples:
                loadgen.FirstTokenComplete([loadgen.QuerySampleResponse(each.id, 0, 0) for each in samples])

        self._tried(lambda: self._call(first_tokens))
        if not told:  # it failed before: LoadGen waits for a first token, too
            first_tokens()
        if samples:
            ended = [loadgen.QuerySampleResponse(each.id, 0, 0, self._new_tokens) for each in samples]
            loadgen.QuerySamplesComplete(ended)


class _Program:
    """LoadGen's "system under test": answers a query before LoadGen may issue the next."""

    def __init__(self, answering: _Answering, batch_size: int) -> None:
        self._answering = answering
        self._batch_size = batch_size

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return

    def issued(self, samples: list[Any]) -> None:
        """LoadGen has issued a query."""
        self.answer(samples)

    def answer(self, samples: Sequence[Any]) -> None:
        """Run the program as often as these samples take."""
        for start in range(0, len(samples), self._batch_size):
            self._answering(samples[start : start + self._batch_size])


class _QueueingProgram(_Program):
    """Queries wait for a thread of their own, which takes as many at a time as a batch holds: LoadGen's goes on issuing
    them whenever they are due."""

    def __init__(self, answering: _Answering, batch_size: int) -> None:
        super().__init__(answering, batch_size)
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
            self._answering(())
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
    settings.scenario = getattr(loadgen.TestScenario, SCENARIOS[load.scenario])
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
    if load.target_qps is not None:
        settings.server_target_qps = load.target_qps
        settings.server_target_latency_percentile = 0.99
        settings.server_target_latency_ns = _nanoseconds(load.latency_bound_ms)
    if load.texts is not None:
        settings.use_token_latencies = True
        settings.ttft_latency = _nanoseconds(load.texts.ttft_bound_ms)
        settings.tpot_latency = _nanoseconds(load.texts.tpot_bound_ms)
    return settings


def _nanoseconds(bound_ms: float | None) -> int:
    """A bound as LoadGen takes it; where there is none, so far off that nothing is late."""
    return max(1, round(bound_ms * 1e6)) if bound_ms is not None else _NEVER_NS


def _log_settings(folder: Path) -> Any:
    import mlperf_loadgen as loadgen

    settings = loadgen.LogSettings()
    settings.enable_trace = False
    settings.log_output.outdir = str(folder)
    settings.log_output.copy_summary_to_stdout = False
    return settings
