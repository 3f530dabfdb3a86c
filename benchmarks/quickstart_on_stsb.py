"""How much of its teacher's Spearman the quickstart's artifacts keep on STS-B validation, which they were never trained
on and which does not ship with limbeck.

    limbeck quickstart --out limbeck-quickstart
    LIMBECK_DATA=... python benchmarks/quickstart_on_stsb.py limbeck-quickstart

Prints one line an artifact: Spearman, share of the teacher's, 95 % interval.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.schema import load_recipe
from limbeck.recipes.sources import RECIPE_FOLDER, Sources
from limbeck.recipes.steps import validate

STSB = "stsb_en/validation.jsonl.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a quickstart run")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIMBECK_DATA", "../shared/data")))
    options = parser.parse_args()
    recipe = load_recipe(RECIPE_FOLDER / "quickstart.yaml")
    teacher = load_checkpoint(Sources(RECIPE_FOLDER).model(recipe.teacher), recipe.task)
    artifacts = {export.name: newest(options.run, export.name) for export in recipe.exports}
    report = validate(artifacts, teacher, teacher.read(options.data / STSB))
    for candidate in report.candidates:
        kept, reached = candidate.metric("spearman_kept"), candidate.metric("spearman")
        print(
            f"{candidate.name:<18} spearman {reached.value:.4f} (teacher {reached.teacher:.4f})  "
            f"kept {kept.value:.2%} [{kept.low:.2%}, {kept.high:.2%}]"
        )


def newest(run: Path, name: str) -> Path:
    """The newest folder of an export; a run keeps those of earlier settings beside it."""
    found = [folder for folder in run.glob(f"{name}-*") if len(folder.name) == len(name) + 13]
    if not found:
        raise SystemExit(f"{run} has no artifact {name}: is it the folder of a quickstart run?")
    return max(found, key=lambda folder: folder.stat().st_mtime)


if __name__ == "__main__":
    main()
