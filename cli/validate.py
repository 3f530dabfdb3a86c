"""`limbeck validate`."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from .options import checked, column_option, existing, json_option, model_options, out_options, pairs

EXAMPLES = """
\b
Examples:
  limbeck validate artifact --teacher ./model --data heldout.jsonl --out report
  limbeck validate artifact --teacher ./model --data pairs.csv --gates gates.yaml --out report
  limbeck validate artifact --teacher ./model --data heldout.jsonl --slices length,typos --slice-by topic \
    --slice long=long.jsonl --out report
  limbeck validate artifact --teacher ./model --data heldout.jsonl --pairs edited=counterfactual:edited.jsonl \
    --pairs names=invariance:names.jsonl --out report
  limbeck validate artifact --teacher ./llama --data texts.jsonl --harness hellaswag,arc_easy --out report
"""


@click.command(epilog=EXAMPLES)
@click.argument("artifacts", nargs=-1, required=True)
@click.option("--teacher", required=True, metavar="CKPT", help="What the artifacts must stand up to.")
@click.option(
    "--data", required=True, metavar="FILE", help="Held-out examples; with labels or scores where there are any."
)
@click.option("--gates", metavar="FILE", help="YAML with limits; their verdict is the exit code.")
@click.option(
    "--slice", "slice_files", multiple=True, metavar="NAME=FILE", help="Other examples to measure on their own as well."
)
@click.option("--slice-by", multiple=True, metavar="COLUMN", help="One slice for each value of a column of --data.")
@click.option(
    "--slices",
    "builtin",
    multiple=True,
    metavar="NAMES",
    help="Of length, typos, case, punctuation, unicode; for text-generation also position, adversarial, ambiguous.",
)
@click.option(
    "--pairs",
    "pair_files",
    multiple=True,
    metavar="NAME=KIND:FILE",
    help="Rows that belong together; KIND is invariance, counterfactual or bias.",
)
@click.option(
    "--harness", "tasks", multiple=True, metavar="TASKS", help="Tasks of the lm-evaluation-harness to run as well."
)
@click.option("--harness-tasks", metavar="DIR", help="Folder of task files beside the harness's own.")
@click.option(
    "--generation", type=int, help="Prompts whose greedy text is compared.  [default: 20, where the task is to write]"
)
@click.option(
    "--attribution/--no-attribution",
    default=True,
    help="Say what each step from teacher to artifact lost.  [default: on]",
)
@click.option(
    "--modules", is_flag=True, help="Compare what each module hands on too, as limbeck bisect does, and draw it."
)
@click.option("--student", metavar="CKPT", help="What was exported.  [default: where the manifest says]")
@click.option("--latency/--no-latency", default=True, help="Time teacher and artifacts side by side.  [default: on]")
@click.option("--batch-size", type=int, help="Of the timed call.  [default: 1]")
@click.option("--sequence-length", type=int, help="Of the timed call, in tokens.  [default: 128]")
@click.option("--threads", type=int, help="[default: all]")
@click.option("--rounds", type=int, help="Rounds in which all take turns.")
@click.option("--noise", "measure_noise", is_flag=True, help="Time the teacher twice: what of a speed-up is noise.")
@click.option("--samples", type=int, help="Use the first N rows only, of every file and task (of --pairs, pairs).")
@model_options
@column_option
@out_options
@json_option
def command(
    artifacts: tuple[str, ...], teacher: str, data: str, gates: str | None, slice_files: tuple[str, ...],
    slice_by: tuple[str, ...], builtin: tuple[str, ...], pair_files: tuple[str, ...], tasks: tuple[str, ...],
    harness_tasks: str | None, generation: int | None, attribution: bool, modules: bool, student: str | None,
    latency: bool, samples: int | None, task: str | None, trust_remote_code: bool, columns: tuple[str, ...], out: str,
    overwrite: bool, as_json: bool, **settings: object,
) -> None:  # fmt: skip
    """Hold ARTIFACTS against their teacher on the same examples, and write a report.

    Exits with 1 when a gate or a check says no, with 5 when the examples cannot decide.
    """
    from ..errors import UsageError
    from ..files import check_output_folder, staged_folder
    from ..validate.gates.applying import load_gates, raise_for_verdict
    from .console import done, print_json, show, working

    if student is not None and not attribution:
        raise UsageError("--student is what attribution is made with: leave out --no-attribution.")
    limits = load_gates(existing(gates)) if gates else []
    check_output_folder(Path(out), overwrite)
    paired = {name: _kind_and_file(value) for name, value in pairs(pair_files, "--pairs").items()}
    others = {name: str(existing(file)) for name, file in pairs(slice_files, "--slice").items()}
    folders = {Path(artifact).name: existing(artifact) for artifact in artifacts}
    with working() as progress:
        progress.say("loading")
        from ..models.checkpoint import load_checkpoint
        from ..recipes.steps import ValidationAsked, validate
        from ..validate.attribution.points import AttributionAsked
        from ..validate.generation.harness import HarnessAsked
        from ..validate.performance.latency import BenchSettings
        from ..validate.rendering import render_table, write_report
        from ..validate.rows.pairs import PAIR_FIELDS, read_pairs
        from ..validate.slices.choosing import SlicesAsked

        timing = checked(BenchSettings, settings) if latency else None
        loaded = load_checkpoint(teacher, task, trust_remote_code)
        named = pairs(columns, "--column")
        fields = {name: column for name, column in named.items() if not (paired and name in PAIR_FIELDS)}
        rows = loaded.read(data, fields, slice_by).head(samples)
        slices = SlicesAsked(
            files={name: loaded.read(file, fields).head(samples) for name, file in others.items()},
            by=slice_by,
            builtin=_names(builtin),
            pairs={name: read_pairs(loaded, kind, file, named).head(samples) for name, (kind, file) in paired.items()},
        )
        harness = HarnessAsked(_names(tasks), Path(harness_tasks) if harness_tasks else None, samples)
        given = load_checkpoint(student, loaded.task.name, trust_remote_code) if student is not None else None
        asked = ValidationAsked(
            gates=limits, latency=timing, slices=slices, generation=generation, harness=harness,
            attribution=AttributionAsked(given) if attribution else None, modules=modules,
        )  # fmt: skip
        report = validate(folders, loaded, rows, asked, progress)
        with staged_folder(Path(out), overwrite) as staging:
            write_report(report, staging)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        show(render_table(report))
    done(f"Report: {Path(out) / 'report.html'}")
    raise_for_verdict(report)


def _kind_and_file(text: str) -> tuple[str, str]:
    """`bias:pairs.jsonl` as kind and file.

    Raises:
        UsageError: no colon; InputError: a file that is not there.
    """
    kind, colon, file = text.partition(":")
    if not colon or not kind or not file:
        raise UsageError(
            f"--pairs takes NAME=KIND:FILE, with invariance, counterfactual or bias for KIND, not {text!r}."
        )
    return kind, str(existing(file))


def _names(listed: tuple[str, ...]) -> list[str]:
    """Names that were given together, with commas between, or one by one."""
    return [name.strip() for names in listed for name in names.split(",")]
