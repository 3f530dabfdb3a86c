"""`limbeck bench`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import TASK_NAMES, checked, existing, json_option

EXAMPLES = """
\b
Examples:
  limbeck bench artifact --against ./model
  limbeck bench artifact --against other-artifact --batch-size 8 --sequence-length 64 --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("subject")
@click.option("--against", multiple=True, metavar="OTHER", help="Another artifact or checkpoint; repeatable.")
@click.option("--batch-size", type=int, help="[default: 1]")
@click.option("--sequence-length", type=int, help="In tokens.  [default: 128]")
@click.option("--threads", type=int, help="Of each runtime.  [default: all]")
@click.option("--rounds", type=int, help="Rounds in which all take turns.")
@click.option("--task", metavar="TASK", help=f"Of checkpoints; one of {', '.join(TASK_NAMES)}.")
@json_option
def command(subject: str, against: tuple[str, ...], task: str | None, as_json: bool, **settings: object) -> None:
    """Time SUBJECT (an artifact, or a checkpoint in eager torch) beside others.

    Each runs in a process of its own and all take turns, so that a slow minute hits all alike. Ratios are to the first
    --against.
    """
    from ..errors import UsageError
    from ..validate.latency import BenchSettings
    from .console import print_json, show, working

    wanted = checked(BenchSettings, settings)
    ordered = [*against, subject]  # the first one is what ratios are to
    folders: dict[str, Path] = {}
    for path in ordered:
        name = Path(path).resolve().name
        if name in folders:
            raise UsageError(f"{path} and {folders[name]} have the same name; rename one of the folders.")
        folders[name] = existing(path)
    with working() as progress:
        from ..recipes.steps import bench
        from ..validate.rendering import render_table

        report = bench(folders, wanted, task=task, progress=progress)
    if as_json:
        print_json({"candidates": [_figures(candidate) for candidate in report.candidates],
                    "environment": report.environment})  # fmt: skip
    else:
        show(render_table(report))


def _figures(candidate: object) -> dict[str, object]:
    from ..validate.report import Candidate

    assert isinstance(candidate, Candidate)
    latency = candidate.latencies[0]
    wanted = ("batch_size", "sequence_length", "threads", "rounds", "samples", "p50_ms", "p90_ms", "p99_ms", "mean_ms",
              "speedup", "speedup_low", "speedup_high", "properties")  # fmt: skip
    costs = {name: metric.value for name in ("cold_start_ms", "peak_memory_mb") if (metric := candidate.metric(name))}
    return {"name": candidate.name, **{name: getattr(latency, name) for name in wanted}, **costs}
