"""Help is there for every verb, and asking for it costs nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import click
import pytest

from limbeck import __version__
from limbeck.cli.main import VERBS, cli

# Names on standard error, when Python exits, which of the heavy modules were imported.
HEAVY = """
import atexit
heavy = ("torch", "transformers", "onnxruntime", "openvino", "onnx", "nncf", "datasets", "scipy", "rich")
atexit.register(lambda: print("imported:", *(name for name in heavy if name in sys.modules), file=sys.stderr))
"""


def imported(err: str) -> set[str]:
    return set(err.strip().splitlines()[-1].removeprefix("imported:").split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, limbeck: Callable[..., Any]) -> None:
    shown = limbeck(verb, "--help")
    assert shown.code == 0
    assert shown.err == ""
    assert shown.out.startswith(f"Usage: limbeck {verb} ")


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_takes_arguments_has_an_example_that_parses(verb: str, limbeck: Callable[..., Any]) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    if not any(isinstance(parameter, click.Argument) for parameter in command.params):
        return
    lines = limbeck(verb, "--help").out.replace("\\\n", "").splitlines()
    examples = [shlex.split(line) for line in lines if line.startswith(f"    limbeck {verb} ")]
    assert examples, f"limbeck {verb} --help shows no example"
    for words in examples:
        command.make_context(verb, words[2:])  # raises on an option that the verb does not have


def test_the_help_lists_every_verb_and_exit_code(limbeck: Callable[..., Any]) -> None:
    shown = limbeck("--help")
    assert shown.code == 0
    assert all(f"  {verb} " in shown.out and line in shown.out for verb, line in VERBS.items())
    for code in ("1 a gate said no", "3 backend", "5 inconclusive", "130 interrupted"):
        assert code in " ".join(shown.out.split())


def test_no_verb_at_all_is_a_question_for_help(limbeck: Callable[..., Any]) -> None:
    shown = limbeck()
    assert shown.code == 2
    assert "Commands:" in shown.out + shown.err


def test_the_version_is_said(limbeck: Callable[..., Any]) -> None:
    shown = limbeck("--version")
    assert shown.code == 0
    assert __version__ in shown.out


def test_help_imports_nothing_heavy(limbeck_child: Callable[..., Any]) -> None:
    shown = limbeck_child("--help", before=HEAVY)
    assert shown.code == 0
    assert imported(shown.err) == set()


def test_help_of_a_verb_imports_nothing_heavy(limbeck_child: Callable[..., Any]) -> None:
    assert imported(limbeck_child("export", "--help", before=HEAVY).err) == set()


def test_backends_are_listed_without_loading_them(limbeck_child: Callable[..., Any]) -> None:
    shown = limbeck_child("backends", before=HEAVY)
    assert shown.code == 0
    assert imported(shown.err) <= {"rich"}
    assert all(name in shown.out for name in ("onnx", "openvino", "tensorrt", "CPU:"))


def test_backends_as_json(limbeck: Callable[..., Any]) -> None:
    shown = limbeck("backends", "--json")
    listed = {backend["name"]: backend["availability"] for backend in json.loads(shown.out)["backends"]}
    assert {"onnx", "openvino", "tensorrt"} <= set(listed)
    for availability in listed.values():  # what is lacking is said, with what mends it
        assert availability["can_run"] or (availability["reason"] and availability["mend"])


def test_what_mends_a_backend_is_shown_as_it_must_be_typed(limbeck: Callable[..., Any]) -> None:
    """Brackets are no markup: `limbeck[tensorrt]` must not lose them."""
    listed = json.loads(limbeck("backends", "--json").out)["backends"]
    table = "".join(limbeck("backends").out.split())
    for mend in (backend["availability"]["mend"] for backend in listed):
        assert mend.count("[") == 0 or "limbeck[" in table
