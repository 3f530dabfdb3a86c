"""The student that an artifact was made from: what a compiled program is compared with, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..exporters.artifact import Manifest
from ..models.checkpoint import Checkpoint, load_checkpoint


@dataclass(frozen=True)
class Descent:
    """An artifact's student, or in a sentence why it is not at hand."""

    student: Checkpoint | None
    missing: str = ""


def find_student(manifest: Manifest, given: str | Path | None = None) -> Descent:
    """The checkpoint that an artifact was exported from: the one that is given, or the one that its manifest names,
    where that still lies there unchanged. A manifest comes from anybody, so only local folders are looked at.

    Raises:
        InputError: the checkpoint that is given is another one.
    """
    if given is not None:
        student = load_checkpoint(given, manifest.task)
        if student.hash != manifest.parent_hash:
            raise InputError(
                f"{given} is not the checkpoint that the artifact was made from: its hash starts with "
                f"{student.hash[:12]}, and the manifest names {manifest.parent_hash[:12]}.",
                "Give the checkpoint that was exported, or leave --student out.",
            )
        return Descent(student)
    folder = Path(manifest.parent)
    if not (folder / "config.json").is_file():
        return Descent(None, f"the checkpoint {folder.name} that it was made from is not where it was")
    student = load_checkpoint(folder, manifest.task)
    if student.hash != manifest.parent_hash:
        return Descent(None, f"the checkpoint {folder.name} has changed since it was exported")
    return Descent(student)
