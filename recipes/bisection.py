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
from ..validate.attribution.bisect import Program, first_difference
from ..validate.attribution.reference import reference_graph
from ..validate.records.bisection import Bisection
from ..validate.student import find_student
from .progress import SILENT, Progress
from .steps import command_line

SAMPLES = 32
"""Examples that are run where no other number is asked for: errors are of whole tensors, which hardly differ from text
to text."""
_FUSION = (
    "further outputs keep a compiler from fusing what lies between them: the figures are those of the program as it is "
    "seen, and `moved` says how far that moved its output"
)


def student_of(manifest: Manifest, given: str | None) -> Checkpoint:
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
    examples = source.task.examples(rows, source.tokenizer, manifest.max_length, source.model.config)
    examples = Examples(examples.features[:samples])
    program = Program("program", artifact, manifest, backend_to_run(artifact, manifest))
    with reference_graph(source, manifest, progress.say) as reference:
        progress.say("comparing module by module")
        steps = first_difference(source, reference, examples, program)
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
