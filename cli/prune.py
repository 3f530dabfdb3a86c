"""`limbeck prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .options import (
    checked,
    column_option,
    json_option,
    layer_list,
    model_options,
    out_options,
    pairs,
    rationale_option,
)

if TYPE_CHECKING:
    from ..prune.settings import PruneSettings

EXAMPLES = """
\b
Cut parts out, so that every runtime gets a smaller model:
  limbeck prune student --structure ffn --keep 0.5 --method fisher --data texts.jsonl --out narrow
  limbeck prune student --structure heads --keep 0.5 --method fisher --repair --data texts.jsonl --out narrow
  limbeck prune student --structure layers --keep 0.5 --data texts.jsonl --out shallow
\b
Cut what a budget demands; latency is measured on this machine:
  limbeck prune student --budget latency_ms=2.0 --budget backend=openvino --data texts.jsonl --out fast
\b
Zero weights, in the pattern of sparse kernels or anywhere:
  limbeck prune narrow --pattern 2:4 --method sparsegpt --permute --data texts.jsonl --out sparse
  limbeck prune narrow --sparsity 0.6 --method wanda --data texts.jsonl --out sparse
\b
How much each part can lose, before anything is cut: limbeck sensitivity.
"""


@click.command(epilog=EXAMPLES)
@click.argument("checkpoint")
@click.option("--structure", metavar="NAME", help="Cut parts out: heads, ffn, layers or width.")
@click.option("--pattern", metavar="N:M", help="Zero weights in a pattern; 2:4 is what sparse kernels take.")
@click.option("--sparsity", type=float, metavar="SHARE", help="Zero this share of single weights.")
@click.option(
    "--budget",
    multiple=True,
    metavar="NAME=VALUE",
    help="latency_ms (with backend=), size_mb or flops; "
    "also precision, batch_size, sequence_length, threads, protect=I,J. Repeatable.",
)
@click.option("--keep", metavar="SHARE", help="Share of a structure that stays, or one for each layer: 1,0.5,0.5.")
@click.option(
    "--method",
    metavar="NAME",
    help="How importance is judged. Structures: magnitude, taylor, fisher, "
    "activation, block-influence. Zeros: magnitude, wanda, sparsegpt.",
)
@click.option("--allocation", metavar="HOW", help="uniform, or global: by importance over all layers.")
@click.option("--repair", is_flag=True, default=None, help="Fit what stays to what the whole computed.")
@click.option("--permute", is_flag=True, default=None, help="Put channels in the order that suits the pattern.")
@click.option("--block", metavar="RxC", help="Zero whole blocks of a matrix: 32x1.")
@click.option("--protect", metavar="I,J", help="Layers that are left whole (from 0).")
@click.option("--data", metavar="FILE", help="Texts that the method looks at; labels are not needed.")
@click.option("--samples", type=int, help="Rows of --data that are looked at.  [default: 512]")
@click.option("--max-length", type=int, help="Tokens a text is cut at.  [default: the model's own limit]")
@click.option("--batch-size", type=int, help="Rows a batch while data is looked at.  [default: 16]")
@click.option("--seed", type=int, help="[default: 0]")
@model_options
@column_option
@rationale_option
@out_options
@json_option
def command(
    checkpoint: str, data: str | None, task: str | None, trust_remote_code: bool, columns: tuple[str, ...],
    rationale: str | None, out: str, overwrite: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Remove what CHECKPOINT (a folder or hub id) needs least."""
    from ..files import check_output_folder
    from .console import done, print_json, working
    from .summary import checkpoint_summary

    wanted = _settings(options)
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


def _settings(options: dict[str, Any]) -> PruneSettings:
    from ..prune.budget_settings import Budget
    from ..prune.settings import PruneSettings

    stated = pairs(options.pop("budget"), "--budget")
    if protected := stated.pop("protect", None):
        stated["protect"] = layer_list(protected, "--budget protect")  # type: ignore[assignment]
    if stated:
        options["budget"] = checked(Budget, stated)
    options["keep"] = _shares(options["keep"])
    options["block"] = _block(options["block"])
    if options["protect"] is not None:
        options["protect"] = layer_list(options["protect"], "--protect")
    return checked(PruneSettings, options)


def _shares(text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")] if "," in text else float(text)
    except ValueError as error:
        raise UsageError(f"--keep takes a share (0.5) or one for each layer (1,0.5,0.5), not {text!r}.") from error


def _block(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise UsageError(f"--block takes ROWSxCOLUMNS, for example 32x1, not {text!r}.")
    return int(rows), int(columns)
