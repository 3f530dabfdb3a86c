"""What was found when every part of a model was cut alone: the document, the rule that names what must not be touched,
and the sentence that says what the picture teaches.

`sensitivity.json` is this model; `validate.rendering.sensitivity` draws it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from ... import __version__
from ...files import read_document, write_json
from ...models.lineage import DataRecord
from .report import short_number

SCHEMA_VERSION: Final = 1
SENSITIVITY_FILE = "sensitivity.json"
DEFAULT_TOLERANCE = 0.01

LAYERS: Final = "layers"
TITLES = {
    "heads": "attention heads",
    "ffn": "feed-forward channels",
    LAYERS: "whole layer",
    "2:4": "2:4 weights",
    "unstructured": "single weights",
}
"""What a structure (see `prune/sensitivity.py`) is called in a sentence."""
_MIDDLE = 0.5
_DIGITS = 3


class SensitivityRecord(BaseModel):
    """One part of one layer, cut alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    structure: str
    layer: int = Field(ge=0)
    """Counted from 0."""
    share: float
    """The share that was asked for; what went is `cut` of `units` (heads, channels, layers or weights)."""
    cut: int = Field(ge=0)
    units: int = Field(ge=1)
    value: float
    """The headline metric with the part cut."""
    loss: float
    """How much worse that is (see `loss_of`)."""
    low: float | None = None
    """The ends of the loss's 95 % interval, paired by example; `None` where it would be costly or there is none."""
    high: float | None = None
    drift: dict[str, float] = Field(default_factory=dict)
    """How far the answers are from the uncut model's own, by metric."""


class Sensitivity(BaseModel):
    """`sensitivity.json`: quality against how much of each part is cut, without training."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    schema_version: Literal[1] = SCHEMA_VERSION
    model: str
    model_hash: str
    task: str
    layers: int = Field(ge=1)
    created: str
    command: str
    data: DataRecord
    structures: list[str]
    shares: list[float]
    method: str | None
    """What said which heads and channels go first; `None` where neither was cut."""
    metric: str
    higher_is_better: bool
    against_references: bool
    """Whether the metric is against the data's labels or texts; if not, it is the agreement with the uncut model."""
    uncut: float
    """The metric of the uncut model."""
    drift_metric: str
    drift_higher_is_better: bool
    tolerance: float
    records: list[SensitivityRecord]
    notes: list[str] = Field(default_factory=list)
    environment: dict[str, Any] = Field(default_factory=dict)
    limbeck: str = __version__

    @property
    def shown_share(self) -> float:
        """The share that a table or a map shows: of those that were cut, the one nearest to a half."""
        return min(self.shares, key=lambda share: abs(share - _MIDDLE))

    def of(self, structure: str, layer: int | None = None) -> list[SensitivityRecord]:
        """The records of a structure (in one layer), the smallest share first."""
        found = [item for item in self.records if item.structure == structure and layer in (None, item.layer)]
        return sorted(found, key=lambda item: (item.layer, item.share))

    def shown(self, structure: str) -> dict[int, SensitivityRecord]:
        """For each layer the record at the shown share, or the only one there is."""
        records = self.of(structure)
        shown = [item for item in records if item.share == self.shown_share] or records
        return {item.layer: item for item in shown}

    def first_cuts(self, structure: str) -> list[SensitivityRecord]:
        """For each layer the record at the smallest share, which the rule looks at."""
        least: dict[int, SensitivityRecord] = {}
        for item in self.of(structure):
            least.setdefault(item.layer, item)
        return list(least.values())

    def untouchable(self, structure: str) -> list[SensitivityRecord]:
        """The layers in which this must not be cut: the smallest share of it loses more than the tolerance."""
        return [item for item in self.first_cuts(structure) if item.loss > self.tolerance]

    def drift_of(self, record: SensitivityRecord) -> float:
        """How far the answers moved: 0 where they did not, more the further."""
        value = record.drift.get(self.drift_metric, math.nan)
        moved = 1.0 - value if self.drift_higher_is_better else value
        return moved if math.isfinite(moved) else math.inf

    @property
    def rule(self) -> str:
        """What makes a part untouchable, in a sentence."""
        what = f"{self.metric} on {self.data.rows:,} rows" + ("" if self.against_references else " (no labels)")
        first = "A part must not be touched where the smallest cut of it that was tried"
        if not self.uncut:
            return f"{first} takes the {what} above {self.tolerance:g}."
        return f"{first} loses more than {_limit(self)} of the uncut model's {what}."

    def is_certain(self, record: SensitivityRecord) -> bool:
        """Whether the whole interval of a loss lies above the tolerance: other rows like these would say the same."""
        return record.loss == math.inf or (record.low is not None and record.low > self.tolerance)


