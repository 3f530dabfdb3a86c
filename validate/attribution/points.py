"""Attribution: quality at every point from the teacher to what is deployed, so that the loss of each step stands alone.

    teacher (torch) -> student (torch) -> exported graph (float32, reference runtime) -> compiled program

Quality alone does not see a small defect (a zeroed head hides in the noise of any test set), so adjacent points are
also held to *parity*, their answers on the same rows within what the precision explains, and to the *weight audit*.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...backends.base import Backend
from ...backends.fitted import FittedRunner
from ...backends.registry import backend_to_run
from ...errors import InputError, LimbeckError
from ...exporters.artifact import Manifest
from ...exporters.settings import QUANTISED, Precision
from ...models.batching import Examples
from ...models.checkpoint import Checkpoint, load_tokenizer
from ..checks.weights import WeightAudit
from ..metrics.comparison import chosen_metric
from ..predictions import Predictions, Progress
from ..proofs.tolerances import tolerance_of
from ..proofs.weight_audit import audit_weights
from ..records.report import Candidate, Check, Parity, Point, Waypoint
from ..standard import Standard, examples_for
from ..student import find_student
from .answers import answers_of, longest_of, loss_between, metrics_of, tokens_of
from .bisect import Program, first_difference
from .reference import Reference, reference_graph

_COMPARED = ("embedding", "logits", "nll")
"""What of a task's predictions parity is asked of, whichever it has."""
_WORDS: dict[Point, str] = {
    "teacher": "the teacher",
    "student": "the student",
    "graph": "the exported graph",
    "program": "the compiled program",
}
_EAGER = "eager torch"
_LOOKED_INTO = 8
"""Rows that are run module by module where a parity fails: those whose answers are furthest apart."""


@dataclass(frozen=True)
class Measured:
    """An artifact that has been measured: its record, what it answered, and the runtime that it ran on."""

    candidate: Candidate
    folder: Path
    manifest: Manifest
    answers: Predictions
    """Empty where it could not be run."""
    runtime: str
    unchecked: Sequence[str] = ()
    """What could not be checked of it, and why."""


@dataclass(frozen=True)
class AttributionAsked:
    """What to attribute with."""

    student: Checkpoint | None = None
    """The checkpoint that artifacts were exported from; looked for where their manifests say when not given."""

    def check(self, artifacts: Mapping[str, Manifest]) -> None:
        """Refuse a student of none of the artifacts, before anything is measured.

        Raises:
            InputError: another checkpoint.
        """
        given = self.student
        if given is not None and all(given.hash != manifest.parent_hash for manifest in artifacts.values()):
            wanted = ", ".join(f"{name}: {manifest.parent_hash[:12]}" for name, manifest in artifacts.items())
            raise InputError(
                f"{given.source} is not the checkpoint that was exported: its hash starts with {given.hash[:12]}, and "
                f"the manifest says otherwise ({wanted}).",
                "Give the checkpoint that was exported, or leave --student out.",
            )


@dataclass(frozen=True)
class Progressing:
    """Who is told what is done: in words, and how far it is."""

    say: Callable[[str], None] = lambda _: None
    advance: Progress = lambda done, total: None


@dataclass(frozen=True)
class _Stop:
    """A point with its answers, its rows as it splits them into tokens, and what its precision explains."""

    waypoint: Waypoint
    answers: Predictions
    tokens: list[list[int]]
    tolerance: float | None = None


def attribute(
    measured: Sequence[Measured],
    standard: Standard,
    asked: AttributionAsked,
    progress: Progressing,
    known: Mapping[str, Predictions] | None = None,
) -> list[Candidate]:
    """The candidates with their waypoints, and with a check for each parity and audit between adjacent points.

    A student is loaded, run and exported once for all artifacts made from it, and freed before the next: what is kept
    are arrays of answers. Where a student or its graph is not at hand, the report says why, and the points that remain
    are compared with each other.

    Args:
        known: what students have answered already, by their hash.
    """
    at_hand = {model.hash: model for model in (asked.student, standard.teacher) if model is not None}
    first = _teacher_stop(standard)
    found: dict[str, Candidate] = {}
    for parent in dict.fromkeys(item.manifest.parent_hash for item in measured):
        children = [item for item in measured if item.manifest.parent_hash == parent]
        student, missing = at_hand.get(parent), ""
        if student is None:
            student, missing = _found(children[0].manifest)
        between = _Between(student, missing, standard, progress, (known or {}).get(parent))
        for item in children:
            found[item.candidate.name] = _attributed(item, [first, *between.stops(item)], standard, between.cause)
    return [found[item.candidate.name] for item in measured]


def _found(manifest: Manifest) -> tuple[Checkpoint | None, str]:
    """The student, or why it is not at hand: what lies where a manifest says may be anything."""
    try:
        descent = find_student(manifest)
    except LimbeckError as error:
        return None, error.message.rstrip(".")
    return descent.student, descent.missing


