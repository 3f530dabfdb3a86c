"""One subject of `bench`, in a process of its own: `python -m limbeck.validate.performance.worker`.

Reads one JSON command a line from standard input and answers each with one JSON line: `load`, `prepare`, `round`,
`scenario`, `end`; `open_writer`, `prepare_texts` and `write_round` where text is written. Between commands it is
blocked on the read; it answers a command only when its thread pools have stopped spinning, so that the next subject has
the machine to itself. The end of standard input is the end of the process, so a parent that is killed leaves no worker
behind.

A mistake of the user's (`LimbeckError`) is an answer; anything else is a traceback on standard error and a dead worker.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...backends.base import Runner
from ...backends.decoder import Decoder
from ...backends.registry import load_runner
from ...backends.torch_eager import EagerRunner
from ...backends.writing import require_text
from ...errors import BackendUnavailable, InputError, LimbeckError
from ...exporters.inputs import random_batch, vocabulary_of
from ...files import read_json
from ...models.batching import Batch
from ...models.checkpoint import load_checkpoint, max_positions
from .energy import POWERCAP, Device, Meter, NoMeter, find_meter
from .writing import TextShape, TimedWriter

Timings = TypeVar("Timings")

_LEAD_IN_CALLS = 2
_LEAD_IN_SECONDS = 0.02
_WINDOW_CALLS = 5
_WINDOW_SECONDS = 0.05
_QUIET_WINDOW_SECONDS = 0.02
_QUIET_SHARE = 0.05
_LONGEST_SETTLING_SECONDS = 1.0


@dataclass
class _Loaded:
    """What `load` leaves for the commands after it."""

    runner: Runner
    input_names: list[str]
    positions: int | None
    """Tokens a checkpoint has positions for; an artifact's program knows its own bounds."""
    max_length: int
    """Tokens that a text may have."""
    task: str
    stand_in: str | None = None
    """What runs here in the program's place (see `Manifest`)."""


