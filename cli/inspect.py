"""`limbeck inspect`."""

from __future__ import annotations

import click

from .options import existing, json_option, model_options

EXAMPLES = """
\b
Examples:
  limbeck inspect student
  limbeck inspect artifact --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("path")
@model_options
@json_option
def command(path: str, task: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Show what PATH is: a checkpoint (sizes, layers, history) or an artifact (also inputs, checks, sparsity).

    An artifact's files are verified against its manifest first.
    """
    from ..exporters.artifact import MANIFEST_FILE, open_artifact
    from .console import print_json, show
    from .summary import artifact_summary, checkpoint_summary, summary_table

    folder = existing(path)
    if (folder / MANIFEST_FILE).exists():
        summary = artifact_summary(open_artifact(folder), folder)
    else:
        from ..models.checkpoint import load_checkpoint

        summary = checkpoint_summary(load_checkpoint(path, task, trust_remote_code), folder)
    if as_json:
        print_json(summary)
    else:
        for part in summary_table(summary):
            show(part)
