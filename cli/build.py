"""`limbeck build`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import existing, json_option, out_options

EXAMPLES = """
\b
Example, on the machine with the GPU:
  limbeck build kit --out engine
"""


@click.command(epilog=EXAMPLES)
@click.argument("kit")
@out_options
@json_option
def command(kit: str, out: str, overwrite: bool, as_json: bool) -> None:
    """Turn KIT, as `export --backend tensorrt` writes it, into an engine for this machine's GPU."""
    from .console import done, print_json, working
    from .summary import artifact_summary

    with working() as progress:
        from ..recipes.steps import build

        manifest = build(existing(kit), Path(out), overwrite=overwrite, progress=progress)
    if as_json:
        print_json(artifact_summary(manifest, Path(out)))
    done(f"Artifact {manifest.artifact_id} ({manifest.format}) written to {out}.")
