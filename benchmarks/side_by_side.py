"""What the distillation benchmarks share: train named students once each, then measure all of them on the same rows."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from limbeck.distill.distillation import Surroundings
from limbeck.distill.settings import DistillSettings
from limbeck.files import write_text
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.recipes.progress import Progress
from limbeck.recipes.steps import distill
from limbeck.recipes.teachers import teacher_runtime
from limbeck.validate.measurement import measure_checkpoint
from limbeck.validate.records.report import Metric
from limbeck.validate.standard import set_standard

METRICS = (
    "spearman", "spearman_kept", "recall_at_1", "recall_at_1_kept", "agreement_ranking",
    "agreement_spearman", "cosine_mean",
    "accuracy", "accuracy_kept", "accuracy_difference", "f1", "f1_kept", "f1_difference",
    "perplexity", "perplexity_ratio", "token_agreement",
)  # fmt: skip


def options(description: str, **numbers: int) -> argparse.Namespace:
    """Where the data, the models and the results are, and whole numbers with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIMBECK_DATA", "../shared/data")))
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("LIMBECK_MODELS", "../shared/models")))
    parser.add_argument("--out", type=Path, required=True, help="students and figures; a second run resumes")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def trained(
    name: str,
    teacher: Checkpoint,
    settings: DistillSettings,
    data: Data,
    out: Path,
    *,
    student: Checkpoint | None = None,
    runtime: str = "eager",
    cache: bool = False,
) -> Checkpoint:
    """The student of that name, trained if it is not there yet; says how long that took."""
    folder = out / name
    if not folder.exists():
        started = time.monotonic()
        around = Surroundings(
            teacher_runtime=lambda recorded: teacher_runtime(recorded, runtime),
            teacher_cache=out / f"{name}.teacher" if cache else None,
            work=out / f"{name}.training",
        )
        result = distill(teacher, settings, data, student=student, around=around, progress=_Lines(name))
        result.save(folder)
        print(f"{name}: trained in {time.monotonic() - started:.0f} s on {len(data):,} rows", flush=True)
    return load_checkpoint(folder, teacher.task.name)


class _Lines(Progress):
    """A line at every tenth of a training."""

    def __init__(self, name: str) -> None:
        self._name = name

    def say(self, text: str) -> None:
        print(f"{self._name}: {text}", flush=True)

    def advance(self, done: int, total: int) -> None:
        if done and done % max(total // 10, 1) == 0:
            print(f"{self._name}: {done} of {total}", flush=True)


def compare(teacher: Checkpoint, students: Mapping[str, Checkpoint], data: Data, out: Path) -> None:
    """Report every metric of every student on these rows."""
    standard = set_standard(teacher, data)
    metrics = {
        name: measure_checkpoint(name, student, standard, lambda done, total: None).metrics
        for name, student in students.items()
    }
    report(f"{standard.data_name} ({len(data):,} rows)", metrics, out / f"{standard.data_name.split('.')[0]}.md")


def report(measured_on: str, metrics: Mapping[str, Sequence[Metric]], path: Path) -> None:
    """Print each student's metrics with 95 % intervals, the teacher's beside them, and keep them as Markdown."""
    lines = [f"On {measured_on}:", "", "| student | metric | value | 95 % | teacher |", "|---|---|---:|---|---:|"]
    for student, measured in metrics.items():
        found = {metric.name: metric for metric in measured}
        for metric in (found[wanted] for wanted in METRICS if wanted in found):
            theirs = "" if metric.teacher is None else f"{metric.teacher:.4f}"
            interval = f"{metric.low:.4f} to {metric.high:.4f}" if metric.low is not None else ""
            lines.append(f"| {student} | {metric.name} | {metric.value:.4f} | {interval} | {theirs} |")
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    write_text(path, text)


def written(texts: Iterable[str], path: Path) -> Path:
    """These texts as JSON lines, one a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def joined(folder: Path, files: Iterable[str], field: str = "text") -> list[str]:
    """The texts of several JSON-lines files, in order."""
    from datasets import load_dataset

    texts: list[str] = []
    for file in files:
        texts += load_dataset("json", data_files=str(folder / file), split="train")[field]
    return texts
