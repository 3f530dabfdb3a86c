"""A process that measures one subject (`worker.py`), seen from the side that asks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from ... import errors
from ...errors import LimbeckError

_WORKER_MODULE = f"{__package__}.worker"
_SPINNING_VARIABLES = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")


class WorkerDied(LimbeckError):
    """A process that was measuring ended, or gave no answer in time: the runtime crashed, hung or ran out of memory."""


class WorkerProcess:
    """The process that measures one subject; killed on leaving the `with` block, however it is left."""

    def __init__(self, name: str, threads: int, timeout_seconds: float) -> None:
        self._name = name
        self._timeout = timeout_seconds
        self._environment = _worker_environment(threads)

    def __enter__(self) -> Self:
        # a file and not a pipe: nobody reads it while the worker runs, and a full pipe would block the worker
        self._complaints = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER_MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=self._environment,
            text=True,
            encoding="utf-8",
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # what was still buffered for a worker that is gone
                    stream.close()
        self._complaints.close()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            LimbeckError: what the worker answered, as it was raised there.
            WorkerDied: there was no answer.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        overdue = threading.Timer(self._timeout, process.kill)
        overdue.start()
        try:
            with suppress(BrokenPipeError):  # a dead worker: the empty answer below says so
                process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            in_time = not overdue.finished.is_set()
            overdue.cancel()
        if not line.endswith("\n"):
            self._died(do, in_time)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self._raise(**answer["error"])
        return answer

    def _raise(self, kinds: Sequence[str], message: str, hint: str | None) -> NoReturn:
        known = [kind for name in kinds if (kind := getattr(errors, name, None)) is not None]
        raise known[0](f"{self._name}: {message}", hint)

    def _died(self, do: str, in_time: bool) -> NoReturn:
        code = self._process.wait()
        if not in_time:
            how = f"gave no answer within {self._timeout:g} seconds"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}" + (
                " (out of memory?)" if code == -signal.SIGKILL else ""
            )
        else:
            how = f"ended with exit code {code}"
        self._complaints.seek(0)
        lines = self._complaints.read().decode("utf-8", "replace").strip().splitlines()
        said = f" It said: {lines[-1].strip()}" if lines else ""
        raise WorkerDied(f"The process that measures {self._name!r} {how} while asked to {do}.{said}")


def _worker_environment(threads: int) -> dict[str, str]:
    """Our environment and import paths, with thread pools of one size and none told to spin between rounds."""
    kept = {name: value for name, value in os.environ.items() if name not in _SPINNING_VARIABLES}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return {**kept, **counts, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
