"""`limbeck build`."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from .options import existing, json_option, out_options

EXAMPLES = """
\b
Example, on the machine with the GPU:
  limbeck build kit --out engine
  limbeck build kit --timing-cache timings.bin --out engine
"""


@click.command(epilog=EXAMPLES)
@click.argument("kit")
@click.option(
    "--timing-cache",
    metavar="FILE",
    help="Kernel times from one build to the next: read if there, written afterwards. For one GPU and one TensorRT.",
)
@out_options
@json_option
def command(kit: str, timing_cache: str | None, out: str, overwrite: bool, as_json: bool) -> None:
    """Turn KIT, as `export --backend tensorrt` writes it, into an engine for this machine's GPU.

    TensorRT's log (build.log) and the list of the engine's layers (layers.json) lie beside the engine; what they say of
    precision and sparsity is in the manifest.
    """
    cache = Path(timing_cache) if timing_cache is not None else None
    if cache is not None and (cache.is_dir() or not cache.resolve().parent.is_dir()):
        raise UsageError(f"--timing-cache {cache} is not a file in a folder that exists.")
    from .console import done, print_json, working
    from .summary import artifact_summary

    with working() as progress:
        from ..recipes.steps import build

        manifest = build(existing(kit), Path(out), timing_cache=cache, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(artifact_summary(manifest, Path(out)))
    for check in manifest.checks:
        done(f"{check.name}: {check.detail}.")
    done(f"Artifact {manifest.artifact_id} ({manifest.format}) written to {out}.")
