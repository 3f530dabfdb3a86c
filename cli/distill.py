"""`limbeck distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import (
    column_option,
    distill_settings,
    json_option,
    model_options,
    out_options,
    pairs,
    rationale_option,
    student_options,
    training_options,
)

EXAMPLES = """
\b
Examples:
  limbeck distill ./minilm --task sentence-similarity --data texts.jsonl --layers 3 --ffn 512 --out student
  limbeck distill ./bert-sst2 --data train.csv --column text=sentence --layers 0,5,11 \\
      --objective 'logits-kl={weight: 1, temperature: 4}' --objective labels=0.5 \\
      --eval-data dev.csv --patience 3 --out student
  accelerate launch --multi_gpu --num_processes 2 -m limbeck distill ./minilm --data t.jsonl --layers 3 --out student

\b
The same command after an interruption goes on from its last checkpoint, which lies in OUT.training until it has ended.
"""


@click.command(epilog=EXAMPLES)
@click.argument("teacher")
@click.option(
    "--data", required=True, metavar="FILE", help="Texts to train on (.jsonl[.gz], .csv, .parquet, HF data set)."
)
@student_options
@training_options
@click.option("--eval-data", metavar="FILE", help="Measure the student on these rows while it trains.")
@click.option("--metric", metavar="NAME", help="What decides which weights are kept; the task's own if none.")
@click.option("--evaluate-every", type=int, metavar="STEPS", help="[default: a tenth of the run]")
@click.option("--patience", type=int, metavar="N", help="Stop after N measurements that are no better.")
@click.option("--report-to", multiple=True, metavar="NAME", help="tensorboard, mlflow. Repeatable.")
@model_options
@column_option
@rationale_option
@out_options
@json_option
def command(
    teacher: str, data: str, student: str | None, objectives: tuple[str, ...], layers: str | None,
    train_layers: str | None, teacher_runtime: str, teacher_cache: str | None, eval_data: str | None,
    file: str | None, report_to: tuple[str, ...], task: str | None, trust_remote_code: bool,
    columns: tuple[str, ...], rationale: str | None, out: str, overwrite: bool, as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Train a small student to answer as TEACHER (a folder or hub id) does.

    The student is drawn from the teacher's own layers and channels, weights included. Labels are not needed.
    """
    from ..distill.distillation import Surroundings
    from ..distill.launch import is_main
    from ..files import check_output_folder
    from .console import done, print_json, working
    from .summary import checkpoint_summary

    wanted = distill_settings(settings, layers, train_layers, objectives, file)
    named = pairs(columns, "--column")
    if is_main():
        check_output_folder(Path(out), overwrite)
    with working(quiet=not is_main()) as progress:
        progress.say("loading")
        from ..models.checkpoint import load_checkpoint
        from ..recipes.steps import distill, evaluation_on
        from ..recipes.teachers import teacher_runtime as runtime_of

        loaded = load_checkpoint(teacher, task, trust_remote_code)
        rows = loaded.read(data, named)
        start = load_checkpoint(student, loaded.task.name, trust_remote_code) if student else None
        around = Surroundings(
            teacher_runtime=lambda recorded: runtime_of(recorded, teacher_runtime, progress),
            teacher_cache=Path(teacher_cache) if teacher_cache else None,
            evaluation=evaluation_on(loaded.read(eval_data, named), loaded, wanted.metric) if eval_data else None,
            work=Path(f"{out.rstrip('/')}.training"),
            report_to=report_to,
            rationale=rationale,
        )
        result = distill(loaded, wanted, rows, student=start, around=around, progress=progress)
        if is_main():
            result.save(Path(out), overwrite)
    if is_main() and as_json:
        print_json(checkpoint_summary(result, Path(out)))
    if is_main():
        done(f"Student of {result.parameters:,} parameters (teacher: {loaded.parameters:,}) written to {out}.")
