"""What people see while work goes on: bars on a terminal, plain lines in a log; results go to standard output."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from ..recipes.progress import SILENT, Progress

_LINE_EVERY_SECONDS = 20.0

_LOG_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""


class _Stream(Console):
    """Prints names and messages as they are (no markup in them). A reader that leaves (`limbeck ... | head -1`) changes
    neither the work nor the exit code."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = _LOG_WIDTH

    def on_broken_pipe(self) -> None:
        _discard(self.file.fileno())


def _discard(descriptor: int) -> None:
    """Let what is still written to a stream whose reader has left go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


out = _Stream()
err = _Stream(stderr=True)


class _Lines(Progress):
    """For logs: one line when something begins, and one every 20 seconds while it goes on."""

    def __init__(self) -> None:
        self._stage, self._text, self._last = "", "", time.monotonic()

    def begin(self, stage: str) -> None:
        self._stage = stage

    def say(self, text: str) -> None:
        self._text, self._last = text, time.monotonic()
        err.print(f"{self._prefix()}{text}", soft_wrap=True)

    def advance(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_SECONDS:
            self._last = now
            err.print(f"{self._prefix()}{self._text}: {done} of {total}", soft_wrap=True)

    def _prefix(self) -> str:
        return f"[{self._stage}] " if self._stage else ""


class _Bar(Progress):
    """For terminals: what is being done, with a bar where its length is known."""

    def __init__(self, bars: Bars) -> None:
        self._bars, self._stage = bars, ""
        self._task: TaskID | None = None

    def begin(self, stage: str) -> None:
        self._finish()
        self._stage = stage

    def say(self, text: str) -> None:
        self._finish()
        name = f"{self._stage}: {text}" if self._stage and not text.startswith(self._stage) else text
        self._task = self._bars.add_task(name, total=None)

    def advance(self, done: int, total: int) -> None:
        if self._task is None:
            self.say("working")
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[-1]
            self._bars.update(self._task, completed=task.total or 1, total=task.total or 1)
            self._task = None


class _NotedBars(logging.Handler):
    """What limbeck says of its own accord (a guessed column, say) goes above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(record.getMessage(), soft_wrap=True)


@contextmanager
def working(quiet: bool = False) -> Iterator[Progress]:
    """Progress on standard error for the length of a command; `quiet` for all but one of several processes."""
    if quiet:
        yield SILENT
        return
    noted = logging.getLogger("limbeck")
    handler = _NotedBars()
    noted.addHandler(handler)
    noted.setLevel(logging.INFO)
    try:
        if err.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
                       TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
            with Bars(*columns, console=err) as bars:
                yield _Bar(bars)
        else:
            yield _Lines()
    finally:
        noted.removeHandler(handler)


def print_json(value: Any) -> None:
    """Print JSON to standard output, and nothing else."""
    try:
        print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)
    except BrokenPipeError:
        _discard(sys.stdout.fileno())


def show_text(text: str) -> None:
    """Write a piece of text to standard output as it is, at once."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        _discard(sys.stdout.fileno())


def show(result: RenderableType) -> None:
    """Print a result for people to standard output; a line of text is not broken, so that it can be copied."""
    out.print(result, soft_wrap=isinstance(result, str))


def done(text: str) -> None:
    """The last line of a command that wrote something."""
    err.print(text, soft_wrap=True)
