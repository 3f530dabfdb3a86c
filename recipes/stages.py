"""The stages of a recipe: what each changes of a model, and when a cycle of changes has done enough."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..distill.settings import DistillSettings
from ..prune.settings import PruneSettings
from ..prune.sparsify_settings import SparsifySettings

_CHOOSES_WEIGHTS = ("evaluate_every", "patience", "metric")


class RecipePart(BaseModel):
    """Refuses keys that it does not have."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Until(RecipePart):
    """Costs at which a cycle has done enough: all that are stated have to be reached."""

    parameters: int | None = Field(None, ge=1)
    size_mb: float | None = Field(None, gt=0)
    latency_p50_ms: float | None = Field(None, gt=0)
    speedup_p50: float | None = Field(None, gt=0)
    """At least so many times faster than the eager teacher."""
    export: str | None = None
    """The export in whose format a round is compiled to be weighed and timed; parameters need none."""

    @model_validator(mode="after")
    def _export_where_needed(self) -> Self:
        limits = self.limits()
        if not limits:
            raise ValueError("until states no cost; it takes parameters, size_mb, latency_p50_ms and speedup_p50")
        if self.export is None and (compiled := limits.keys() - {"parameters"}):
            raise ValueError(f"until needs export: the name of the export that {min(compiled)} is measured on")
        return self

    def limits(self) -> dict[str, float]:
        """The limits that were stated, by metric."""
        return {name: float(value) for name, value in self.model_dump(exclude={"export"}, exclude_none=True).items()}


class Cycle(RecipePart):
    """Prune a little, let it recover, measure, and again. The cheapest model that holds the floor is kept.

    ```yaml
    cycle:
      prune: {structure: ffn, keep: 0.8, method: taylor}
      distill: {max_steps: 200}
      rounds: 6
      until: {speedup_p50: 6, export: openvino-int8}
      floor: {agreement_spearman: 0.85}
    ```

    It stops when `until` is reached, when a round falls below the `floor` (the round before it is kept), or when the
    rounds are used up. A cycle that ends without reaching `until` is no error: it says so in `cycle.json` and in the
    report, and a constraint on the artifact is what stops a release.
    """

    prune: PruneSettings
    """What a round cuts of what the round before left: `keep: 0.8` leaves 0.8, then 0.64, of the channels."""
    distill: DistillSettings
    """The training by which the rest recovers."""
    rounds: int = Field(ge=1)
    until: Until | None = None
    floor: dict[str, float] = Field(default_factory=dict)
    """Metric on `data.development` to its worst tolerable value: the least, or of a perplexity the most."""

    @model_validator(mode="after")
    def _rounds_differ(self) -> Self:
        if self.prune.structure is None:
            raise ValueError("a cycle cuts a structure: a pattern is whole after one round")
        if self.prune.keep == 1:
            raise ValueError("a cycle that keeps everything (keep: 1) cuts nothing")
        if self.distill.student is not None:
            raise ValueError("a cycle goes on with the stage above: draw the student there, not in its distill")
        if self.until is None and not self.floor:
            raise ValueError("a cycle needs until, floor or both to know what it is looking for")
        return self


class Stage(RecipePart):
    """One change of a model: exactly one of `distill`, `prune` and `cycle`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    start: str | None = None
    """The stage (or `teacher`) that this one starts from; the stage above when not given."""
    teacher: str | None = None
    """Who teaches: the recipe's teacher, or a stage above (a teacher assistant, Mirzadeh et al. 2020)."""
    data: str | None = None
    """Text of its own; `data.train` when not given."""
    distill: DistillSettings | None = None
    sparsify: SparsifySettings | None = None
    """Zeros that come while `distill` trains."""
    prune: PruneSettings | None = None
    cycle: Cycle | None = None
    rationale: str | None = None

    @model_validator(mode="after")
    def _one_verb(self) -> Self:
        if [self.distill, self.prune, self.cycle].count(None) != 2:
            raise ValueError(f"the stage {self.name} needs exactly one of distill, prune and cycle")
        if self.sparsify is not None and self.distill is None:
            raise ValueError(f"the stage {self.name} has sparsify, which needs a training beside it: add distill")
        if self.prune is not None and self.teacher is not None:
            raise ValueError(f"the stage {self.name} prunes: it has no use for a teacher")
        return self

    @property
    def training(self) -> DistillSettings | None:
        """How it trains, if it does: on its own or in the rounds of a cycle."""
        return self.cycle.distill if self.cycle is not None else self.distill

    @property
    def needs_development(self) -> str | None:
        """What of it is chosen by measuring, in words; `None` where nothing is."""
        if self.cycle is not None:
            return "measures its rounds"
        chosen = self.chooses_weights
        return f"chooses its weights while it trains ({', '.join(chosen)})" if chosen else None

    @property
    def chooses_weights(self) -> list[str]:
        """The settings by which training measures and keeps its best weights."""
        return [name for name in _CHOOSES_WEIGHTS if self.training and getattr(self.training, name) is not None]
