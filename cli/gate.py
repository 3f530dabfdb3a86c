"""`limbeck gate`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from .options import existing, json_option

EXAMPLES = """
\b
Examples:
  limbeck gate report/report.json --gates gates.yaml
  limbeck gate report --gates gates.yaml --previous release-1 --junit gates.xml --markdown gates.md
\b
gates.yaml:
  gates:
    - {metric: spearman_kept, min: 0.97, why: search quality}
    - {metric: latency_p99_ms, candidate: "openvino-*", max: 5}
    - {metric: size_mb, relative_to: previous, max: 1.05}
"""


@click.command(epilog=EXAMPLES)
@click.argument("report")
@click.option("--gates", required=True, metavar="FILE", help="YAML with limits.")
@click.option("--previous", metavar="OLD", help="The last release's report, for gates with relative_to: previous.")
@click.option("--junit", metavar="FILE", help="Write the verdicts as JUnit XML.")
@click.option("--markdown", metavar="FILE", help="Write a summary for a pull request.")
@json_option
def command(
    report: str, gates: str, previous: str | None, junit: str | None, markdown: str | None, as_json: bool
) -> None:
    """Apply gates to REPORT (a report.json or its folder).

    Exits with 0 when all pass, 1 when one fails, 5 when the examples cannot decide. --junit and --markdown are written
    in each of these cases.
    """
    from ..files import write_text
    from ..validate.gates.applying import apply_gates, load_gates, raise_for_verdict
    from ..validate.records.report import load_report
    from ..validate.rendering import render_gate_summary, render_junit, render_table
    from .console import print_json, show

    files = {option: _file(option, path) for option, path in (("--junit", junit), ("--markdown", markdown)) if path}
    limits = load_gates(existing(gates))
    loaded = load_report(existing(report))
    before = load_report(existing(previous)) if previous else None
    judged = loaded.model_copy(update={"gates": apply_gates(loaded, limits, before)})
    if "--junit" in files:
        write_text(files["--junit"], render_junit(judged))
    if "--markdown" in files:
        write_text(files["--markdown"], render_gate_summary(judged, _page(Path(report), files["--markdown"])))
    if as_json:
        # through pydantic's own JSON, which knows figures that are not finite
        print_json({"verdict": judged.verdict, "gates": json.loads(judged.model_dump_json(include={"gates"}))["gates"]})
    else:
        show(render_table(judged))
    raise_for_verdict(judged)


def _file(option: str, path: str) -> Path:
    from ..errors import UsageError

    if Path(path).is_dir():
        raise UsageError(f"{option} takes a file to write, and {path} is a folder.")
    return Path(path)


def _page(report: Path, summary: Path) -> str | None:
    """The report's page as seen from the summary, where it lies beside report.json."""
    page = (report if report.is_dir() else report.parent) / "report.html"
    return Path(os.path.relpath(page, summary.parent)).as_posix() if page.is_file() else None
