"""`docs/gates.md`: what it tells people to write is what limbeck reads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from limbeck.cli.main import VERBS, cli
from limbeck.validate.gates.applying import load_gates
from limbeck.validate.records.report import Gate

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "gates.md").read_text(encoding="utf-8")
YAML = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SHELL = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
GATES = [text for text in YAML if text.startswith("gates:")]
(WORKFLOW,) = (yaml.safe_load(text) for text in YAML if text not in GATES)


def parse(line: str) -> None:
    """Raises on a verb or an option that limbeck does not have."""
    words = shlex.split(line)
    words = words[: words.index(">>")] if ">>" in words else words
    verb = words[1]
    assert verb in VERBS
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    command.make_context(verb, words[2:])


@pytest.mark.parametrize("text", GATES)
def test_every_example_of_gates_loads(text: str, tmp_path: Path) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(text, encoding="utf-8")
    assert len(load_gates(path)) == 3


def test_every_key_of_a_gate_is_explained() -> None:
    keys = [field.alias or name for name, field in Gate.model_fields.items()]
    rows = " ".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
    assert [key for key in keys if f"`{key}`" not in rows] == []


def test_the_commands_of_the_page_exist() -> None:
    lines = [line for text in SHELL for line in text.splitlines()]
    assert len(lines) == 4
    for line in lines:
        parse(line)


def test_the_workflow_calls_commands_that_exist() -> None:
    steps: list[dict[str, Any]] = WORKFLOW["jobs"]["gates"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    lines = [line for step in steps for line in step.get("run", "").splitlines() if line.startswith("limbeck ")]
    assert [line.split()[1] for line in lines] == ["validate", "gate", "diff"]
    for line in lines:
        parse(line)


def test_the_summary_that_is_shown_is_the_one_that_is_written() -> None:
    text = "\n".join(step.get("run", "") for step in WORKFLOW["jobs"]["gates"]["steps"])
    written = re.findall(r"--markdown (\S+\.md)", text)
    assert written == ["gates.md"] and f'cat {written[0]} >> "$GITHUB_STEP_SUMMARY"' in text
