"""How a command ends: interrupted, killed, its reader gone, or by a defect of ours."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.validate.gates import applying

Limbeck = Callable[..., Any]
TinyCheckpoint = Callable[..., Path]


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "limbeck", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        # tests that a shell started in the background have been told to ignore it, and their children with them
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stop_once(process: subprocess.Popen[str], seen: str, how: signal.Signals) -> str:
    """Send a signal when standard error says `seen`; what it says after."""
    assert process.stderr is not None
    for line in process.stderr:
        if seen in line:
            process.send_signal(how)
            break
    return process.communicate(timeout=60)[1]


RECIPE = """
name: interrupted
teacher: {teacher}
task: sentence-similarity
data: {{train: {data}, validation: {data}}}
stages:
  - {{name: student, distill: {{student: {{layers: 1}}, max_steps: 1}}}}
exports:
  - {{name: onnx, start: student, backend: onnx}}
"""


def test_ctrl_c_removes_what_was_staged_and_keeps_earlier_stages(model: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(teacher=model, data=text_file))
    process = start("run", recipe, "--out", tmp_path / "run")
    said = stop_once(process, "[onnx] tracing the graph", signal.SIGINT)
    assert process.returncode == 130
    assert "Interrupted." in said
    assert "Traceback" not in said
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "run").iterdir()] == ["student"]


@pytest.mark.thorough
def test_a_training_killed_before_its_first_checkpoint_leaves_nothing(model: Path, text_file: Path, out: Path) -> None:
    words = ("distill", model, "--data", text_file, "--layers", 1, "--epochs", 100_000, "--out", out)
    process = start(*words)
    said = stop_once(process, "distilling", signal.SIGTERM)
    assert process.returncode == 130
    assert "Interrupted." in said


@pytest.mark.thorough
def test_a_killed_training_goes_on_when_the_command_is_typed_again(
    limbeck: Limbeck, model: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ("distill", model, "--data", text_file, "--layers", 1, "--max-steps", 300, "--save-every", 5)
    process = start(*words, "--out", tmp_path / "student")
    work = tmp_path / "student.training"
    deadline = time.monotonic() + 120
    while not (work / "checkpoint-5" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    reached = max(int(folder.name.partition("-")[2]) for folder in work.glob("checkpoint-*"))
    assert not (tmp_path / "student").exists() and 5 <= reached < 300
    other = limbeck(*words, "--seed", 3, "--out", tmp_path / "student")
    assert other.code == 2 and "unfinished training of another run" in other.err
    for state in work.glob("checkpoint-*/trainer_state.json"):  # a mark that only a run that goes on would carry along
        held = json.loads(state.read_text())
        held["log_history"][0]["loss"] = 123.0
        state.write_text(json.dumps(held))
    assert limbeck(*words, "--out", tmp_path / "student").code == 0
    (step,) = json.loads((tmp_path / "student" / "lineage.json").read_text())["steps"]
    (loss,) = (curve for curve in step["curves"] if curve["name"] == "loss")
    assert (loss["values"][0], loss["steps"][-1]) == (123.0, 300) and not work.exists()


@pytest.mark.thorough
def test_a_reader_that_leaves_changes_nothing(limbeck: Limbeck, model: Path) -> None:
    """`limbeck inspect model --json | head -1`"""
    process = start("inspect", model, "--json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read().count("Error") == 0


def test_a_defect_of_ours_is_reported_to_a_file(
    limbeck: Limbeck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError("a defect")

    (tmp_path / "gates.yaml").touch()
    monkeypatch.setattr(applying, "load_gates", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    failed = limbeck("gate", tmp_path, "--gates", tmp_path / "gates.yaml")
    assert failed.code == 70 and "Traceback" not in failed.err
    assert "ZeroDivisionError" in failed.err and "please report it" in failed.err
    (filed,) = tmp_path.glob("limbeck-defect-*.txt")
    assert str(filed) in failed.err
    content = filed.read_text()
    assert "Traceback" in content and "versions:" in content
