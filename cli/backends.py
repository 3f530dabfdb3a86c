"""`limbeck backends`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .options import json_option

if TYPE_CHECKING:
    from ..backends.base import Availability
    from ..backends.details import Details

EXAMPLES = """
\b
Examples:
  limbeck backends
  limbeck backends onnx
"""


@click.command(epilog=EXAMPLES)
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the backends: which are ready on this machine, why others are not, and what mends them.

    With NAME, show one in detail, with the options that `limbeck export --option` takes.
    """
    from .console import print_json, show

    if name is not None:
        from ..backends.details import details_of

        details = details_of(name)
        if as_json:
            print_json(_plain_details(details))
            return
        for part in _details(details):
            show(part)
        return
    from ..backends.registry import list_backends
    from ..environment import device_facts

    listings, device = list_backends(), device_facts()
    if as_json:
        print_json({"backends": [_plain(listing) for listing in listings], **device})
        return
    from rich.table import Table

    table = Table("backend", "ready", "what it is", "why not")
    for listing in listings:
        able = listing.availability
        table.add_row(listing.name, _ready(able), listing.summary, able.reason)
    show(table)
    for listing in listings:
        if listing.availability.mend:
            show(f"To mend {listing.name}: {listing.availability.mend}")
    for line in _device(device):
        show(line)


def _ready(able: Availability) -> str:
    if able.can_export and able.can_run:
        return "yes"
    return "exports only" if able.can_export else "runs only" if able.can_run else "no"


def _device(device: dict[str, Any]) -> Iterator[str]:
    cpu = device["cpu"]
    instructions = ", ".join(cpu["instruction_sets"]) or "no instruction sets of note"
    usable = f"{cpu['logical_cpus']} logical CPUs, {cpu['cpus']} of them usable; runtimes take {cpu['threads']} threads"
    yield f"CPU: {cpu['name']}; {instructions}; {usable}"
    total, free = cpu["memory_bytes"], cpu["memory_available_bytes"]
    yield f"Memory: {_gigabytes(free)} of {_gigabytes(total)} available"
    for gpu in device["gpus"]:
        sparse = "with" if gpu["sparse_tensor_cores"] else "without"
        capability = f"compute capability {gpu.get('compute_cap')}"
        yield (f"GPU: {gpu.get('name')}, driver {gpu.get('driver_version')}, {capability}, {gpu.get('memory.total')}, "
               f"{sparse} sparse tensor cores")  # fmt: skip
    if not device["gpus"]:
        yield "GPU: none that nvidia-smi lists"


def _gigabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.1f} GiB"


def _details(details: Details) -> Iterator[Any]:
    from rich.table import Column, Table

    able = details.listing.availability
    facts = Table("fact", Column("value", overflow="fold"), show_header=False, title=details.listing.name,
                  title_justify="left")  # fmt: skip
    rows = {
        "what it is": details.listing.summary,
        "source": details.listing.source,
        "ready": _ready(able),
        "why not": able.reason,
        **able.facts,
        "precisions": ", ".join(
            f"{name} (default)" if name == details.default_precision else name for name in details.precisions
        ),
        "sparsities": ", ".join(details.sparsities) or "none that its compiler uses",
        "opens formats": ", ".join(details.formats),
        "builds": details.built_format,
    }
    for name, value in rows.items():
        if value:
            facts.add_row(name, value)
    yield facts
    if able.mend:
        yield f"To mend it: {able.mend}"
    if not details.options:
        yield "It has no options of its own."
        return
    options = Table(Column("--option", no_wrap=True), "takes", "default", "what it does")
    for option in details.options:
        options.add_row(option.name, option.takes, _word(option.default), option.description)
    yield options


def _word(default: object) -> str:
    """A default as it would be typed."""
    return json.dumps(default) if default is None or isinstance(default, bool) else str(default)


def _plain(listing: Any) -> dict[str, Any]:
    able = listing.availability
    return {**vars(listing), "availability": {**vars(able), "ready": _ready(able), "facts": dict(able.facts)}}


def _plain_details(details: Details) -> dict[str, Any]:
    options = [vars(option) for option in details.options]
    return {**_plain(details.listing), **{name: value for name, value in vars(details).items() if name != "listing"},
            "options": options}  # fmt: skip
