"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel, ValidationError

from ..errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])
Settings = TypeVar("Settings", bound=BaseModel)

TASK_NAMES = ("text-classification", "token-classification", "sentence-similarity", "fill-mask", "text-generation")


def out_options(command: Command) -> Command:
    """`--out` and `--overwrite`."""
    command = click.option("--overwrite", is_flag=True, help="Replace what --out holds.")(command)
    return click.option("--out", required=True, metavar="DIR", help="Folder to write; must be new or empty.")(command)


def model_options(command: Command) -> Command:
    """`--task` and `--trust-remote-code`."""
    command = click.option("--trust-remote-code", is_flag=True, help="Run code that the model ships. Off by default.")(
        command
    )
    return click.option("--task", metavar="TASK", help=f"One of {', '.join(TASK_NAMES)}; guessed where obvious.")(
        command
    )


def column_option(command: Command) -> Command:
    """`--column FIELD=COLUMN`, repeatable."""
    return click.option(
        "--column", "columns", multiple=True, metavar="FIELD=COLUMN", help="Column of the data file for a field."
    )(command)


def json_option(command: Command) -> Command:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def rationale_option(command: Command) -> Command:
    """`--rationale`."""
    return click.option("--rationale", metavar="WHY", help="Why this was done; kept in the lineage and the report.")(
        command
    )


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """`("a=b", ...)` as a dictionary.

    Raises:
        UsageError: a value without `=`.
    """
    found = {}
    for value in values:
        name, equals, right = value.partition("=")
        if not equals or not name or not right:
            raise UsageError(f"{option} takes NAME=VALUE, not {value!r}.")
        found[name] = right
    return found


def checked(settings: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Settings from options; what was not given keeps its default.

    Raises:
        UsageError: a value that is not valid; the message names the option and what it takes.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "the options"
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{option}: {message[0].lower()}{message[1:]} (given: {first['input']!r}).") from error


def layers_from(text: str | None) -> int | list[int] | None:
    """`3` is a number of layers, `0,2,5` are layers.

    Raises:
        UsageError: neither.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError as error:
        raise UsageError(f"--layers takes a number (3) or layers counted from 0 (0,2,5), not {text!r}.") from error


def existing(path: str) -> Path:
    """The path of a folder or file that must be there; what it holds is checked by whoever opens it."""
    from ..errors import InputError

    found = Path(path)
    if not found.exists():
        raise InputError(f"{path} does not exist.")
    return found
