"""Whether the runtime has the threads that this machine has to give."""

from __future__ import annotations

from ...environment import available_cores, available_cpus
from ..records.report import Check
from .base import Subject, SubjectCheck


class Threads(SubjectCheck):
    """The runtime's threads, read back after loading, fit the CPUs that this process may use. More take turns on them
    and wait for one another; a single one, or fewer than half the cores, leaves the machine idle. (A runtime may well
    take one thread a core, or the cores of one socket.) Sees what the runtime tells of itself; not other programs on
    the same CPUs."""

    name = "threads"

    def look(self, subject: Subject) -> Check | None:
        told = subject.runner.properties.get("threads", "") if subject.runner is not None else ""
        if not told.isdecimal():
            return None
        threads, cpus, cores = int(told), available_cpus(), available_cores()
        if threads > cpus:
            return self._slow(threads, cpus, "threads wait for one another")
        if threads < cores and (threads == 1 or 2 * threads < cores):
            return self._slow(threads, cpus, "CPUs stand idle")
        return self.passes(f"{threads} threads on {cpus} CPUs")

    def _slow(self, threads: int, cpus: int, effect: str) -> Check:
        return self.fails(f"a slow thread setting: the runtime has {threads} threads on {cpus} CPUs, so {effect}")
