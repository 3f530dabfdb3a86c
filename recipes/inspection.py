"""What a checkpoint or an artifact is made of: its layers, and the FLOPs of one forward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..backends.registry import backend_of_format
from ..errors import BackendUnavailable, InputError, UsageError
from ..exporters.artifact import Manifest
from ..exporters.layer_facts import ProgramFacts, checkpoint_facts
from ..exporters.settings import ShapeRange
from ..models.checkpoint import Checkpoint
from ..validate.records.report import Matrix

_SEQUENCE = 128


@dataclass(frozen=True)
class Inspection:
    """What was found inside."""

    shape: tuple[int, int]
    """[batch, sequence] of the forward whose FLOPs are counted."""
    facts: ProgramFacts | None
    """`None` where the files do not tell, or not here."""
    unknown: str = ""
    """Why they do not."""


def inspect_checkpoint(checkpoint: Checkpoint, folder: Path, shape: tuple[int, int] | None = None) -> Inspection:
    """The layers of a checkpoint as its files hold them; `shape` is 1 x 128 unless given, or what fits the model.

    Raises:
        UsageError: a shape that the model does not take.
    """
    from ..prune.costs import counted_flops

    longest = checkpoint.max_length
    anything = ShapeRange(max_batch=shape[0] if shape else 1, max_sequence=longest)
    size = _size_within(anything, longest, shape)
    facts = checkpoint_facts(checkpoint, folder, counted_flops(checkpoint, size[1], size[0]))
    return Inspection(size, facts)


def inspect_artifact(folder: Path, manifest: Manifest, shape: tuple[int, int] | None = None) -> Inspection:
    """The layers of a verified artifact as its graph holds them, where a backend here reads its format.

    Raises:
        UsageError: a shape that the program does not take.
        InputError: files that do not parse.
    """
    size = _size_within(manifest.settings.shapes, manifest.max_length, shape)
    try:
        backend = backend_of_format(manifest.format)
    except InputError as error:  # what the manifest says is still worth showing
        return Inspection(size, None, error.message)
    try:
        facts = backend.program_facts(folder, manifest, *size)
    except BackendUnavailable as error:
        return Inspection(size, None, f"{error.message} {error.hint or ''}".strip())
    unknown = f"The backend {backend.name} does not tell the layers of a {manifest.format!r} artifact."
    return Inspection(size, facts, "" if facts else unknown)


def artifact_matrices(folder: Path, manifest: Manifest) -> list[Matrix]:
    """Every weight matrix of a verified artifact for its report; none where the files do not tell.

    Raises:
        InputError: files that do not parse.
    """
    facts = inspect_artifact(folder, manifest).facts
    stored = [*facts.layers, *facts.tables] if facts else []
    return [
        Matrix(
            name=each.layer,
            layer=each.number,
            kind=each.kind,
            shape=each.shape,
            precision=each.precision,
            zeros=each.zeros,
            pattern=each.pattern,
            size_bytes=each.size_bytes,
        )
        for each in stored
    ]


def _size_within(shapes: ShapeRange, longest: int, wanted: tuple[int, int] | None) -> tuple[int, int]:
    top = min(shapes.max_sequence, longest)
    if wanted is None:
        return shapes.min_batch, max(min(_SEQUENCE, top), shapes.min_sequence)
    batch, sequence = wanted
    if not (shapes.min_batch <= batch <= shapes.max_batch and shapes.min_sequence <= sequence <= top):
        raise UsageError(
            f"--shape {batch}x{sequence} is not a shape that it takes: {shapes.min_batch} to {shapes.max_batch} texts "
            f"of {shapes.min_sequence} to {top} tokens."
        )
    return wanted
