"""Where two adjacent points of an artifact's making part: what each module hands on, compared one by one.

The student shows its inside by hooks, a graph by further outputs (`Backend.intermediates`). A module is named when it
adds more error than its precision explains:

    error(out) > 3 * error(in) + explained

where the errors are relative Frobenius norms, `in` is what went into the module, and `explained` is what one module's
arithmetic costs in that precision. Relative to its input, because an error that is handed on is not the module's own,
and three times, because sums that cancel make a relative error larger without being wrong (twice is usual where an
activation cuts small values away).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ...backends.base import Backend, Runner
from ...errors import BackendUnavailable
from ...exporters.artifact import Manifest
from ...exporters.fitting import padded_to
from ...exporters.settings import Precision, ShapeRange
from ...models.batching import Batch, Examples, batches_by_length
from ...models.checkpoint import Checkpoint
from ...models.module_outputs import module_outputs
from ..records.bisection import ModuleDifference, StepDifferences
from ..records.waypoints import Point
from .reference import Reference

EXPLAINED: dict[Precision, float] = {
    "fp32": 1e-4,
    "tf32": 3e-3,
    "fp16": 3e-3,
    "bf16": 1e-2,
    "native": 1e-2,
    "fp8": 1e-1,
    "int8": 1e-1,
    "int8-weight-only": 3e-2,
    "int4-weight-only": 2e-1,
}
"""Relative error that one module's arithmetic explains, about five times what all-MiniLM-L6-v2 shows on STS-B: in
float32 summation in another order (1e-6, with much room), in float16, tf32 and bfloat16 a rounding of every operand to
11, 11 or 8 bits (2e-3 in bfloat16), in int8 and fp8 a rounding of activations by one scale a tensor (2e-2), with int8
or int4 weights alone that of the weights."""
_AMPLIFIED = 3.0
_BATCH = 8


@dataclass
class _Sums:
    """Of one module over all batches."""

    difference: float = 0.0
    reference: float = 0.0
    other: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        left, right = before.astype(np.float64).ravel(), after.astype(np.float64).ravel()
        apart = right - left
        self.difference += float(apart @ apart)
        self.reference += float(left @ left)
        self.other += float(right @ right)
        self.product += float(left @ right)
        self.largest = max(self.largest, float(np.max(np.abs(apart), initial=0.0)))  # NaN is kept by the sums

    def of(self, module: str) -> ModuleDifference:
        lengths = (self.reference * self.other) ** 0.5
        error = (self.difference / self.reference) ** 0.5 if self.reference else self.difference**0.5
        cosine = self.product / lengths if lengths else 1.0
        return ModuleDifference(module=module, error=error, largest=self.largest, cosine=cosine)


@dataclass
class _Comparison:
    """Two points, filled batch by batch."""

    before: Point
    after: Point
    precision: Precision
    sums: dict[str, _Sums] = field(default_factory=dict)

    def add(self, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], mask: np.ndarray) -> None:
        for name in before:
            left, right = before[name], after.get(name)
            if right is not None and left.size == right.size:
                right = right.reshape(left.shape)
                self.sums.setdefault(name, _Sums()).add(_real(left, mask), _real(right, mask))

    def judged(self, order: Sequence[str], sources: Mapping[str, str], moved: float) -> StepDifferences:
        explained = EXPLAINED[self.precision]
        found: list[ModuleDifference] = []
        for name in order:
            if name in self.sums:
                found.append(_judged(self.sums[name].of(name), found, sources.get(name), explained))
        hidden = [name for name in order if name not in self.sums]
        return StepDifferences(
            before=self.before, after=self.after, precision=self.precision, explained=explained, modules=found,
            not_visible=hidden, moved=moved,
        )  # fmt: skip


def _judged(
    module: ModuleDifference, before: Sequence[ModuleDifference], source: str | None, explained: float
) -> ModuleDifference:
    """With the error of what went in: its input's and those of the modules inside it; where its input is no module's
    output (a residual's sum, say), the largest of all before it."""
    inside = [known.error for known in before if known.module.startswith(f"{module.module}.")]
    known_source = [known.error for known in before if known.module == source]
    errors = [*inside, *known_source] if known_source else [known.error for known in before]
    error_in = max(errors, default=0.0)
    within = module.error <= _AMPLIFIED * error_in + explained
    return module.model_copy(update={"error_in": error_in, "beyond": not within})


@dataclass(frozen=True)
class Inside:
    """An artifact's program with its inside to be seen, and as it runs otherwise."""

    point: Point
    precision: Precision
    shown: Runner
    plain: Runner

    def moved(self, batch: Batch, seen: Mapping[str, np.ndarray]) -> float:
        """How far its own output is from what it is otherwise, as a share of the largest magnitude."""
        plain = self.plain(batch)
        apart = [float(np.max(np.abs(seen[name] - value))) for name, value in plain.items()]
        scale = max(float(np.max(np.abs(value))) for value in plain.values())
        return max(apart) / scale if scale else max(apart)


def compare_inside(
    student: Checkpoint, points: Sequence[Inside], examples: Examples, shapes: ShapeRange
) -> list[StepDifferences]:
    """The student against the first point, and each point against the next, on these examples.

    Args:
        points: programs of the same inputs, in the order in which one is made of the other.
        shapes: sizes that all of them take.
    """
    names: list[Point] = ["student", *(point.point for point in points)]
    steps = [_Comparison(names[i], point.point, point.precision) for i, point in enumerate(points)]
    moved = [0.0 for _ in points]
    order: dict[str, None] = {}
    sources: dict[str, str] = {}
    for _, rows in batches_by_length(examples, student.tokenizer, min(_BATCH, shapes.max_batch)):
        batch = padded_to(student.model_inputs(rows), shapes)
        mask = batch["attention_mask"].numpy().astype(bool)
        seen, found = inside_of(student, batch)
        order.update(dict.fromkeys(seen))
        sources.update(found)
        for i, point in enumerate(points):
            after = _output_last(point.shown(batch), student, seen)
            steps[i].add(seen, after, mask)
            moved[i] = max(moved[i], point.moved(batch, after))
            seen = after
    return [step.judged(list(order), sources, apart) for step, apart in zip(steps, moved, strict=True)]


@torch.inference_mode()
def inside_of(student: Checkpoint, batch: Batch) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What each module of an eager model hands on by its name, the task's output last under its own; and which module
    made what goes into another."""
    with module_outputs(student.module) as outputs:
        answer = student.module(**batch, **student.task.forward_flags())[student.task.output]
    last = outputs.maker(answer)  # a head's output is the model's: it is listed once, as that
    seen = {name: tensor.numpy() for name, tensor in outputs.tensors.items() if name != last}
    return {**seen, student.task.output: answer.float().numpy()}, outputs.sources


def _output_last(values: Mapping[str, np.ndarray], student: Checkpoint, order: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: values[name] for name in [*order, student.task.output] if name in values}


def _real(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """At real tokens only, where there is a value a token."""
    return values[mask] if values.ndim >= 3 and values.shape[:2] == mask.shape else values


def modules_of(student: Checkpoint, examples: Examples, shapes: ShapeRange) -> list[str]:
    """The modules that an eager run shows, in its order."""
    _, rows = next(iter(batches_by_length(examples, student.tokenizer, 1)))
    return list(inside_of(student, padded_to(student.model_inputs(rows), shapes))[0])


def first_difference(
    student: Checkpoint, reference: Reference, examples: Examples, program: Program | None = None
) -> list[StepDifferences]:
    """Student against its reference graph, and that against a program, where one is given that shows its inside.

    Raises:
        BackendUnavailable: a backend whose graphs do not show their inside, or a runtime that is not here.
    """
    shapes = reference.manifest.settings.shapes
    modules = modules_of(student, examples, shapes)
    graph = Program("graph", reference.folder, reference.manifest, reference.backend)
    with ExitStack() as opened:
        points = [_opened(part, modules, opened) for part in (graph, program) if part is not None]
        if points[0] is None:
            name = reference.backend.name
            raise BackendUnavailable(f"The backend {name} does not show what happens inside its programs.")
        return compare_inside(student, [point for point in points if point is not None], examples, shapes)


@dataclass(frozen=True)
class Program:
    """A verified artifact, or a reference graph, to be looked into."""

    point: Point
    folder: Path
    manifest: Manifest
    backend: Backend


def _opened(program: Program, modules: Sequence[str], opened: ExitStack) -> Inside | None:
    shown = program.backend.intermediates(program.folder, program.manifest, modules)
    if shown is None:
        return None
    opened.enter_context(closing(shown))
    plain = opened.enter_context(closing(program.backend.load(program.folder, program.manifest)))
    return Inside(program.point, program.manifest.settings.precision, shown, plain)
