"""`limbeck distill`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from ..errors import UsageError
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

if TYPE_CHECKING:
    from ..prune.sparsify_settings import SparsifySettings

EXAMPLES = """
\b
Examples:
  limbeck distill ./minilm --task sentence-similarity --data texts.jsonl --layers 3 --ffn 512 --out student
  limbeck distill ./bert-sst2 --data train.csv --column text=sentence --layers 0,5,11 \\
      --objective 'logits-kl={weight: 1, temperature: 4}' --objective labels=0.5 \\
      --eval-data dev.csv --patience 3 --out student
  limbeck distill ./minilm --data texts.jsonl --student ./student --sparsify target=0.8 \\
      --sparsify method=movement --out sparse
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
@click.option(
    "--sparsify",
    multiple=True,
    metavar="KEY=VALUE|FILE",
    help="Zero weights step by step while training. Repeatable: target=0.8 (share of zeros) or pattern=2:4; "
    "method=magnitude, movement or sr-ste; schedule=cubic, linear, exponential or one-shot; begin, end (shares of the "
    "training), every (steps), allocation=uniform or global, block=[4,1], decay. Or a YAML file with these.",
)
@click.option("--report-to", multiple=True, metavar="NAME", help="tensorboard, mlflow. Repeatable.")
@model_options
@column_option
@rationale_option
@out_options
@json_option
def command(
    teacher: str, data: str, student: str | None, objectives: tuple[str, ...], layers: str | None,
    train_layers: str | None, teacher_runtime: str, teacher_cache: str | None, eval_data: str | None,
    file: str | None, sparsify: tuple[str, ...], report_to: tuple[str, ...], task: str | None, trust_remote_code: bool,
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
    sparse = sparsify_settings(sparsify)
    named = pairs(columns, "--column")
    if is_main():
        check_output_folder(Path(out), overwrite)
    with working(quiet=not is_main()) as progress:
        progress.say("loading")
        from ..models.checkpoint import load_checkpoint
        from ..recipes.steps import distill, evaluation_on, sparsification
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
            modification=sparsification(sparse) if sparse is not None else None,
            rationale=rationale,
        )
        result = distill(loaded, wanted, rows, student=start, around=around, progress=progress)
        if is_main():
            result.save(Path(out), overwrite)
    if is_main() and as_json:
        print_json(checkpoint_summary(result, Path(out)))
    if is_main():
        done(f"Student of {result.parameters:,} parameters (teacher: {loaded.parameters:,}) written to {out}.")
        if note := result.lineage.steps[-1].note:
            done(note)


def sparsify_settings(values: Sequence[str]) -> SparsifySettings | None:
    """What `--sparsify` asks for, `None` where it was not given.

    Raises:
        UsageError: a value that is not valid; InputError: a file that is no mapping.
    """
    from ..files import read_yaml
    from ..prune.sparsify_settings import SparsifySettings

    given: dict[str, Any] = {}
    for value in values:
        if "=" not in value:
            given |= read_yaml(Path(value), "sparsify file")
            continue
        ((key, text),) = pairs([value], "--sparsify").items()
        given[key] = _list_or_text(key, text)
    try:
        return SparsifySettings(**given) if values else None
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"--sparsify {'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]} "
            f"(given: {first['input']!r}).",
            f"It takes {', '.join(SparsifySettings.model_fields)}.",
        ) from error


def _list_or_text(key: str, text: str) -> Any:
    """Settings read numbers from text themselves, but no lists."""
    if not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"--sparsify {key} takes a list such as [4,1], not {text!r}.") from error
