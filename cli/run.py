"""`limbeck run`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import json_option

EXAMPLES = """
\b
Examples:
  limbeck run recipe.yaml
  limbeck run recipe.yaml --out runs/monday
"""


@click.command(epilog=EXAMPLES)
@click.argument("recipe")
@click.option("--out", metavar="DIR", help="Folder of the run.  [default: runs/<name of the recipe>]")
@json_option
def command(recipe: str, out: str | None, as_json: bool) -> None:
    """Run RECIPE (a YAML file): distil, prune, export, validate, gate.

    Stages that are done are not run again; a changed setting runs again just what follows from it. The exit code is
    the gates' verdict.
    """
    execute(Path(recipe), out, as_json)


def execute(recipe_path: Path, out: str | None, as_json: bool) -> None:
    """Run a recipe and show what came of it."""
    from ..recipes.runner import RecipeRun
    from ..recipes.schema import load_recipe
    from ..validate.gates.applying import raise_for_verdict
    from ..validate.rendering import render_table
    from .console import done, print_json, show, working

    recipe = load_recipe(recipe_path)
    folder = Path(out) if out else Path("runs") / recipe.name
    with working() as progress:
        execution = RecipeRun(recipe, recipe_path.resolve().parent, folder, progress)
        report = execution.run()
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        show(render_table(report))
    for record in execution.records:
        done(f"{record.name:<20} {'done before' if record.resumed else f'{record.seconds:.0f} s'}")
    done(f"Report: {folder / 'report.html'}")
    raise_for_verdict(report)
