"""`limbeck distill`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from .options import (
    checked,
    column_option,
    json_option,
    layers_from,
    model_options,
    out_options,
    pairs,
    rationale_option,
)

EXAMPLES = """
\b
Examples:
  limbeck distill ./minilm --task sentence-similarity --data texts.jsonl --layers 3 --out student
  limbeck distill ./bert-sst2 --data train.csv --column text=sentence --layers 0,5,11 \\
      --objective logits-kl=1 --objective labels=0.5 --epochs 2 --out student
"""


@click.command(epilog=EXAMPLES)
@click.argument("teacher")
@click.option(
    "--data", required=True, metavar="FILE", help="Texts to train on (.jsonl[.gz], .csv, .parquet, HF data set)."
)
@click.option("--layers", metavar="N|I,J,K", help="How many of the teacher's layers, or which (from 0).")
@click.option("--student", metavar="CKPT", help="Train this checkpoint on instead of drawing a student.")
@click.option(
    "--objective", "objectives", multiple=True, metavar="NAME=WEIGHT", help="Repeatable; the task's own if none."
)
@click.option("--epochs", type=float, help="Passes over the data.  [default: 1]")
@click.option("--max-steps", type=int, help="Optimiser steps; ends training whatever --epochs says.")
@click.option("--batch-size", type=int, help="[default: 32]")
@click.option("--learning-rate", type=float, help="[default: 4e-4]")
@click.option("--max-length", type=int, help="Tokens a text is cut at while training.")
@click.option("--freeze-embeddings", is_flag=True, help="Keep the embeddings inherited from the teacher.")
@click.option("--bf16", is_flag=True, help="Train under bfloat16 autocast.")
@click.option("--compiled-teacher", is_flag=True, help="Compute the teacher through OpenVINO.")
@click.option("--seed", type=int, help="[default: 0]")
@model_options
@column_option
@rationale_option
@out_options
@json_option
def command(
    teacher: str, data: str, layers: str | None, student: str | None, objectives: tuple[str, ...],
    task: str | None, trust_remote_code: bool, columns: tuple[str, ...], rationale: str | None,
    out: str, overwrite: bool, as_json: bool, compiled_teacher: bool, **settings: object,
) -> None:  # fmt: skip
    """Train a small student to answer as TEACHER (a folder or hub id) does.

    The student is drawn from the teacher's own layers, weights included. Labels are not needed.
    """
    from ..distill.settings import DistillSettings
    from ..errors import UsageError
    from ..files import check_output_folder
    from .console import done, print_json, working
    from .summary import checkpoint_summary

    try:
        weights = {name: float(weight) for name, weight in pairs(objectives, "--objective").items()} or None
    except ValueError as error:
        raise UsageError(f"--objective takes NAME=WEIGHT with a number: {error}.") from error
    wanted = checked(DistillSettings, {**settings, "layers": layers_from(layers), "objectives": weights})
    check_output_folder(Path(out), overwrite)
    with working() as progress:
        progress.say("loading")
        from ..models.checkpoint import load_checkpoint
        from ..recipes.steps import distill, openvino_teacher

        loaded = load_checkpoint(teacher, task, trust_remote_code)
        rows = loaded.read(data, pairs(columns, "--column"))
        start = load_checkpoint(student, loaded.task.name, trust_remote_code) if student else None
        with openvino_teacher(loaded, progress) if compiled_teacher else nullcontext() as call:
            result = distill(
                loaded, wanted, rows, student=start, teacher_call=call, rationale=rationale, progress=progress
            )
        result.save(Path(out), overwrite)
    if as_json:
        print_json(checkpoint_summary(result, Path(out)))
    done(f"Student of {result.parameters:,} parameters (teacher: {loaded.parameters:,}) written to {out}.")
