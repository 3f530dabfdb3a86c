"""`limbeck diff`."""

from __future__ import annotations

import json

import click

from .options import existing, json_option

EXAMPLES = """
\b
Examples:
  limbeck diff release-1/report.json report
  limbeck diff old-report report --markdown
"""


@click.command(epilog=EXAMPLES)
@click.argument("old")
@click.argument("new")
@click.option("--markdown", is_flag=True, help="Print Markdown, fit for a pull request.")
@json_option
def command(old: str, new: str, markdown: bool, as_json: bool) -> None:
    """Show what changed from the report OLD to the report NEW (each a report.json or its folder).

    A figure is better or worse when the 95% interval of its change excludes 0. Exits with 0 whatever changed: limits
    are for limbeck gate.
    """
    from ..errors import UsageError
    from ..validate.diff import compare_reports
    from ..validate.records.report import load_report
    from ..validate.rendering import render_diff_markdown, render_diff_table
    from .console import print_json, show

    if markdown and as_json:
        raise UsageError("--markdown and --json cannot both be printed.", "Give one of them.")
    found = compare_reports(load_report(existing(old)), load_report(existing(new)))
    if as_json:
        print_json(json.loads(found.model_dump_json()))  # which knows figures that are not finite
    elif markdown:
        show(render_diff_markdown(found).rstrip("\n"))
    else:
        show(render_diff_table(found))
