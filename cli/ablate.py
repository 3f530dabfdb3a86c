"""`limbeck ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    column_option,
    distill_settings,
    json_option,
    model_options,
    pairs,
    student_options,
    training_options,
)

if TYPE_CHECKING:
    from rich.table import Table

    from ..recipes.ablation import Ablation

EXAMPLES = """
\b
Examples:
  limbeck ablate ./minilm --data texts.jsonl --eval-data held-out.jsonl --layers 3 --max-steps 300 --out ablation
  limbeck ablate ./bert-sst2 --data train.csv --eval-data dev.csv --layers 3 --settings distill.yaml \\
      --seeds 3 --teacher-cache outputs --out ablation

\b
The same command after an interruption goes on with what is missing.
"""


@click.command(epilog=EXAMPLES)
@click.argument("teacher")
@click.option("--data", required=True, metavar="FILE", help="Texts to train on.")
@click.option("--eval-data", required=True, metavar="FILE", help="Rows that the students are compared on.")
@student_options
@training_options
@click.option("--metric", metavar="NAME", help="What they are compared by; the task's own if none.")
@click.option("--seeds", type=click.IntRange(1), default=1, help="Trainings of every student.  [default: 1]")
@model_options
@column_option
@click.option("--out", required=True, metavar="DIR", help="Folder of the students and the table.")
@json_option
def command(
    teacher: str, data: str, eval_data: str, student: str | None, objectives: tuple[str, ...], layers: str | None,
    train_layers: str | None, teacher_runtime: str, teacher_cache: str | None, file: str | None, seeds: int,
    task: str | None, trust_remote_code: bool, columns: tuple[str, ...], out: str, as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Train a student of TEACHER with all objectives, and with each left out in turn.

    All are trained alike (data, steps, seeds) and compared on the same rows, with 95 % intervals, the untrained student
    among them. Options are those of `limbeck distill`.
    """
    from .console import done, print_json, show, working

    wanted = distill_settings(settings, layers, train_layers, objectives, file)
    named = pairs(columns, "--column")
    with working() as progress:
        progress.say("loading")
        from ..models.checkpoint import load_checkpoint
        from ..recipes.ablation import AblationPlan, ablate

        loaded = load_checkpoint(teacher, task, trust_remote_code)
        plan = AblationPlan(
            teacher=loaded,
            settings=wanted,
            data=loaded.read(data, named),
            measured_on=loaded.read(eval_data, named),
            student=load_checkpoint(student, loaded.task.name, trust_remote_code) if student else None,
            seeds=seeds,
            teacher_runtime=teacher_runtime,
            teacher_cache=Path(teacher_cache) if teacher_cache else None,
        )
        ablation = ablate(plan, Path(out), progress)
    if as_json:
        print_json(ablation.model_dump(mode="json"))
    else:
        show(_table(ablation))
    for note in ablation.notes:
        done(note)
    done(f"Table: {Path(out) / 'ablation.md'}")


def _table(ablation: Ablation) -> Table:
    from rich import box
    from rich.table import Table

    from ..recipes.ablation import HEADINGS, ablation_caption, ablation_cells

    table = Table(title=ablation_caption(ablation), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index else "left")
    for cells in ablation_cells(ablation):
        table.add_row(*cells)
    return table
