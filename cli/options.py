"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from pydantic import BaseModel, ValidationError

from ..errors import UsageError

if TYPE_CHECKING:
    from ..distill.settings import DistillSettings

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


_STUDENT_OPTIONS = (
    click.option("--layers", metavar="N|I,J,K", help="How many of the teacher's layers, or which (from 0)."),
    click.option("--choose", metavar="HOW", help="Which, of N: uniform, first, last, importance.  [default: uniform]"),
    click.option("--hidden-size", type=int, help="Width of the student's hidden states."),
    click.option("--heads", type=int, help="Attention heads of a layer."),
    click.option("--ffn", type=int, help="Feed-forward channels of a layer."),
    click.option("--config", metavar="FILE", help="Student from scratch, by this config.json, with random weights."),
    click.option("--student", metavar="CKPT", help="Train this checkpoint on instead of drawing a student."),
)
_TRAINING_OPTIONS = (
    click.option(
        "--objective",
        "objectives",
        multiple=True,
        metavar="NAME=WEIGHT",
        help="Repeatable; also NAME={weight: 1, SETTING: VALUE}. The task's own if none.",
    ),
    click.option("--epochs", type=float, help="Passes over the data.  [default: 1]"),
    click.option("--max-steps", type=int, help="Optimiser steps; ends training whatever --epochs says."),
    click.option("--batch-size", type=int, help="Examples a process and step.  [default: 32]"),
    click.option("--gradient-accumulation", type=int, help="Batches whose gradients make one step.  [default: 1]"),
    click.option("--learning-rate", type=float, help="[default: 4e-4]"),
    click.option("--warmup", type=float, help="Share of the steps in which the rate rises.  [default: 0.05]"),
    click.option("--schedule", metavar="SHAPE", help="linear, cosine or constant.  [default: cosine]"),
    click.option("--max-length", type=int, help="Tokens a text is cut at while training."),
    click.option(
        "--freeze-embeddings", is_flag=True, default=None, help="Keep the embeddings inherited from the teacher."
    ),
    click.option("--train-layers", metavar="I,J", help="Only these layers of the student learn (from 0)."),
    click.option(
        "--precision", metavar="DTYPE", help="fp32, bf16, fp16, or auto: bf16 where it is fast.  [default: fp32]"
    ),
    click.option("--gradient-checkpointing", is_flag=True, default=None, help="Less memory for a third more time."),
    click.option("--teacher-runtime", metavar="NAME", default="eager", help="eager, openvino, onnx or torch-compile."),
    click.option("--teacher-cache", metavar="DIR", help="Keep the teacher's outputs here for the next run."),
    click.option("--save-every", type=int, metavar="STEPS", help="[default: a tenth of the run]"),
    click.option("--settings", "file", metavar="FILE", help="YAML with any of the settings; options go before it."),
    click.option("--seed", type=int, help="[default: 0]"),
)
_STUDENT = ("layers", "choose", "hidden_size", "heads", "ffn", "config")


def student_options(command: Command) -> Command:
    """How a student is drawn, or which checkpoint it is."""
    return _with(_STUDENT_OPTIONS, command)


def training_options(command: Command) -> Command:
    """Objectives and training, but not what is measured meanwhile."""
    return _with(_TRAINING_OPTIONS, command)


def _with(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def distill_settings(
    options: dict[str, Any], layers: str | None, train_layers: str | None, objectives: Sequence[str], file: str | None
) -> DistillSettings:
    """Distillation settings from a file and the options, which win.

    Raises:
        UsageError: a value that is not valid; InputError: a file that is no mapping.
    """
    from ..distill.settings import DistillSettings, StudentSettings
    from ..files import read_yaml

    written = read_yaml(Path(file), "settings file") if file else {}
    drawn = {name: options.pop(name) for name in _STUDENT if name != "layers"} | {"layers": layers_from(layers)}
    given = {name: value for name, value in drawn.items() if value is not None}
    if given:
        written["student"] = checked(StudentSettings, {**(written.get("student") or {}), **given})
    if objectives:
        written["objectives"] = {name: _weight(value) for name, value in pairs(objectives, "--objective").items()}
    if train_layers is not None:
        written["train_layers"] = layer_list(train_layers, "--train-layers")
    given = {name: value for name, value in options.items() if value is not None}
    return checked(DistillSettings, {**written, **given})


def _weight(text: str) -> Any:
    """A number, or settings as YAML: `{weight: 1, temperature: 4}`.

    Raises:
        UsageError: neither.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float | dict):
        raise UsageError(
            f"--objective takes NAME=WEIGHT with a number, or NAME={{weight: 1, SETTING: VALUE}}, not {text!r}."
        )
    return value


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


def yaml_pairs(values: Sequence[str], option: str) -> dict[str, Any]:
    """`("a=1", "b=[x, y]")` as a dictionary whose values are read as YAML.

    Raises:
        UsageError: a value without `=`, or that is no YAML.
    """
    import yaml

    read = {}
    for name, value in pairs(values, option).items():
        try:
            read[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"{option} {name}: {value!r} is neither a number, a word nor a list in YAML.") from error
    return read


def sizes(axis: str, text: str | None) -> dict[str, int]:
    """`8`, `1:64` or `1:8:64` as the fields of a `ShapeRange`; nothing where nothing was given.

    Raises:
        UsageError: something else.
    """
    if text is None:
        return {}
    parts = text.split(":")
    if not 1 <= len(parts) <= 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--{axis} takes a size (8), a range (1:64) or one with its best size (1:8:64), not {text!r}.")
    numbers = [int(part) for part in parts]
    found = {f"min_{axis}": numbers[0], f"max_{axis}": numbers[-1]}
    if len(numbers) != 2:
        found[f"opt_{axis}"] = numbers[len(numbers) // 2]
    return found


def token_shape(text: str | None) -> tuple[int, int] | None:
    """`8x128` as batch and sequence.

    Raises:
        UsageError: something else.
    """
    if text is None:
        return None
    batch, _, sequence = text.lower().partition("x")
    if not (batch.isdecimal() and sequence.isdecimal() and int(batch) and int(sequence)):
        raise UsageError(f"--shape takes BATCHxSEQUENCE (8x128), not {text!r}.")
    return int(batch), int(sequence)


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


def layer_list(text: str, option: str) -> list[int]:
    """`0,2,5` as layers.

    Raises:
        UsageError: something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} takes layers counted from 0 (0,2,5), not {text!r}.") from error


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
