"""`limbeck sensitivity`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import checked, column_option, json_option, model_options, out_options, pairs

EXAMPLES = """
\b
Examples:
  limbeck sensitivity ./model --data pairs.csv --out sensitivity
  limbeck sensitivity ./model --data texts.jsonl --structures heads,ffn --shares 0.25,0.5 --samples 200 --out heads
"""


@click.command(epilog=EXAMPLES)
@click.argument("checkpoint")
@click.option("--data", required=True, metavar="FILE", help="Rows to measure on; labels are used where there are any.")
@click.option(
    "--structures", metavar="NAMES", help="Of heads, ffn, layers, 2:4, unstructured.  [default: all the model has]"
)
@click.option("--shares", metavar="S,S,...", help="Shares to cut.  [default: 0.1,0.25,0.5,0.75,0.9]")
@click.option("--method", metavar="NAME", help="How heads and channels are ranked: an importance.  [default: taylor]")
@click.option("--samples", type=int, help="Rows of --data that are looked at.  [default: 512]")
@click.option("--batch-size", type=int, help="Texts a batch.  [default: 16]")
@click.option("--seed", type=int, help="Draws the rows.  [default: 0]")
@click.option(
    "--tolerance", type=float, help="Loss at the smallest share above which a part is untouchable.  [default: 0.01]"
)
@model_options
@column_option
@out_options
@json_option
def command(
    checkpoint: str, data: str, structures: str | None, shares: str | None, tolerance: float | None, task: str | None,
    trust_remote_code: bool, columns: tuple[str, ...], out: str, overwrite: bool, as_json: bool, **settings: object,
) -> None:  # fmt: skip
    """Cut every part of CHECKPOINT (a folder or hub id) alone, and show what each costs.

    Nothing is trained and nothing is changed: the answer is a folder with sensitivity.json, .html and .md.
    """
    from ..files import check_output_folder, staged_folder
    from ..prune.sensitivity import SensitivitySettings
    from .console import done, print_json, show, working

    lists = {"structures": _names(structures), "shares": _numbers(shares)}
    wanted = checked(SensitivitySettings, {**settings, **lists})
    check_output_folder(Path(out), overwrite)
    with working() as progress:
        progress.say("loading")
        from ..models.checkpoint import load_checkpoint
        from ..recipes.sensitivity import sensitivity
        from ..validate.records.sensitivity import DEFAULT_TOLERANCE
        from ..validate.rendering.sensitivity import render_sensitivity_table, write_sensitivity

        loaded = load_checkpoint(checkpoint, task, trust_remote_code)
        rows = loaded.read(data, pairs(columns, "--column"))
        limit = DEFAULT_TOLERANCE if tolerance is None else tolerance
        found = sensitivity(loaded, rows, wanted, tolerance=limit, progress=progress)
        with staged_folder(Path(out), overwrite) as staging:
            write_sensitivity(found, staging)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        show(render_sensitivity_table(found))
    done(f"Report: {Path(out) / 'sensitivity.html'}")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str | None) -> tuple[float, ...] | None:
    from ..errors import UsageError

    try:
        return None if text is None else tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"--shares takes numbers between 0 and 1 (0.1,0.5), not {text!r}.") from error