class _Between:
    """The points between a teacher and the artifacts of one student."""

    def __init__(
        self,
        student: Checkpoint | None,
        missing: str,
        standard: Standard,
        progress: Progressing,
        known: Predictions | None,
    ) -> None:
        self._student, self._missing, self._known = student, missing, known
        self._standard, self._progress = standard, progress
        self._eager: _Stop | None = None
        self._graphs: dict[str, _Stop] = {}

    def stops(self, item: Measured) -> list[_Stop]:
        """Student, graph and program, as far as they are at hand."""
        tokenizer = load_tokenizer(item.folder)
        tokens = tokens_of(self._standard, tokenizer, item.manifest.max_length)
        allowed = tolerance_of(item.manifest.settings.precision, item.manifest.cache).module
        program = _Stop(_program(item), item.answers, tokens, allowed)
        if self._student is None:
            return [_noted(program, f"student and graph are not at hand: {self._missing}")]
        if self._eager is None:
            self._eager = self._run_student(self._student)
        try:
            return [self._eager, self._graph(item.manifest, self._student), program]
        except LimbeckError as error:
            return [self._eager, _noted(program, f"the graph is not at hand: {error.message.rstrip('.')}")]

    def _run_student(self, student: Checkpoint) -> _Stop:
        standard, longest = self._standard, longest_of(student, self._standard)
        if student is standard.teacher:
            answers, tokens = standard.predictions, tokens_of(standard, student.tokenizer, longest)
        elif self._known is not None:
            answers, tokens = self._known, tokens_of(standard, student.tokenizer, longest)
        else:
            self._progress.say("the student")
            answers, tokens = answers_of(student.run, student, longest, standard, self._progress.advance)
        metrics = metrics_of(answers, standard)
        return _Stop(Waypoint(name="student", runtime=_EAGER, precision="fp32", metrics=metrics), answers, tokens)

    def _graph(self, artifact: Manifest, student: Checkpoint) -> _Stop:
        shapes = artifact.settings.shapes
        key = f"{artifact.settings.backend} {shapes} {artifact.max_length}"
        if key not in self._graphs:
            with reference_graph(student, artifact, self._progress.say) as reference:
                self._graphs[key] = self._run_graph(reference, student, artifact.max_length)
        return self._graphs[key]

    def _run_graph(self, reference: Reference, student: Checkpoint, max_length: int) -> _Stop:
        standard, manifest = self._standard, reference.manifest
        self._progress.say("the exported graph")
        with closing(reference.backend.load(reference.folder, manifest)) as runner:
            runtime = runner.properties.get("runtime", manifest.format)
            run = FittedRunner(runner, manifest.settings.shapes)
            answers, tokens = answers_of(run, student, max_length, standard, self._progress.advance)
        audit = _audit(reference.backend, reference.folder, manifest, student)
        metrics = metrics_of(answers, standard)
        waypoint = Waypoint(name="graph", runtime=runtime, precision="fp32", metrics=metrics, audit=audit)
        return _Stop(waypoint, answers, tokens, tolerance_of("fp32").module)

    def cause(self, item: Measured, point: Point, rows: np.ndarray) -> str:
        """The first module where a point parts from the one before on these rows, in words; nothing where neither
        shows its inside, or the two are not exported graph and program or student."""
        student, manifest = self._student, item.manifest
        if student is None:
            return ""
        self._progress.say("looking for the module where they part")
        standard = self._standard
        examples = examples_for(standard.teacher, standard.data, student.tokenizer, manifest.max_length)
        features = [examples.features[row] for row in rows]
        try:
            program = Program("program", item.folder, manifest, backend_to_run(item.folder, manifest))
            with reference_graph(student, manifest) as reference:
                steps = first_difference(
                    student, reference, Examples(features), program if point == "program" else None
                )
        except LimbeckError:
            return ""
        first = next((step.first for step in steps if step.after == point), None)
        if first is None:
            return ""
        return f"; they part first at {first.module} (error {first.error:.2g}, of what went in {first.error_in:.2g})"


def _teacher_stop(standard: Standard) -> _Stop:
    teacher = standard.teacher
    metrics = metrics_of(standard.predictions, standard)
    waypoint = Waypoint(name="teacher", runtime=_EAGER, precision="fp32", metrics=metrics)
    tokens = tokens_of(standard, teacher.tokenizer, standard.max_length or teacher.max_length)
    return _Stop(waypoint, standard.predictions, tokens)


def _program(item: Measured) -> Waypoint:
    figures = [metric for metric in item.candidate.metrics if metric.data is not None]
    precision: Precision = item.manifest.settings.precision
    audit = next((check for check in item.candidate.checks if check.name == WeightAudit.name), None)
    return Waypoint(name="program", runtime=item.runtime, precision=precision, metrics=figures, audit=audit)


