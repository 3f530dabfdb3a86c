"""Every weight against the student's, and what a difference looks like."""

from __future__ import annotations

from collections.abc import Iterator

from ...backends.registry import backend_of_format
from ...errors import BackendUnavailable
from ...exporters.program import ProgramWeight
from ..proofs.weight_audit import audit_weights
from ..records.report import Check
from .base import Subject, SubjectCheck, Unchecked
from .weight_causes import cause_of


class WeightAudit(SubjectCheck):
    """Each weight in the files, dequantised, equals the student's within the rounding that its storage explains. Where
    some do not, it names what that looks like: a head or a layer that is zero or missing, layers in another order,
    weights rounded to a half precision, the weights of an older student. It needs the student, and a backend that
    reads weights back; it cannot see what is not a weight (epsilons, activations, masks: `parity`)."""

    name = "weight audit"
    from_files = True

    def look(self, subject: Subject) -> Check | Unchecked:
        student, corrected = subject.student, subject.manifest.biases_corrected
        if student is None:
            return Unchecked(subject.student_missing)
        try:
            weights = _weights(subject)
        except BackendUnavailable as error:
            return Unchecked(error.message)
        if weights is None:
            return Unchecked(f"a {subject.manifest.format} artifact shows its weights to nobody")
        found = Check(**audit_weights(student.module, weights, corrected=corrected).model_dump())
        if found.passed:
            return found
        again = _weights(subject)
        assert again is not None
        cause = cause_of(student, again, subject)
        return found.model_copy(update={"detail": f"{cause}: {found.detail}"}) if cause else found


def _weights(subject: Subject) -> Iterator[ProgramWeight] | None:
    assert subject.student is not None
    manifest = subject.manifest
    return backend_of_format(manifest.format).weights(subject.folder, manifest, subject.student.module)
