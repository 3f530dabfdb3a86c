"""What an exporter hands back: the files it wrote, described; and the weights inside such files, for the audit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..models.batching import Run
from ..models.checkpoint import Checkpoint
from .artifact import CacheFacts, Manifest, SparseLayer, TensorSpec
from .parameter_names import TRANSPOSED, parts_of, rows_of
from .settings import ExportSettings


@dataclass(frozen=True)
class ProgramWeight:
    """One weight as the compiled program holds it, brought back to real numbers.

    Attributes:
        name: the parameter's name in the traced module.
        values: float32, in the parameter's own layout.
        step: the largest rounding that its storage explains, broadcastable to `values`: half a quantisation step for
            int8, 0 where the weight is stored as it was traced.
        rows: which rows of the parameter these are, where the program needs no others; `None`: all.
    """

    name: str
    values: np.ndarray
    step: np.ndarray | float = 0.0
    rows: slice | None = None

    @classmethod
    def of_constant(cls, name: str, values: np.ndarray, step: np.ndarray | float) -> Iterator[ProgramWeight]:
        """The weights that a constant of this name holds: one, unless several were packed side by side."""
        for part, columns in parts_of(name, values.shape[-1]) if values.ndim == 2 else ():
            yield cls._of_part(part, values[:, columns], step[:, columns] if isinstance(step, np.ndarray) else step)
        if values.ndim != 2:
            yield cls._of_part(name, values, step)

    @classmethod
    def _of_part(cls, name: str, values: np.ndarray, step: np.ndarray | float) -> ProgramWeight:
        """Turned back where the constant holds the transpose."""
        if not name.endswith(TRANSPOSED):
            name, rows = rows_of(name)
            return cls(name, values, step, rows)
        return cls(name.removesuffix(TRANSPOSED), values.T, step.T if isinstance(step, np.ndarray) else step)


def rounding_of(integers: np.ndarray, top: int) -> np.ndarray:
    """How far rounding to these integers may have moved a weight, in steps: half of one, and a whole one at the top,
    since a symmetric range has no opposite of its lowest integer and is cut there."""
    return np.where(integers == top, np.float32(1.0), np.float32(0.5))


@dataclass(frozen=True)
class Floor:
    """The quality that a program must keep."""

    metric: str
    least: float
    measure: Callable[[Run], float]
    """The metric of whatever computes a batch's outputs. More is better: of a perplexity it is the negative."""


@dataclass(frozen=True)
class ExportedProgram:
    """A freshly written program, before its checks."""

    format: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    compile_properties: Mapping[str, str] = field(default_factory=dict)
    cache: CacheFacts | None = None
    sparse_layers: list[SparseLayer] = field(default_factory=list)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    unverified: str | None = None
    is_kit: bool = False
    """The program still has to be built on the device it is for."""
    stand_in: str | None = None
    """What runs in the program's place where it was made, for checks of accuracy; such a program is not timed."""
    biases_corrected: bool = False
    """Quantising changed vectors (biases, norms) on purpose, so they are not audited."""

    def manifest(self, checkpoint: Checkpoint, settings: ExportSettings) -> Manifest:
        """What is known of the program before its checks; not sealed, so without files and id."""
        return Manifest(
            format=self.format,
            task=checkpoint.task.name,
            settings=settings,
            parent_hash=checkpoint.hash,
            parent=checkpoint.source,
            parameters=checkpoint.parameters,
            inputs=self.inputs,
            outputs=self.outputs,
            max_length=min(checkpoint.max_length, settings.shapes.max_sequence),
            compile_properties=dict(self.compile_properties),
            cache=self.cache,
            sparse_layers=self.sparse_layers,
            evidence=dict(self.evidence),
            unverified=self.unverified,
            is_kit=self.is_kit,
            stand_in=self.stand_in,
            biases_corrected=self.biases_corrected,
            lineage=checkpoint.lineage,
        )
