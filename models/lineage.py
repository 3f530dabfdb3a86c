"""History of a checkpoint: what was done to it, why, with which data, starting from which parent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .. import __version__
from ..files import read_document, read_json, write_json
from .data import Data

LINEAGE_FILE = "lineage.json"
TRAINING_ROWS_FILE = "training_rows.json"
TRACE_FILE = "trace.jsonl"
LINEAGE_SCHEMA = 1
_LARGEST_ROWS = 2 << 30
"""Bytes of the hashes of trained rows that are read at most: some 26 a row, and there may be tens of millions."""


class Curve(BaseModel):
    """One traced quantity over training: `values[i]` at optimiser step `steps[i]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    name: str
    unit: str = ""
    steps: list[float]
    values: list[float]

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        if len(self.steps) != len(self.values):
            raise ValueError(f"the curve {self.name} has {len(self.steps)} steps and {len(self.values)} values")
        return self


class LayerSimilarity(BaseModel):
    """How alike the layers of student and teacher were (linear CKA, 0 to 1) before and after training: one row a
    student layer, one column a teacher layer."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    before: list[list[float]] = Field(min_length=1)
    after: list[list[float]] = Field(min_length=1)

    @model_validator(mode="after")
    def _of_the_same_layers(self) -> Self:
        columns = {len(row) for matrix in (self.before, self.after) for row in matrix}
        if len(columns) != 1 or columns == {0} or len(self.before) != len(self.after):
            raise ValueError("the similarities before and after must be of the same layers, one row a student layer")
        return self


class LayerWidths(BaseModel):
    """How many heads or feed-forward channels one layer had before and after a cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: str
    unit: Literal["channels", "heads"] = "channels"
    before: int = Field(ge=0)
    after: int = Field(ge=0)


class DataRecord(BaseModel):
    """Which rows a step has seen."""

    model_config = ConfigDict(extra="forbid")

    source: str
    rows: int
    fingerprint: str

    @classmethod
    def of(cls, data: Data) -> DataRecord:
        """The record of these rows; the source is the file's name, since where it lay means nothing elsewhere."""
        return cls(source=Path(data.source).name, rows=len(data), fingerprint=data.fingerprint)


class Step(BaseModel):
    """One thing that was done to a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    verb: Literal["distill", "prune"]
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    rationale: str | None = None
    parent: str | None = None
    """Hash of the checkpoint that this step started from."""
    teacher: str | None = None
    """Hash of the teacher, where there was one."""
    data: DataRecord | None = None
    seconds: float | None = None
    curves: list[Curve] = Field(default_factory=list)
    widths: list[LayerWidths] = Field(default_factory=list)
    similarity: LayerSimilarity | None = None
    note: str | None = None
    limbeck: str = __version__
    finished: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class Lineage(BaseModel):
    """A checkpoint's whole history, oldest step first."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = LINEAGE_SCHEMA
    origin: str
    """Name of the model that everything started from."""
    task: str
    steps: list[Step] = Field(default_factory=list)

    def followed_by(self, step: Step) -> Lineage:
        """This history with one more step."""
        return self.model_copy(update={"steps": [*self.steps, step]})

    def save(self, folder: Path) -> None:
        """Write `lineage.json` into the folder."""
        write_json(folder / LINEAGE_FILE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Lineage | None:
        """The history kept in a checkpoint folder, or `None` for a model that limbeck has not touched.

        Raises:
            InputError: the file is malformed, or written by a newer limbeck.
        """
        path = folder / LINEAGE_FILE
        return read_document(path, cls, LINEAGE_SCHEMA) if path.exists() else None


def read_training_rows(folder: Path) -> dict[str, list[str]]:
    """Data fingerprint to row hashes, of every step in a checkpoint's or artifact's history; empty where none trained.

    Raises:
        InputError: the file is too large, or is not JSON.
    """
    path = folder / TRAINING_ROWS_FILE
    rows: dict[str, list[str]] = read_json(path, _LARGEST_ROWS) if path.exists() else {}
    return rows


def trace_lines(lineage: Lineage) -> Iterator[dict[str, Any]]:
    """The rows of `trace.jsonl`, which plots and notebooks read: for every training step at which anything was traced
    one object with `step` (position in the lineage, from 0), `method`, `training_step`, and each quantity under its
    name. What is not finite is `"NaN"` or `"Infinity"`, as in `lineage.json`."""
    for index, step in enumerate(lineage.steps):
        points: dict[float, dict[str, Any]] = {}
        for curve in step.curves:
            for at, value in zip(curve.steps, curve.values, strict=True):
                points.setdefault(at, {})[curve.name] = value if math.isfinite(value) else _name_of(value)
        for at in sorted(points):
            place = int(at) if at.is_integer() else at
            yield {"step": index, "method": step.method, "training_step": place, **points[at]}


def _name_of(value: float) -> str:
    """JSON has no number for it."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
