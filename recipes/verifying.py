"""What an artifact's files prove of it, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..backends.registry import backend_of_format
from ..errors import GateFailed
from ..exporters.artifact import Manifest, open_artifact
from ..validate.checks import examine, subject_of
from ..validate.records.report import Check


@dataclass(frozen=True)
class Verification:
    """What was found."""

    manifest: Manifest
    checks: list[Check]
    notes: list[str]
    """What could not be checked, and why."""

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the artifact."""
        return all(check.passed for check in self.checks)


def verify(folder: Path, student: str | Path | None = None) -> Verification:
    """Hold an artifact's files against its manifest and its student: hashes, tokenizer, lengths, labels, the types of
    its weights, their 2:4 pattern, and every weight.

    Args:
        student: the checkpoint that it was made from; where the manifest says it lay when not given.

    Raises:
        IntegrityError: a file is missing, changed or added since the manifest was written.
        InputError: not an artifact, or a `student` that is another checkpoint.
    """
    manifest = open_artifact(folder)
    told = f"{len(manifest.files)} files are those of artifact {manifest.artifact_id}"
    examined = examine(subject_of(folder, manifest, student=student), from_files=True)
    checks = [Check(name="integrity", passed=True, detail=told), *examined.checks]
    return Verification(manifest, checks, [*examined.notes, *_code(manifest)])


def _code(manifest: Manifest) -> list[str]:
    """What to say of a program that the files do not show."""
    if not backend_of_format(manifest.format).runs_machine_code(manifest):
        return []
    return ["its machine code was not looked into: what it does is known of who made it, and of running it"]


def raise_for_failures(found: Verification) -> None:
    """Turn what `verify` found into the exit of a command; returns when all passed.

    Raises:
        GateFailed: a check failed; each is named.
    """
    failed = [f"{check.name}: {check.detail}." for check in found.checks if not check.passed]
    if failed:
        counted = "1 check" if len(failed) == 1 else f"{len(failed)} checks"
        raise GateFailed(f"{counted} failed. {' '.join(failed)}", "Do not deploy this artifact: export it again.")
