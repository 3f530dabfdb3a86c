"""Outputs against the student's, and which known defect of exports explains a difference."""

from __future__ import annotations

from ...exporters.inputs import probe_batches
from ..proofs.parity import check_parity
from ..proofs.tolerances import tolerance_of
from ..records.report import Check
from .base import Subject, SubjectCheck, Unchecked
from .diagnosis import diagnose

_ROUNDING: dict[str, float] = {"fp32": 5e-6}
"""Share of an output's magnitude that the order of summation explains. What lies between it and the tolerance is
passed, but looked into: it may have a name."""


class ParityWithStudent(SubjectCheck):
    """The artifact's outputs equal its student's in eager torch at the shapes where exports go wrong, within what its
    precision explains. Where they do not, defects that exports are known for are applied to the student one at a time
    (`diagnosis.py`), and the one that makes both equal again is named. In int8 and int4 it rules out a broken program
    only. It needs the student."""

    name = "parity"

    def look(self, subject: Subject) -> Check | Unchecked | None:
        if subject.runner is None:
            return None
        if subject.student is None:
            return Unchecked(subject.student_missing)
        precision, cache = subject.manifest.settings.precision, subject.manifest.cache
        probes = list(probe_batches(subject.student, subject.manifest.settings.shapes, subject.stream))
        found = Check(**check_parity(subject.runner, subject.student.run, probes, precision, cache).model_dump())
        furthest = max(float(row["share of the output"]) for row in found.rows)
        if found.passed and furthest <= _ROUNDING.get(precision, 1.0):
            return found
        batches = [batch for _, batch in probes]
        cause = diagnose(subject.runner, subject.student, batches, tolerance_of(precision, cache).module)
        if cause is None:
            return found
        return found.model_copy(update={"detail": f"it computes what the student would with {cause}: {found.detail}"})
