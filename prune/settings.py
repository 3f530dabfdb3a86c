"""What pruning is asked for."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import UsageError


class PruneSettings(BaseModel):
    """What to cut and how to choose it. In a recipe, `prune: {structure: ffn, keep: 0.5, method: taylor}` or
    `prune: {pattern: "2:4"}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    structure: Literal["ffn"] | None = Field(None, description="Cut whole channels of the feed-forward blocks.")
    pattern: Literal["2:4"] | None = Field(None, description="Zero weights in a pattern that sparse kernels take.")
    keep: float | None = Field(None, description="Share of channels that stay, more than 0 and at most 1.")
    method: Literal["magnitude", "taylor"] = Field(
        "magnitude", description="What says which channels matter: magnitude, or taylor with data."
    )
    batch_size: int = Field(16, ge=1, description="Rows a batch while importance is measured.")
    seed: int = Field(0, description="Draws the rows and the random directions.")
    samples: int | None = Field(512, ge=1, description="Most rows that importance looks at; null for all.")

    @model_validator(mode="after")
    def _consistent(self) -> PruneSettings:
        if (self.structure is None) == (self.pattern is None):
            raise UsageError(
                "Pruning takes exactly one of structure and pattern.",
                "Use --structure ffn --keep 0.5, or --pattern 2:4; for both, prune twice, the pattern last.",
            )
        if self.pattern is not None and self.method != "magnitude":
            raise UsageError(f"The pattern {self.pattern} is chosen by magnitude, not by {self.method}.")
        if self.pattern is not None and self.keep is not None:
            raise UsageError(f"The pattern {self.pattern} says what it keeps; keep is for a structure.")
        if self.structure is not None and self.keep is None:
            raise UsageError("Cutting channels needs the share that stays.", "Add --keep 0.5 to keep half.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UsageError(f"keep is {self.keep:g}; it must be more than 0 and at most 1.", "Use --keep 0.5.")
        return self
