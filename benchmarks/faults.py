"""What validation catches, and how often it cries wolf.

    python benchmarks/faults.py --out DIR [--runs 200]

Writes `DIR/faults.md`, the table of the faults that `tests/faults` plants: which check caught each, what it said,
seconds to the verdict. With `--runs N` it also validates good artifacts of a trained classifier (`LIMBECK_MODELS`) N
times, each on 100 other rows of SST-2 (`LIMBECK_DATA`), checks and a gate on accuracy included, and counts the
verdicts; and once an int8 that was calibrated on random tokens, which must fail.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from limbeck.exporters.settings import ExportSettings
from limbeck.models.batching import Batch
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.recipes import exporting
from limbeck.recipes.steps import ValidationAsked, export, validate
from limbeck.validate.records.report import Gate, Report

ROWS = 100
ARTIFACTS = (("onnx", "fp32"), ("onnx", "int8"), ("openvino", "int8"))
GATE = Gate(metric="accuracy_difference", min=-0.08, why="a good artifact is as good as its teacher")


def table_of_faults(out: Path) -> None:
    """The tests write it; they stop this when one of them fails."""
    tests = Path(__file__).parents[1] / "tests" / "faults"
    words = [sys.executable, "-m", "pytest", "-n", "0", "--no-cov", "-q", str(tests), "--faults", str(out)]
    subprocess.run(words, check=True)


def exported(teacher: Checkpoint, backend: str, precision: str, calibration: Data, out: Path) -> Path:
    """Made once for all runs."""
    if not out.exists():
        settings = ExportSettings(backend=backend, precision=precision)
        export(teacher, settings, out, calibration=calibration, beside_float=False)
    return out


def random_tokens(checkpoint: Checkpoint, data: Data | None, settings: ExportSettings) -> list[Batch]:
    """Calibration on noise."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(checkpoint.model.config.vocab_size)
    ids = torch.randint(1000, vocabulary, (100, 1, 64), generator=generator)
    named = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    names = checkpoint.input_names
    return [{name: batch.get(name, torch.zeros_like(batch["input_ids"])) for name in names} for batch in named]


def failed_checks(report: Report) -> list[str]:
    return [f"{check.name}: {check.detail}" for _, check in report.checks() if not check.passed]


def false_alarms(teacher: Checkpoint, data: Data, calibration: Data, out: Path, runs: int) -> None:
    """Prints the verdicts of `runs` whole validations, the artifacts in turn."""
    verdicts, seconds = Counter[str](), []
    for run in range(runs):
        backend, precision = ARTIFACTS[run % len(ARTIFACTS)]
        artifact = exported(teacher, backend, precision, calibration, out / f"{backend}-{precision}")
        drawn = np.random.default_rng(run).choice(len(data), ROWS, replace=False)
        rows = replace(data, rows=data.rows.select(drawn.tolist()))
        began = time.perf_counter()
        report = validate({artifact.name: artifact}, teacher, rows, ValidationAsked(gates=[GATE]))
        seconds.append(time.perf_counter() - began)
        verdicts[str(report.verdict)] += 1
        if report.verdict == "fail":
            said = [*failed_checks(report), *(g.reason for g in report.gates if g.verdict == "fail")]
            print(f"run {run} of {artifact.name} fails: {'; '.join(said)}", flush=True)
    counted = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    print(f"{runs} whole runs on {ROWS} rows: {counted}; median {np.median(seconds):.1f} s a run")


def noise(teacher: Checkpoint, data: Data, calibration: Data, out: Path) -> None:
    """Prints what is said of an int8 that was calibrated on random tokens."""
    exporting.calibration_batches = random_tokens
    for backend in ("onnx", "openvino"):
        artifact = exported(teacher, backend, "int8", calibration, out / f"{backend}-int8-noise")
        report = validate({artifact.name: artifact}, teacher, data.head(ROWS))
        print(f"{artifact.name}: {report.verdict}: {'; '.join(failed_checks(report))[:300]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--no-table", action="store_true", help="the runs only")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if not asked.no_table:
        table_of_faults(asked.out / "faults.md")
        print((asked.out / "faults.md").read_text())
    if asked.runs:
        teacher = load_checkpoint(Path(os.environ["LIMBECK_MODELS"]) / "sst2-minilm")
        sst2 = Path(os.environ["LIMBECK_DATA"]) / "sst2"
        data, calibration = (teacher.read(sst2 / f"{split}.jsonl.gz") for split in ("validation", "train"))
        false_alarms(teacher, data, calibration.head(300), asked.out, asked.runs)
        noise(teacher, data, calibration.head(300), asked.out)


if __name__ == "__main__":
    main()
