"""How long work tells about itself; the command line draws it, a Python user may ignore it."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Progress(ABC):
    """Told what is being done, and how much of it is done."""

    def begin(self, stage: str) -> None:
        """A stage of several steps begins; what is said next belongs to it."""
        self.say(stage)

    @abstractmethod
    def say(self, text: str) -> None:
        """What begins now, in a few words."""

    @abstractmethod
    def advance(self, done: int, total: int) -> None:
        """How far what was said last has come."""


class Silent(Progress):
    """Says nothing."""

    def say(self, text: str) -> None:
        return

    def advance(self, done: int, total: int) -> None:
        return


SILENT = Silent()
