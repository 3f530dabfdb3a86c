"""What LoadGen adds to a call: SingleStream against the bare loop of `limbeck bench`, in one process and in turn.

    python benchmarks/loadgen_overhead.py ARTIFACT [--sequence-length 32]

An empty call shows what LoadGen costs by itself; on a real one, the difference is mostly the machine's noise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from limbeck.backends.registry import load_runner
from limbeck.exporters.inputs import random_batch
from limbeck.validate.performance.loadgen import run_loadgen
from limbeck.validate.performance.loadgen_log import Load
from limbeck.validate.performance.worker import garbage_left_alone, timed, warm_up

ROUNDS = 7
SECONDS = 0.5


def main() -> None:
    """Print both, for an empty call and for the artifact's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--sequence-length", type=int, default=32)
    asked = parser.parse_args()
    runner, manifest = load_runner(asked.artifact, threads=1)
    names = [spec.name for spec in manifest.inputs]
    batch = random_batch(names, 1_000, (1, asked.sequence_length), seed=0)
    for name, call in (("empty call", lambda: None), (asked.artifact.name, runner.prepare(batch))):
        bare, loaded = compared(call)
        print(
            f"{name}: bare loop {bare * 1e3:,.2f} us, LoadGen {loaded * 1e3:,.2f} us, "
            f"{(loaded - bare) * 1e3:+.2f} us a query"
        )


def compared(call: Callable[[], object]) -> tuple[float, float]:
    """The median of some rounds' median milliseconds, by the bare loop and by LoadGen."""
    _, _, typical_ms = warm_up(call, 2.0, 0.03)
    load = Load(scenario="single_stream", batch_size=1, seconds=SECONDS, typical_ms=max(typical_ms, 1e-3))
    bare, loaded = [], []
    for _ in range(ROUNDS):
        calls = min(200_000, max(20, int(SECONDS * 1e3 / max(typical_ms, 1e-4))))
        bare.append(statistics.median(timed(call, calls)))
        with TemporaryDirectory() as logs, garbage_left_alone():
            loaded.append(run_loadgen(call, load, Path(logs)).percentiles_ms["50"])
    return statistics.median(bare), statistics.median(loaded)


if __name__ == "__main__":
    main()
