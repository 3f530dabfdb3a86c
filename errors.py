"""Every error a user can cause, in one rooted tree; each class carries the exit code of the command line.

An error is one sentence that names the offender and says what is valid (`message`), and one that says how to mend
it (`hint`). The command line prints both and exits with `exit_code`; anything that is not a `LimbeckError` is a
defect of ours (exit code 70).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_DEFECT = 70
EXIT_INTERRUPTED = 130


class LimbeckError(Exception):
    """Root of the tree. `str(error)` is the message, without the hint."""

    exit_code = EXIT_DEFECT

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class GateFailed(LimbeckError):
    """A gate said no: the artifact must not be released."""

    exit_code = 1


class UsageError(LimbeckError):
    """Options that contradict each other, or a setting outside what is valid."""

    exit_code = 2


class BackendUnavailable(LimbeckError):
    """The compiler, the runtime or the device that was asked for is not on this machine."""

    exit_code = 3


class InputError(LimbeckError):
    """A model, data file, recipe or artifact that cannot be used as it is."""

    exit_code = 4


class IntegrityError(InputError):
    """An artifact whose files are not those its manifest lists."""


class DiskFull(LimbeckError):
    """No room left for what was being written; what was staged has been removed."""

    exit_code = 4


class GateInconclusive(LimbeckError):
    """A gate cannot be decided with the examples at hand."""

    exit_code = 5


class ExportMismatch(LimbeckError):
    """An exported program does not compute what its model computes."""

    exit_code = 6


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'onnx'?` where one of the known names is near, else nothing: the end of a message."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """What another library said, cut to a line; its kind where it said nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
