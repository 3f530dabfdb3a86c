"""`limbeck bisect`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import column_option, existing, json_option, pairs

EXAMPLES = """
\b
Examples:
  limbeck bisect artifact --data heldout.jsonl
  limbeck bisect artifact --data heldout.jsonl --student ./narrow --samples 64 --out where
"""


@click.command(epilog=EXAMPLES)
@click.argument("artifact")
@click.option("--data", required=True, metavar="FILE", help="Examples to run; a few are enough.")
@click.option("--student", metavar="CKPT", help="What was exported.  [default: where the manifest says]")
@click.option("--samples", type=click.IntRange(min=1), help="Examples that are run.  [default: 32]")
@column_option
@click.option("--out", metavar="DIR", help="Folder for the answer as JSON and as a page; must be new or empty.")
@click.option("--overwrite", is_flag=True, help="Replace what --out holds.")
@json_option
def command(
    artifact: str, data: str, student: str | None, samples: int | None, columns: tuple[str, ...], out: str | None,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Find the module where ARTIFACT parts from the model that it was made from.

    What each module hands on is compared between the student in torch, its exported graph and the compiled program; the
    first module that adds more error than its precision explains is named.
    """
    from ..files import check_output_folder, staged_folder
    from .console import done, print_json, show, working

    folder = existing(artifact)
    target = Path(out) if out is not None else None
    if target is not None:
        check_output_folder(target, overwrite)
    with working() as progress:
        progress.say("loading")
        from ..recipes.bisection import SAMPLES, bisect
        from ..validate.rendering.bisection import render_bisection_table, write_bisection

        fields = pairs(columns, "--column")
        found = bisect(folder, data, fields, student=student, samples=samples or SAMPLES, progress=progress)
        if target is not None:
            with staged_folder(target, overwrite) as staging:
                write_bisection(found, staging)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        show(render_bisection_table(found))
    if target is not None:
        done(f"Report: {target / 'bisection.html'}")
