"""Which module of an artifact parts from the model that it was made from."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from ..backends.registry import backend_to_run
from ..environment import facts
from ..errors import InputError
from ..exporters.artifact import Manifest, open_artifact
from ..models.batching import Examples
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..validate.attribution.bisect import Program, first_difference
from ..validate.attribution.reference import reference_graph
from ..validate.records.bisection import Bisection, StepDifferences
from ..validate.student import find_student
from .benching import command_line
from .progress import SILENT, Progress

SAMPLES = 32
"""Examples that are run where no other number is asked for: errors are of whole tensors, which hardly differ from text
to text."""
_FUSION = (
    "further outputs keep a compiler from fusing what lies between them: the figures are those of the program as it is "
    "seen, and `moved` says how far that moved its output"
)


def student_of(manifest: Manifest, given: str | Path | None) -> Checkpoint:
    """The checkpoint that an artifact was exported from.

    Raises:
        InputError: it is not at hand, or the one that is given is another.
    """
    descent = find_student(manifest, given)
    if descent.student is None:
        raise InputError(
            f"There is nothing to compare the artifact with: {descent.missing}.", "Say where it is: --student CKPT."
        )
    return descent.student


def modules_apart(
    artifact: Path, manifest: Manifest, rows: Data, *, student: str | Path | None = None, progress: Progress = SILENT
) -> list[StepDifferences]:
    """The same for a report, on the first of these rows.

    Args:
        artifact: a verified folder.

    Raises:
        InputError: no student at hand, or another one.
        BackendUnavailable: a runtime that is not here, or programs that do not show their inside.
    """
    source = student_of(manifest, student)
    return _steps(artifact, manifest, source, _examples(source, manifest, rows.head(SAMPLES), SAMPLES), progress)


def _examples(student: Checkpoint, manifest: Manifest, rows: Data, samples: int) -> Examples:
    examples = student.task.examples(rows, student.tokenizer, manifest.max_length, student.model.config)
    return Examples(examples.features[:samples])


def _steps(
    artifact: Path, manifest: Manifest, student: Checkpoint, examples: Examples, progress: Progress
) -> list[StepDifferences]:
    program = Program("program", artifact, manifest, backend_to_run(artifact, manifest))
    with reference_graph(student, manifest, progress.say) as reference:
        progress.say("comparing module by module")
        return first_difference(student, reference, examples, program)


def bisect(
    artifact: Path, data: str, columns: dict[str, str], *, student: str | None = None, samples: int = SAMPLES,
    progress: Progress = SILENT,
) -> Bisection:  # fmt: skip
    """Compare what each module hands on between student and exported graph, and between graph and program.

    Raises:
        InputError: no student at hand, or another one.
        BackendUnavailable: a runtime that is not here, or programs that do not show their inside.
    """
    manifest = open_artifact(artifact)
    source = student_of(manifest, student)
    rows = source.read(data, columns).head(samples)
    examples = _examples(source, manifest, rows, samples)
    steps = _steps(artifact, manifest, source, examples, progress)
    hidden = (
        [] if len(steps) > 1 else [f"a {manifest.format} program does not show its inside: only its graph was compared"]
    )
    return Bisection(
        artifact=artifact.resolve().name,
        artifact_id=manifest.artifact_id,
        student=Path(source.source).name,
        precision=manifest.settings.precision,
        data=Path(rows.source).name,
        rows=len(examples.features),
        tokens=sum(len(feature["input_ids"]) for feature in examples.features),
        steps=steps,
        notes=[_FUSION, *hidden],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command_line(),
        environment=facts(),
    )
