"""What `limbeck validate` costs beyond running the models: its own time as a share of theirs, the statistics, memory.

    LIMBECK_DATA=... LIMBECK_MODELS=... python benchmarks/validation_overhead.py ARTIFACT [--rows 1000 10000]

ARTIFACT is an export of `sst2-minilm`, or of the model that `--teacher` names; the rows are SST-2's training sentences.
A process of its own for every number of rows, after one that fills the cache of reference graphs. Time inside the
models is what their calls take, inside the statistics what figures and their intervals take; the rest is validate's
own: reading, tokenising, batching, checks, comparisons, the report.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.backends.onnx import OnnxRunner
from limbeck.backends.openvino import OpenVINORunner
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.recipes.steps import validate
from limbeck.validate import measurement
from limbeck.validate.attribution import points
from limbeck.validate.performance.worker import peak_memory_mb

WARM_UP = 64
_depth: dict[str, int] = defaultdict(int)
_seconds: dict[str, float] = defaultdict(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIMBECK_DATA", "../shared/data")))
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = Path(os.environ.get("LIMBECK_MODELS", "../shared/models"))
    options.teacher = options.teacher or models / "sst2-minilm"
    if options.one:
        print(json.dumps(_validate_here(options)), flush=True)
        return
    print("| rows | whole s | models s | statistics s | validate's own s | own / models | peak MiB |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for rows in (WARM_UP, *options.rows):
        found = _in_a_process(options, rows)
        if rows != WARM_UP:
            own = found["whole"] - found["models"] - found["statistics"]
            print(
                f"| {rows:,} | {found['whole']:.1f} | {found['models']:.1f} | {found['statistics']:.1f} | {own:.1f} "
                f"| {own / found['models']:.1%} | {found['peak']:.0f} |",
                flush=True,
            )


def _in_a_process(options: argparse.Namespace, rows: int) -> dict[str, float]:
    command = [sys.executable, __file__, str(options.artifact), "--one", str(rows)]
    command += ["--data", str(options.data), "--teacher", str(options.teacher)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _validate_here(options: argparse.Namespace) -> dict[str, float]:
    teacher = load_checkpoint(options.teacher)
    data = teacher.read(options.data / "sst2" / "train.jsonl.gz").head(options.one)
    for owner, name in ((Checkpoint, "run"), (OnnxRunner, "__call__"), (OpenVINORunner, "__call__")):
        setattr(owner, name, _timed("models", getattr(owner, name)))
    for room, name in ((measurement, "measure_quality"), (points, "paired_difference")):
        setattr(room, name, _timed("statistics", getattr(room, name)))
    begun = time.perf_counter()
    validate({"artifact": options.artifact}, teacher, data)
    return {"whole": time.perf_counter() - begun, "peak": peak_memory_mb(), **_seconds}


def _timed(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, its time added up; a call within one of its kind is not counted twice."""

    @functools.wraps(call)
    def timed(*args: Any, **named: Any) -> Any:
        begun, _depth[kind] = time.perf_counter(), _depth[kind] + 1
        try:
            return call(*args, **named)
        finally:
            _depth[kind] -= 1
            if not _depth[kind]:
                _seconds[kind] += time.perf_counter() - begun

    return timed


if __name__ == "__main__":
    main()
