"""`limbeck gate`."""

from __future__ import annotations

import click

from .options import existing, json_option

EXAMPLES = """
\b
Examples:
  limbeck gate report/report.json --gates gates.yaml
\b
gates.yaml:
  gates:
    - {metric: spearman_kept, min: 0.97, why: search quality}
    - {metric: latency_p99_ms, candidate: "openvino-*", max: 5}
"""


@click.command(epilog=EXAMPLES)
@click.argument("report")
@click.option("--gates", required=True, metavar="FILE", help="YAML with limits.")
@json_option
def command(report: str, gates: str, as_json: bool) -> None:
    """Apply gates to REPORT (a report.json or its folder).

    Exits with 0 when all pass, 1 when one fails, 5 when the examples cannot decide.
    """
    from ..validate.gates import apply_gates, load_gates, raise_for_verdict
    from ..validate.rendering import render_table
    from ..validate.report import load_report
    from .console import print_json, show

    limits = load_gates(existing(gates))
    loaded = load_report(existing(report))
    judged = loaded.model_copy(update={"gates": apply_gates(loaded, limits)})
    if as_json:
        print_json({"verdict": judged.verdict, "gates": [result.model_dump(mode="json") for result in judged.gates]})
    else:
        show(render_table(judged))
    raise_for_verdict(judged)
