"""Calls of the command line: in process where its answer is all that matters, in a child where the process is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from limbeck.cli.main import _run

TinyCheckpoint = Callable[..., Path]
WriteRows = Callable[[Path, Iterable[dict[str, Any]]], Path]


@dataclass(frozen=True)
class Outcome:
    """What a call of limbeck came to."""

    code: int
    out: str
    err: str

    def assert_refused(self, code: int, *words: str) -> None:
        """The exit code, one `Error:` line, the words that matter, no traceback, nothing on standard output."""
        assert self.code == code, self.err
        assert self.err.count("Error: ") == 1
        assert "Traceback" not in self.err
        assert self.out == ""
        for word in words:
            assert word in self.err


@pytest.fixture
def limbeck(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`limbeck("gate", report, "--gates", file)` runs a command in this process."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = _run([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def limbeck_child() -> Callable[..., Outcome]:
    """`limbeck_child("--help")` runs a command in a Python of its own; `before` is code that runs there first."""

    def call(*words: object, before: str = "", folder: Path | None = None) -> Outcome:
        program = f"import sys\n{before}\nfrom limbeck.cli.main import main\nmain(sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, words)],
            capture_output=True,
            text=True,
            cwd=folder or "/",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=120,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: WriteRows) -> Path:
    """32 sentences to train on."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", [{"text": text} for text in texts[:32]])


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: WriteRows) -> Path:
    """32 other sentences to validate on."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "held-out.jsonl", [{"text": text} for text in texts[32:]])


@pytest.fixture(scope="session")
def model(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("bert")


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where the command is told to write; nothing may have come of it, staged or whole."""
    folder = tmp_path / "parent" / "out"
    yield folder
    assert not folder.parent.exists() or list(folder.parent.iterdir()) == []