class LatencyWorker:
    """The commands; each method answers one, with JSON-ready values. Times in milliseconds, memory in MiB."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._powercap = powercap
        self._loaded: _Loaded | None = None
        self._batch: Batch = {}  # kept: a runtime may read its bound inputs in place
        self._call: Callable[[], object] = lambda: None
        self._decoder: Decoder | None = None
        self._writer: TimedWriter | None = None
        self._load_ms = 0.0
        self._memory_before_mb: float | None = None
        self._meter: Meter | NoMeter = NoMeter("nothing was loaded")
        self._went_quiet = (time.perf_counter(), time.process_time())

    @property
    def commands(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """Every command by its name."""
        return {
            "load": self.load,
            "prepare": self.prepare,
            "round": self.round,
            "scenario": self.scenario,
            "open_writer": self.open_writer,
            "prepare_texts": self.prepare_texts,
            "write_round": self.write_round,
            "end": self.end,
        }

    def load(self, path: str, kind: str, task: str | None, threads: int, cpus: list[int]) -> dict[str, Any]:
        """Open a checkpoint (eager torch) or an artifact (its backend's runtime), on these CPUs (on any where there are
        none), to which its threads are bound from the start."""
        if cpus:
            os.sched_setaffinity(0, cpus)
        self._memory_before_mb = private_memory_mb()
        start = time.perf_counter()
        folder = Path(path)
        if kind == "checkpoint":
            checkpoint = load_checkpoint(path, task)
            vocabulary = vocabulary_of(checkpoint.model.config.to_dict(), folder)
            runner: Runner = EagerRunner(checkpoint, threads)
            positions = max_positions(checkpoint.model)
            names, longest = checkpoint.input_names, checkpoint.max_length
            self._loaded = _Loaded(runner, names, positions, longest, checkpoint.task.name)
        else:
            runner, manifest = load_runner(folder, threads=threads)
            vocabulary = vocabulary_of(read_json(folder / "config.json"), folder)
            names = [spec.name for spec in manifest.inputs]
            self._loaded = _Loaded(runner, names, None, manifest.max_length, manifest.task, manifest.stand_in)
        self._load_ms = (time.perf_counter() - start) * 1e3
        device: Device = "gpu" if "device" in runner.properties else "cpu"  # runtimes of the CPU name none
        self._meter = find_meter(device, self._powercap)
        return {"vocabulary": vocabulary, "properties": dict(runner.properties)}

    def prepare(
        self, vocabulary: int, shape: list[int], seed: int, warm_up_seconds: float, tolerance: float
    ) -> dict[str, Any]:
        """Bind the batch and call until warm; the first answer ends the cold start."""
        loaded = self._subject()
        batch, sequence = shape
        if loaded.positions is not None and sequence > loaded.positions:
            raise InputError(
                f"The model has positions for {loaded.positions} tokens; it cannot be timed at {sequence}.",
                f"Ask for --sequence-length {loaded.positions} or less.",
            )
        self._batch = random_batch(loaded.input_names, vocabulary, (batch, sequence), seed)
        start = time.perf_counter()
        loaded.runner(self._batch)  # not the prepared call: this one says in words what is wrong with a shape
        cold_start_ms = self._load_ms + (time.perf_counter() - start) * 1e3
        self._call = loaded.runner.prepare(self._batch)
        calls, settled, typical_ms = warm_up(self._call, warm_up_seconds, tolerance)
        return {
            "cold_start_ms": cold_start_ms,
            "warm_up_calls": calls,
            "warm_up_settled": settled,
            "typical_ms": typical_ms,
        }

    def round(self, calls: int) -> dict[str, Any]:
        """Time that many calls, after a few that wake the threads; and how busy the wait for this round was."""
        waited = self._waited()
        woken = time.perf_counter() + _LEAD_IN_SECONDS
        for done in range(calls):
            if done >= _LEAD_IN_CALLS and time.perf_counter() >= woken:
                break
            self._call()
        samples, spent = self._metered(lambda: timed(self._call, calls))
        return {"samples_ms": samples, **waited, **spent}

    def _waited(self) -> dict[str, float]:
        """How long this process waited for its turn, and how busy it was meanwhile."""
        wall, busy = time.perf_counter() - self._went_quiet[0], time.process_time() - self._went_quiet[1]
        return {"waited_seconds": wall, "waited_cpu_seconds": busy}

    def _metered(self, work: Callable[[], Timings]) -> tuple[Timings, dict[str, float | None]]:
        """What a piece of work comes to, and what it cost."""
        self._joules()
        cpu, start = time.process_time(), time.perf_counter()
        found = work()
        return found, {
            "joules": self._joules(),
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
        }

    def open_writer(self) -> dict[str, Any]:
        """Get ready to write text, where what was loaded can, and say how long a text may be."""
        loaded = self._subject()
        require_text(loaded.task)
        if loaded.stand_in is not None:
            raise BackendUnavailable(f"What runs here is {loaded.stand_in}, whose times say nothing of the program.")
        start = time.perf_counter()
        self._decoder = loaded.runner.decoder()
        self._load_ms += (time.perf_counter() - start) * 1e3
        return {"max_length": loaded.max_length}

    def prepare_texts(
        self, vocabulary: int, shape: dict[str, int], seed: int, warm_up_seconds: float, tolerance: float
    ) -> dict[str, Any]:
        """Write texts of this shape until warm; the first token of the first ends the cold start."""
        if self._decoder is None:
            raise RuntimeError("prepare_texts before open_writer")
        self._writer = TimedWriter(self._decoder, TextShape(**shape), vocabulary, seed)
        first_ms = self._writer.write().first_ms
        with garbage_left_alone():
            settled, last = self._writer.warm_up(warm_up_seconds, tolerance)
        return {
            "cold_start_ms": self._load_ms + first_ms,
            "settled": settled,
            "typical_ms": last.total_ms,
            "cache_bytes": self._writer.cache_bytes(),
        }

    def write_round(self, texts: int) -> dict[str, Any]:
        """Time that many batches of texts."""
        writer = self._writer
        if writer is None:
            raise RuntimeError("write_round before prepare_texts")
        waited = self._waited()
        writer.wake()
        with garbage_left_alone():
            times, spent = self._metered(lambda: [writer.write() for _ in range(texts)])
        steps = [step for each in times for step in each.steps_ms]
        return {"first_ms": [each.first_ms for each in times], "steps_ms": steps, **waited, **spent}

    def scenario(self, folder: str, **load: Any) -> dict[str, Any]:
        """One LoadGen test of the prepared call; its logs go to a folder of the one that asks."""
        from .loadgen import run_loadgen
        from .loadgen_log import Load

        call = self._writer.write if self._writer is not None else self._call
        with garbage_left_alone():
            return run_loadgen(call, Load(**load), Path(folder)).model_dump()

    def _subject(self) -> _Loaded:
        if self._loaded is None:
            raise RuntimeError("nothing was loaded yet")
        return self._loaded

    def end(self) -> dict[str, Any]:
        """What is known at the end: the memory's peak, what is private to the process now and how much of that came
        with the subject; the CPUs it ran on; the meter of energy, or why there is none."""
        now, before = private_memory_mb(), self._memory_before_mb
        grown = now - before if now is not None and before is not None else None
        memory = {"peak_memory_mb": peak_memory_mb(), "private_memory_mb": now, "program_memory_mb": grown}
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        meter = self._meter
        no_meter = meter.reason if isinstance(meter, NoMeter) else None
        return {**memory, "cpus": cpus, "meter": getattr(meter, "name", None), "no_meter": no_meter}

    def _joules(self) -> float | None:
        """Joules since this was last asked."""
        return None if isinstance(self._meter, NoMeter) else self._meter.joules_since_last()

    def settle(self) -> None:
        """Wait until this process has stopped using the CPU.

        Thread pools spin for a while after a call (OpenMP and TBB for milliseconds, ONNX Runtime's own too), which is
        part of how they are fast: they are not told to stop, they are waited for.
        """
        deadline = time.perf_counter() + _LONGEST_SETTLING_SECONDS
        while time.perf_counter() < deadline:
            wall, busy = time.perf_counter(), time.process_time()
            time.sleep(_QUIET_WINDOW_SECONDS)
            if time.process_time() - busy < _QUIET_SHARE * (time.perf_counter() - wall):
                break
        self._went_quiet = (time.perf_counter(), time.process_time())

    def close(self) -> None:
        """Free the device."""
        if self._loaded is not None:
            self._loaded.runner.close()


@contextmanager
def garbage_left_alone() -> Iterator[None]:
    """Collect garbage now, and not again before the block ends: where traces were made, a collection takes seconds."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed(call: Callable[[], object], calls: int) -> list[float]:
    """Milliseconds of each of `calls` calls; nothing but the call is between two looks at the clock."""
    clock, samples = time.perf_counter_ns, [0] * calls
    with garbage_left_alone():
        for index in range(calls):
            start = clock()
            call()
            samples[index] = clock() - start
    return [sample / 1e6 for sample in samples]


def warm_up(call: Callable[[], object], longest_seconds: float, tolerance: float) -> tuple[int, bool, float]:
    """Call until the medians of two windows in a row agree within `tolerance` (a share), for `longest_seconds` at most.

    Returns:
        How many calls it took, whether they came to agree, and the last window's median in milliseconds.
    """
    deadline = time.perf_counter() + longest_seconds
    done, previous = 0, float("nan")
    with garbage_left_alone():
        while True:
            window = _window(call)
            done += len(window)
            median = sorted(window)[len(window) // 2]
            if abs(median - previous) <= tolerance * median:
                return done, True, median
            if time.perf_counter() > deadline:
                return done, False, median
            previous = median


def _window(call: Callable[[], object]) -> list[float]:
    """Milliseconds of enough calls to take a median of."""
    samples: list[float] = []
    until = time.perf_counter() + _WINDOW_SECONDS
    while len(samples) < _WINDOW_CALLS or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def peak_memory_mb() -> float:
    """The most memory (MiB) this process had resident.

    Linux's `ru_maxrss` survives `exec`, so a worker would report its parent's; `VmHWM` starts anew.
    """
    if (kibibytes := _proc_kibibytes("/proc/self/status", ("VmHWM:",))) is not None:
        return kibibytes / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def private_memory_mb() -> float | None:
    """Memory (MiB) that would be freed if this process ended: pages shared with nobody. `None` where not known."""
    kibibytes = _proc_kibibytes("/proc/self/smaps_rollup", ("Private_Clean:", "Private_Dirty:"))
    return None if kibibytes is None else kibibytes / 1024


def _proc_kibibytes(path: str, fields: tuple[str, ...]) -> int | None:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return None  # not Linux, or hidden from us
    found = [int(line.split()[1]) for line in lines if line.startswith(fields)]
    return sum(found) if len(found) == len(fields) else None


def _as_answer(error: LimbeckError) -> dict[str, Any]:
    kinds = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, LimbeckError)]
    return {"error": {"kinds": kinds, "message": error.message, "hint": error.hint}}


def main() -> None:
    """Answer commands until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the parent decides
    # what a runtime prints must not mix with the answers: descriptor 1 becomes standard error
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = LatencyWorker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = worker.commands[command.pop("do")](**command)
        except LimbeckError as error:
            answer = _as_answer(error)
        text = json.dumps(answer)
        worker.settle()
        try:
            print(text, file=answers, flush=True)
        except BrokenPipeError:
            break  # the parent is gone
    worker.close()


if __name__ == "__main__":
    main()
