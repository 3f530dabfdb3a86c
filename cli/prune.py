"""`limbeck prune`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import checked, column_option, json_option, model_options, out_options, pairs, rationale_option

EXAMPLES = """
\b
Examples:
  limbeck prune student --structure ffn --keep 0.5 --method taylor --data texts.jsonl --out narrow
  limbeck prune narrow --pattern 2:4 --method magnitude --out sparse
"""


@click.command(epilog=EXAMPLES)
@click.argument("checkpoint")
@click.option("--structure", metavar="NAME", help="Cut whole channels: ffn.")
@click.option("--pattern", metavar="N:M", help="Zero weights in a pattern for sparse kernels: 2:4.")
@click.option("--keep", type=float, help="Share of channels that stay, more than 0 and at most 1.")
@click.option("--method", metavar="NAME", help="How importance is judged: magnitude or taylor.")
@click.option("--data", metavar="FILE", help="Texts that taylor looks at; labels are not needed.")
@click.option("--samples", type=int, help="Rows of --data that are looked at.")
@click.option("--seed", type=int)
@model_options
@column_option
@rationale_option
@out_options
@json_option
def command(
    checkpoint: str, data: str | None, task: str | None, trust_remote_code: bool, columns: tuple[str, ...],
    rationale: str | None, out: str, overwrite: bool, as_json: bool, **settings: object,
) -> None:  # fmt: skip
    """Remove what CHECKPOINT (a folder or hub id) needs least."""
    from ..files import check_output_folder
    from ..prune.settings import PruneSettings
    from .console import done, print_json, working
    from .summary import checkpoint_summary

    wanted = checked(PruneSettings, settings)
    check_output_folder(Path(out), overwrite)
    with working() as progress:
        progress.say("loading")
        from ..models.checkpoint import load_checkpoint
        from ..recipes.steps import prune

        before = load_checkpoint(checkpoint, task, trust_remote_code)
        rows = before.read(data, pairs(columns, "--column")) if data else None
        progress.say("pruning")
        result = prune(before, wanted, rows, rationale=rationale, progress=progress)
        result.save(Path(out), overwrite)
    if as_json:
        print_json(checkpoint_summary(result, Path(out)))
    step = result.lineage.steps[-1]
    done(f"{step.method}: {before.parameters:,} -> {result.parameters:,} parameters, written to {out}.")
    if step.note:
        done(step.note)
