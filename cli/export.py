"""`limbeck export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import (
    checked,
    column_option,
    json_option,
    model_options,
    out_options,
    pairs,
    sizes,
    yaml_pairs,
)

if TYPE_CHECKING:
    from ..exporters.artifact import Manifest

EXAMPLES = """
\b
Examples:
  limbeck export ./model --backend onnx --out artifact
  limbeck export ./model --backend openvino --precision int8 --calibration texts.jsonl --out artifact
  limbeck export ./model --backend openvino --precision auto --calibration texts.jsonl --validation dev.csv --out best
  limbeck export ./model --backend openvino --batch 1 --sequence 128 --out artifact
  limbeck export ./model --backend onnx --option opset=21 --precision int4-weight-only --out artifact
  limbeck export ./sparse --backend tensorrt --precision fp16 --sparsity 2:4 --out kit
"""


@click.command(epilog=EXAMPLES)
@click.argument("checkpoint")
@click.option(
    "--backend",
    required=True,
    metavar="NAME",
    help="onnx, openvino, torch, tensorrt or a plug-in's (limbeck backends).",
)
@click.option(
    "--precision",
    metavar="P",
    help="fp32, fp16, bf16, int8 and others (limbeck backends NAME), or auto: the fastest here that holds --floor. "
    "The backend's own default if not given.",
)
@click.option("--sparsity", metavar="N:M", help="Require this pattern of zeros and let the compiler use it: 2:4.")
@click.option(
    "--calibration",
    metavar="FILE",
    help="Real texts: int8 and fp8 are calibrated and float16 ranges are checked on them.",
)
@click.option("--calibration-samples", type=int, help="Rows of --calibration that are used.  [default: 300]")
@click.option("--validation", metavar="FILE", help="What --floor is measured on.")
@click.option(
    "--floor", type=float, help="Share of CHECKPOINT's own quality that must be kept.  [default: 0.99 with auto]"
)
@click.option("--batch", metavar="SIZES", help="Batch sizes it takes: N, MIN:MAX or MIN:BEST:MAX.  [default: 1:8:64]")
@click.option(
    "--sequence",
    metavar="SIZES",
    help="Lengths in tokens, likewise.  [default: 1:128:512, or the model's limit]",
)
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="Of the backend's own: limbeck backends NAME."
)
@click.option(
    "--tokenizer-graph", is_flag=True, help="Write the tokenizer as a graph too, so that the runtime takes text."
)
@click.option(
    "--no-kv-cache", is_flag=True, help="Of a language model: score texts only, without the cache that writing needs."
)
@click.option("--kit-only", is_flag=True, help="Write the build kit alone where the engine could be built at once.")
@model_options
@column_option
@out_options
@json_option
def command(
    checkpoint: str, backend: str, precision: str | None, calibration: str | None, validation: str | None,
    batch: str | None, sequence: str | None, options: tuple[str, ...], no_kv_cache: bool, kit_only: bool,
    task: str | None, trust_remote_code: bool, columns: tuple[str, ...], out: str, overwrite: bool, as_json: bool,
    **settings: object,
) -> None:  # fmt: skip
    """Compile CHECKPOINT (a folder or hub id) into an artifact.

    The artifact is checked before it appears: outputs at several shapes against torch, every weight against the
    checkpoint's, its quality against --floor. It carries its tokenizer and a manifest that hashes every file.
    """
    from ..backends.registry import backend_for, get_backend
    from ..errors import UsageError
    from ..exporters.settings import ExportSettings, ShapeRange
    from ..files import check_output_folder
    from .console import print_json, show, working
    from .summary import artifact_summary, precision_table

    automatic = precision == "auto"
    if validation is not None and settings["floor"] is None and not automatic:
        raise UsageError("--validation is what --floor is measured on, and there is none.", "Add --floor, say 0.99.")
    if kit_only and automatic:
        raise UsageError("--kit-only and --precision auto contradict each other: a kit cannot be timed.")
    chosen = get_backend(backend)
    if kit_only and not chosen.built_format:
        raise UsageError(f"The backend {backend} has no kits: nothing of it is built.", "Leave out --kit-only.")
    shapes = checked(ShapeRange, {**sizes("batch", batch), **sizes("sequence", sequence)})
    named = chosen.default_precision if automatic or precision is None else precision
    values = {**settings, "backend": backend, "precision": named, "shapes": shapes, "kv_cache": not no_kv_cache}
    wanted = checked(ExportSettings, {**values, "options": yaml_pairs(options, "--option")})
    backend_for(wanted)
    check_output_folder(Path(out), overwrite)
    with working() as progress:
        progress.say("loading")
        from ..models.checkpoint import load_checkpoint
        from ..recipes.precision_choice import export_fastest
        from ..recipes.steps import export, export_for_device

        loaded = load_checkpoint(checkpoint, task, trust_remote_code)
        chosen_columns = pairs(columns, "--column")
        verb: Callable[..., Manifest] = export_fastest if automatic else export if kit_only else export_for_device
        manifest = verb(
            loaded,
            wanted,
            Path(out),
            calibration=loaded.read(calibration, chosen_columns) if calibration else None,
            validation=loaded.read(validation, chosen_columns) if validation else None,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(artifact_summary(manifest, Path(out)))
    elif automatic:
        show(precision_table(manifest))
    _tell(manifest, backend, out)


def _tell(manifest: Manifest, backend: str, out: str) -> None:
    """What was proven, what was not, and what to mind."""
    from .console import done

    for check in manifest.checks:
        done(f"{check.name}: {check.detail}.")
    if manifest.unverified:
        done(f"Unverified: {manifest.unverified}.")
    if manifest.is_kit:
        done(f"This is a kit, unverified on a GPU; on the machine that has one: limbeck build {out} --out ENGINE.")
    for caveat in manifest.caveats:
        done(f"Mind: {caveat}.")
    done(f"Artifact {manifest.artifact_id} ({backend}, {manifest.settings.precision}) written to {out}.")
