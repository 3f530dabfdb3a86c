"""`limbeck backends`."""

from __future__ import annotations

import click

from .options import json_option


@click.command()
@json_option
def command(as_json: bool) -> None:
    """List the backends, what they can do on this machine, why not, and what mends it."""
    from dataclasses import asdict

    from ..backends.registry import list_backends
    from ..environment import cpu_facts, gpu_facts
    from .console import print_json, show

    listings = list_backends()
    if as_json:
        backends = [{**asdict(listing), "availability": _plain(listing.availability)} for listing in listings]
        print_json({"backends": backends, "cpu": cpu_facts(), "gpus": gpu_facts()})
        return
    from rich.table import Table

    table = Table("backend", "exports here", "runs here", "what it is", "why not, and what mends it")
    for listing in listings:
        able = listing.availability
        mend = f"{able.reason}{' -> ' if able.mend else ''}{able.mend}"
        table.add_row(listing.name, _yes(able.can_export), _yes(able.can_run), listing.summary, mend)
    show(table)
    cpu = cpu_facts()
    instructions = ", ".join(cpu["instruction_sets"]) or "none of note"
    show(f"CPU: {cpu['name']}, {cpu['cpus']} logical CPUs; {instructions}")
    gpus = ", ".join(gpu["name"] for gpu in gpu_facts()) or "none that nvidia-smi lists"
    show(f"GPU: {gpus}")


def _plain(availability: object) -> dict[str, object]:
    return {name: dict(value) if name == "facts" else value for name, value in vars(availability).items()}


def _yes(able: bool) -> str:
    return "yes" if able else "no"
