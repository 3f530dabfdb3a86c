"""`limbeck inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import existing, json_option, model_options, token_shape

EXAMPLES = """
\b
Examples:
  limbeck inspect student
  limbeck inspect artifact --shape 8x128 --json
  limbeck inspect artifact --picture layers.svg
"""


@click.command(epilog=EXAMPLES)
@click.argument("path")
@click.option("--shape", metavar="BxS", help="Texts x tokens of the forward whose FLOPs are counted.  [default: 1x128]")
@click.option("--picture", metavar="FILE.svg", help="Draw the layers: sizes, precision and zeros of every matrix.")
@model_options
@json_option
def command(
    path: str, shape: str | None, picture: str | None, task: str | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Show what PATH is made of: a checkpoint, or an artifact as its compiler will read it.

    Parameters, FLOPs, size, inputs with their ranges, history, and of every layer its precision and sparsity. An
    artifact's files are verified against its manifest first, and its layers are read from its graph.
    """
    wanted, drawing = token_shape(shape), _svg(picture)
    folder = existing(path)
    from ..exporters.artifact import MANIFEST_FILE, open_artifact
    from ..recipes.inspection import inspect_artifact, inspect_checkpoint
    from .console import done, print_json, show
    from .summary import artifact_summary, checkpoint_summary, summary_table

    if (folder / MANIFEST_FILE).exists():
        manifest = open_artifact(folder)
        found = inspect_artifact(folder, manifest, wanted)
        summary = artifact_summary(manifest, folder, found)
    else:
        from ..models.checkpoint import load_checkpoint

        loaded = load_checkpoint(path, task, trust_remote_code)
        found = inspect_checkpoint(loaded, folder, wanted)
        summary = checkpoint_summary(loaded, folder, found)
    if drawing is not None:
        from ..validate.rendering.layers import write_layers

        write_layers(found.facts, folder.resolve().name, drawing, found.unknown)
    if as_json:
        print_json(summary)
    else:
        for part in summary_table(summary):
            show(part)
    if drawing is not None:
        done(f"Picture: {drawing}")


def _svg(path: str | None) -> Path | None:
    from ..errors import UsageError

    if path is not None and Path(path).suffix.lower() != ".svg":
        raise UsageError(f"--picture writes an SVG file (layers.svg), not {path!r}.")
    return Path(path) if path is not None else None
