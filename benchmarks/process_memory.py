"""The peak of the memory that a process has to itself. Linux only."""

from __future__ import annotations

import threading
from pathlib import Path


class Peak(threading.Thread):
    """Watches this process's anonymous memory, in MB, from now on: what no file backs, so that the system could not
    take it back without writing it somewhere first. Mapped weights are not in it until they are changed."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = anonymous_megabytes()
        """What was there at the start: the libraries."""
        self.highest = self.before
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self.highest = max(self.highest, anonymous_megabytes())

    def stop(self) -> float:
        """The highest that was seen."""
        self._ended.set()
        self.join()
        return self.highest


def anonymous_megabytes() -> float:
    """This process's anonymous memory now."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024
