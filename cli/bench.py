"""`limbeck bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import TASK_NAMES, checked, existing, json_option

if TYPE_CHECKING:
    from ..validate.performance.scenarios import ScenarioSettings
    from ..validate.performance.token_times import GenerationSettings

SCENARIO_NAMES = ("single-stream", "multi-stream", "offline", "server")
EXAMPLES = """
\b
Examples:
  limbeck bench artifact --against ./model
  limbeck bench artifact --against other-artifact --batch-size 8 --sequence-length 64 --json
  limbeck bench artifact --scenario single-stream,offline --out speed
  limbeck bench artifact --scenario server --target-qps 200 --latency-bound-ms 10
  limbeck bench artifact --against ./llama --generate --prompt-length 32,256 --batch-size 1,8
  limbeck bench artifact --generate --scenario server --ttft-bound-ms 200 --tpot-bound-ms 20
"""


@click.command(epilog=EXAMPLES)
@click.argument("subject")
@click.option("--against", multiple=True, metavar="OTHER", help="Another artifact or checkpoint; repeatable.")
@click.option("--batch-size", metavar="N", help="With --generate several: 1,8.  [default: 1]")
@click.option("--sequence-length", type=int, help="Of a call, in tokens.  [default: 128]")
@click.option("--generate", is_flag=True, help="Time text that is written, and not single calls.")
@click.option("--prompt-length", metavar="N", help="With --generate, in tokens; several: 32,256.  [default: 128]")
@click.option("--new-tokens", type=int, help="With --generate, written after each prompt.  [default: 32]")
@click.option("--threads", type=int, help="Of each runtime.  [default: all]")
@click.option("--rounds", type=int, help="Rounds in which all take turns.")
@click.option("--task", metavar="TASK", help=f"Of checkpoints; one of {', '.join(TASK_NAMES)}.")
@click.option("--noise/--no-noise", default=None, help="Time the first one twice.  [default: with --against]")
@click.option("--scenario", metavar="NAMES", help=f"MLPerf's, after that: of {', '.join(SCENARIO_NAMES)}.")
@click.option("--duration", type=float, help="Seconds of each scenario.  [default: 10]")
@click.option("--target-qps", type=float, help="Server: queries a second.  [default: the most that holds the bound]")
@click.option("--latency-bound-ms", type=float, help="Server: what 99 % of queries are answered within.")
@click.option("--ttft-bound-ms", type=float, help="Server with --generate: to the first token, in 99 % of texts.")
@click.option("--tpot-bound-ms", type=float, help="Server with --generate: to each token after it, likewise.")
@click.option("--out", metavar="DIR", help="Folder for a report, which limbeck gate reads; must be new or empty.")
@click.option("--overwrite", is_flag=True, help="Replace what --out holds.")
@json_option
def command(
    subject: str, against: tuple[str, ...], batch_size: str | None, sequence_length: int | None, generate: bool,
    prompt_length: str | None, new_tokens: int | None, threads: int | None, rounds: int | None, task: str | None,
    noise: bool | None, scenario: str | None, out: str | None, overwrite: bool, as_json: bool,
    **of_scenarios: float | None,
) -> None:  # fmt: skip
    """Time SUBJECT (an artifact, or a checkpoint in eager torch) beside others.

    Each runs in a process of its own and all take turns, so that a slow minute hits all alike. Ratios are to the first
    --against. MLPerf's scenarios follow, one after the other. With --generate, text is written: what is timed is the
    first token of each prompt, and every token after it.
    """
    from ..files import check_output_folder, staged_folder
    from ..validate.performance.latency import BenchSettings
    from .console import done, print_json, show, working

    if out is not None:
        check_output_folder(Path(out), overwrite)
    writing = _generation(generate, batch_size, prompt_length, new_tokens, sequence_length)
    call = {} if writing else {"batch_size": _one(batch_size), "sequence_length": sequence_length}
    twin = bool(against) if noise is None else noise
    wanted = checked(BenchSettings, {**call, "threads": threads, "rounds": rounds, "measure_noise": twin})
    asked = _scenarios(scenario, **of_scenarios)
    folders = _folders([*against, subject])  # the first one is what ratios are to
    with working() as progress:
        from ..recipes.steps import bench
        from ..validate.rendering import render_table, write_report

        report = bench(folders, wanted, generation=writing, scenarios=asked, task=task, progress=progress)
        if out is not None:
            with staged_folder(Path(out), overwrite) as staging:
                write_report(report, staging)
    if as_json:
        noise_found = report.noise.model_dump() if report.noise else None
        print_json({"candidates": [_figures(candidate) for candidate in report.candidates], "noise": noise_found,
                    "energy": report.energy, "environment": report.environment})  # fmt: skip
    else:
        show(render_table(report))
    if out is not None:
        done(f"Report: {Path(out) / 'report.html'}")


def _folders(paths: list[str]) -> dict[str, Path]:
    from ..errors import UsageError

    folders: dict[str, Path] = {}
    for path in paths:
        name = Path(path).resolve().name
        if name in folders:
            raise UsageError(f"{path} and {folders[name]} have the same name; rename one of the folders.")
        folders[name] = existing(path)
    return folders


def _generation(
    generate: bool,
    batch_size: str | None,
    prompt_length: str | None,
    new_tokens: int | None,
    sequence_length: int | None,
) -> GenerationSettings | None:
    """The texts that are asked for; `None` where single calls are.

    Raises:
        UsageError: an option that belongs to the other, or sizes that are none.
    """
    from ..errors import UsageError

    if generate and sequence_length is not None:
        raise UsageError(
            "--sequence-length is of a single call; texts have a prompt and what is written after it.",
            f"Give --prompt-length {sequence_length}, or leave out --generate.",
        )
    asked = {"prompt_length": prompt_length, "new_tokens": new_tokens}
    if not generate:
        for name in (name for name, value in asked.items() if value is not None):
            raise UsageError(f"--{name.replace('_', '-')} is of texts, and none are asked for.", "Add --generate.")
        return None
    from ..validate.performance.token_times import GenerationSettings

    sizes = {"batch_size": batch_size, "prompt_length": prompt_length}
    listed = {name: _sizes(name, text) for name, text in sizes.items() if text is not None}
    return checked(GenerationSettings, {**listed, "new_tokens": new_tokens})


def _sizes(name: str, text: str) -> tuple[int, ...]:
    from ..errors import UsageError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--{name.replace('_', '-')} takes a size (8) or several (1,8), not {text!r}.")
    return tuple(map(int, parts))


def _one(batch_size: str | None) -> int | None:
    """The batch of a single call."""
    from ..errors import UsageError

    if batch_size is None:
        return None
    found = _sizes("batch_size", batch_size)
    if len(found) > 1:
        raise UsageError("Several batch sizes are for texts; single calls have one.", "Add --generate, or give one.")
    return found[0]


def _scenarios(names: str | None, **asked: float | None) -> ScenarioSettings | None:
    """The settings of the scenarios that are asked for; `None` where none is.

    Raises:
        UsageError: a name that there is not, or an option without a scenario.
    """
    from ..errors import UsageError, did_you_mean
    from ..validate.performance.scenarios import ScenarioSettings

    if names is None:
        given = [name for name, value in asked.items() if value is not None]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise UsageError(f"{option} is for MLPerf's scenarios, and none was asked for.", "Add --scenario.")
        return None
    listed = [name.strip() for name in names.split(",")]
    for name in listed:
        if name not in SCENARIO_NAMES:
            raise UsageError(
                f"There is no scenario {name!r}; there are {', '.join(SCENARIO_NAMES)}."
                f"{did_you_mean(name, SCENARIO_NAMES)}"
            )
    return checked(ScenarioSettings, {"scenario": tuple(name.replace("-", "_") for name in listed), **asked})


def _figures(candidate: object) -> dict[str, object]:
    from ..validate.records.report import Candidate

    assert isinstance(candidate, Candidate)
    wanted = ("batch_size", "sequence_length", "threads", "rounds", "samples", "p50_ms", "p90_ms", "p99_ms", "mean_ms",
              "speedup", "speedup_low", "speedup_high", "properties", "settled", "cpus")  # fmt: skip
    costs = {name: metric.value for name in ("cold_start_ms", "peak_memory_mb", "energy_mj")
             if (metric := candidate.metric(name))}  # fmt: skip
    scenarios = [scenario.model_dump() for scenario in candidate.scenarios]
    call = {name: getattr(latency, name) for latency in candidate.latencies for name in wanted}
    written = {"generations": [each.model_dump() for each in candidate.generations]} if candidate.generations else {}
    return {"name": candidate.name, **call, **written, **costs, "scenarios": scenarios}
