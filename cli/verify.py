"""`limbeck verify`."""

from __future__ import annotations

import click

from .options import existing, json_option

EXAMPLES = """
\b
Examples:
  limbeck verify artifact
  limbeck verify artifact --student ./student --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("artifact")
@click.option("--student", metavar="CKPT", help="What it was made from, where that has moved.")
@json_option
def command(artifact: str, student: str | None, as_json: bool) -> None:
    """Check what the files of ARTIFACT prove, without running it.

    Every file is the one that its manifest lists; its tokenizer, lengths and labels are its student's; its weights are
    of the type and the 2:4 pattern that it claims, and equal the student's. Exits with 1 when a check says no, with 4
    when a file is not the one that was exported.
    """
    from ..recipes.steps import verify
    from ..recipes.verifying import raise_for_failures
    from .console import done, print_json, show, working

    folder = existing(artifact)
    with working() as progress:
        progress.say("verifying")
        found = verify(folder, student)
    if as_json:
        print_json(
            {
                "artifact_id": found.manifest.artifact_id,
                "passed": found.passed,
                "checks": [check.model_dump() for check in found.checks],
                "notes": found.notes,
            }
        )
    else:
        for check in found.checks:
            show(f"{check.name}: {'passed' if check.passed else 'FAILED'}: {check.detail}")
        for note in found.notes:
            done(note)
    raise_for_failures(found)
