"""What `limbeck bisect` found: module by module, how far two adjacent points of an artifact's making are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from ...files import write_json
from .waypoints import Point

SCHEMA_VERSION: Final = 1
BISECTION_FILE = "bisection.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ModuleDifference(_Record):
    """How far what a module hands on is from the same module's at the point before, at real tokens.

    `error` is the Frobenius norm of the difference over that of the reference, `largest` the largest difference of one
    number, `cosine` that of all numbers. `error_in` is the error of what went into the module, `beyond` whether the
    module adds more than the precision explains.
    """

    module: str
    error: float
    largest: float
    cosine: float
    error_in: float = 0.0
    beyond: bool = False

    @property
    def growth(self) -> float | None:
        """How many times its input's error a module's is; `None` where nothing was wrong with what went in."""
        return self.error / self.error_in if self.error_in > 0 else None


class StepDifferences(_Record):
    """Two adjacent points, module by module in the order in which torch runs them; the program's output comes last.

    `explained` is the error that the precision explains in one module; `moved` says how far the later point's own
    output moved because its inside was looked at (further outputs keep compilers from fusing), as a share of its
    largest magnitude. `not_visible` are modules that torch shows and a graph does not.
    """

    before: Point
    after: Point
    precision: str
    explained: float
    modules: list[ModuleDifference]
    not_visible: list[str] = []
    moved: float = 0.0

    @property
    def first(self) -> ModuleDifference | None:
        """The first module where the two part beyond what the precision explains."""
        return next((module for module in self.modules if module.beyond), None)


class Bisection(_Record):
    """A whole answer. `created` is ISO 8601 in UTC; `rows` examples with `tokens` real tokens were run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    artifact: str
    artifact_id: str
    student: str
    precision: str
    data: str
    rows: int
    tokens: int
    steps: list[StepDifferences]
    notes: list[str] = []
    created: str
    command: str
    environment: dict[str, Any] = {}


def save_bisection(found: Bisection, folder: Path) -> Path:
    """Write `bisection.json` into `folder`, whole or not at all, and return its path."""
    write_json(folder / BISECTION_FILE, found.model_dump(mode="json"))
    return folder / BISECTION_FILE