def _audit(backend: Backend, folder: Path, manifest: Manifest, student: Checkpoint) -> Check | None:
    """Of a written program against its student; `None` where the backend cannot read its weights back."""
    try:
        weights = backend.weights(folder, manifest, student.module)
        if weights is None:
            return None
        found = audit_weights(student.module, weights, corrected=manifest.biases_corrected)
    except InputError as error:  # stored in a way that nobody knows, which no exporter of ours does
        return Check(name="weight audit", passed=False, detail=error.message)
    return Check(**found.model_dump())


def _noted(stop: _Stop, note: str) -> _Stop:
    return replace(stop, waypoint=stop.waypoint.model_copy(update={"note": note}))


def _attributed(
    item: Measured, stops: Sequence[_Stop], standard: Standard, cause: Callable[[Measured, Point, np.ndarray], str]
) -> Candidate:
    metric = chosen_metric(standard)[0]
    waypoints, checks = [stops[0].waypoint], []
    for before, stop in itertools.pairwise(stops):
        parity, note = _parity(before, stop)
        notes = "; ".join(filter(None, (stop.waypoint.note, note))) or None
        loss = loss_between(metric, before.answers, stop.answers, standard)
        waypoint = stop.waypoint.model_copy(update={"loss": loss, "parity": parity, "note": notes})
        waypoints.append(waypoint)
        found = _checks(waypoint, before.waypoint.name)
        if parity is not None and not parity.passed and stop.waypoint.name in ("graph", "program") and len(stops) == 4:
            why = cause(item, stop.waypoint.name, _furthest(before, stop))
            found = [check if check.passed else _told(check, why) for check in found]
        checks += found
    candidate = item.candidate
    return candidate.model_copy(update={"waypoints": waypoints, "checks": [*candidate.checks, *checks]})


def _parity(before: _Stop, stop: _Stop) -> tuple[Parity | None, str]:
    """Of the rows that both see as the same tokens; and what is to be said of the others."""
    if len(before.tokens) != len(stop.tokens):
        return None, "not compared with the point before: it cuts the texts into other windows"
    alike = np.array([left == right for left, right in zip(before.tokens, stop.tokens, strict=True)])
    cut = sum(len(left) > len(right) for left, right in zip(before.tokens, stop.tokens, strict=True))
    other = int((~alike).sum()) - cut
    notes = [f"{cut:,} of {len(alike):,} texts are cut shorter than before"] if cut else []
    notes += [f"{other:,} of {len(alike):,} texts are split into other tokens than before"] if other else []
    name = next(name for name in _COMPARED if name in stop.answers)
    left, right = (_flat(side.answers[name], alike) for side in (before, stop))
    if left.shape != right.shape or not left.size:
        return None, "; ".join(notes)
    largest, scale = float(np.max(np.abs(left - right))), float(np.max(np.abs(left)))
    apart, before_norm, norm = (float(np.linalg.norm(values)) for values in (left - right, left, right))
    return Parity(
        rows=int(alike.sum()),
        largest=largest,
        share=largest / scale if scale else largest,
        error=apart / before_norm if before_norm else apart,
        cosine=float(np.vdot(left, right)) / (before_norm * norm) if before_norm * norm else 1.0,
        tolerance=None if before.waypoint.name == "teacher" else stop.tolerance,  # another model may answer otherwise
        by_error=stop.waypoint.precision in QUANTISED,
    ), "; ".join(notes)


def _furthest(before: _Stop, stop: _Stop) -> np.ndarray:
    """The rows whose answers are furthest apart."""
    name = next(name for name in _COMPARED if name in stop.answers)
    sides = zip(before.answers[name], stop.answers[name], strict=True)
    apart = [np.max(np.abs(left - right), initial=0.0) if left.shape == right.shape else 0.0 for left, right in sides]
    return np.argsort(-np.nan_to_num(np.asarray(apart), nan=np.inf), kind="stable")[:_LOOKED_INTO]


def _told(check: Check, why: str) -> Check:
    return check.model_copy(update={"detail": check.detail + why}) if check.name.startswith("parity") else check


def _flat(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    chosen = values[rows]
    if chosen.dtype == object:
        chosen = np.concatenate(list(chosen)) if len(chosen) else np.empty(0)
    return np.asarray(chosen, dtype=np.float64)


def _checks(waypoint: Waypoint, before: Point) -> list[Check]:
    found = []
    name, parity, audit = _WORDS[waypoint.name], waypoint.parity, waypoint.audit
    if parity is not None and parity.tolerance is not None:
        said = f"{name} {'answers' if parity.passed else 'does not answer'} as {_WORDS[before]} does"
        what, of = (
            ("norm of the differences", "answers'") if parity.by_error else ("largest difference", "largest answer")
        )
        detail = (
            f"{said}: on {parity.rows:,} rows the {what} is {parity.judged:.2g} of the {of}, and {waypoint.precision} "
            f"explains {parity.tolerance:g}"
        )
        found.append(Check(name=f"parity, {before} to {waypoint.name}", passed=parity.passed, detail=detail))
    if audit is not None and waypoint.name == "graph":  # the program's is among the candidate's checks already
        found.append(audit.model_copy(update={"name": f"weights of {name}"}))
    return found