def loss_of(value: float, uncut: float, higher_is_better: bool) -> float:
    """How much worse a metric is than the uncut model's, as a share of that (as a difference where that is 0);
    infinite where nothing finite is left of it. Below 0 where the cut has done good."""
    if not math.isfinite(value):
        return math.inf
    worse = uncut - value if higher_is_better else value - uncut
    return worse / abs(uncut) if uncut else worse


def percent(share: float) -> str:
    """A loss for people: `0.4 %`, `51 %`."""
    if not math.isfinite(share):
        return "everything"
    size = abs(share) * 100
    figure = "0" if size < 0.05 else f"{size:.1f}" if size < 9.95 else f"{size:,.0f}"
    return f"{'−' if share < 0 and figure != '0' else ''}{figure} %"


def lesson(found: Sensitivity) -> str:
    """What the picture teaches, in one sentence: which part is missed most, and which least."""
    partial = [item for name in found.structures if name != LAYERS for item in _comparable(found, name)]
    clauses = []
    if partial:
        most, least = _extremes(partial)
        borne = sum(item.loss <= found.tolerance for item in partial)
        clauses += [
            f"with {_share(found.shown_share)} of one part cut, {borne} of {len(partial)} cuts cost no more than "
            f"{_limit(found)}",
            f"the {_part(most)} are missed most ({_change(found, most)}) and the {_part(least)} least "
            f"({_change(found, least)})",
        ]
    if LAYERS in found.structures:
        most, least = _extremes(found.of(LAYERS))
        clauses.append(
            f"of the whole layers, layer {most.layer} is missed most ({_change(found, most)}) and layer "
            f"{least.layer} least ({_change(found, least)})"
        )
    text = "; ".join(clauses)
    return f"{text[:1].upper()}{text[1:]}."


def _limit(found: Sensitivity) -> str:
    """The tolerance, exactly."""
    return f"{found.tolerance * 100:g} %" if found.uncut else f"{found.tolerance:g}"


def _comparable(found: Sensitivity, structure: str) -> Sequence[SensitivityRecord]:
    """Records of one share in all structures: 2:4 is a half."""
    return [item for item in found.shown(structure).values() if item.share == found.shown_share]


def _extremes(records: Sequence[SensitivityRecord]) -> tuple[SensitivityRecord, SensitivityRecord]:
    ranked = sorted(records, key=lambda item: item.loss)
    return ranked[-1], ranked[0]


def _part(record: SensitivityRecord) -> str:
    return f"{TITLES[record.structure]} of layer {record.layer}"


def _share(share: float) -> str:
    return "half" if share == _MIDDLE else f"{share:.0%}"


def _change(found: Sensitivity, record: SensitivityRecord) -> str:
    value = short_number(record.value, _DIGITS) if math.isfinite(record.value) else "nothing"
    told = percent(abs(record.loss)) if found.uncut else ""
    what = " better" if record.loss < 0 else " lost" if found.higher_is_better else " worse"
    return f"{found.metric} {short_number(found.uncut, _DIGITS)} → {value}" + (f", {told}{what}" if told else "")


def save_sensitivity(found: Sensitivity, folder: Path) -> Path:
    """Write `sensitivity.json` into `folder`, whole or not at all, and return its path."""
    path = folder / SENSITIVITY_FILE
    write_json(path, json.loads(found.model_dump_json()))
    return path


def load_sensitivity(path: Path) -> Sensitivity:
    """Read `sensitivity.json`, or the folder that holds one.

    Raises:
        InputError: missing, malformed, or written by a newer limbeck.
    """
    return read_document(path / SENSITIVITY_FILE if path.is_dir() else path, Sensitivity, SCHEMA_VERSION)
