"""What pruning is asked for."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import UsageError, did_you_mean
from ..models.sparsity import parse_pattern
from .budget_settings import Budget

STRUCTURE_METHODS = ("magnitude", "taylor", "fisher", "activation", "block-influence")
ZERO_METHODS = ("magnitude", "wanda", "sparsegpt")
"""Names of `models/importance` and of `SPARSIFIERS`, so that a recipe can be checked without loading them."""
_KINDS = ("structure", "pattern", "sparsity", "budget")
_BELONG_TO = {
    "keep": ("structure",),
    "repair": ("structure",),
    "protect": ("structure",),
    "allocation": ("structure", "sparsity"),
    "permute": ("pattern",),
    "block": ("sparsity",),
}
"""Settings that only some kinds of pruning know."""


class PruneSettings(BaseModel):
    """What to remove and how it is chosen. In a recipe, one of

    ```yaml
    prune: {structure: heads, keep: 0.5, method: fisher, repair: true}
    prune: {pattern: "2:4", method: sparsegpt, permute: true}
    prune: {sparsity: 0.6, method: wanda}
    prune: {budget: {latency_ms: 2.0, backend: openvino}, method: fisher}
    ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    structure: Literal["heads", "ffn", "layers", "width"] | None = Field(
        None, description="Cut parts out: attention heads, feed-forward channels, layers, or residual width."
    )
    pattern: str | None = Field(None, description='Zero weights in an N:M pattern: "2:4" is what sparse kernels take.')
    sparsity: float | None = Field(None, description="Share of single weights to zero, between 0 and 1.")
    budget: Budget | None = Field(None, description="Choose heads, channels and layers to cut by what the rest costs.")
    keep: float | list[float] | None = Field(
        None, description="Share of a structure that stays, more than 0 and at most 1; or one share for each layer."
    )
    allocation: Literal["uniform", "global"] = Field(
        "uniform", description="The same share in every layer, or by importance over all layers."
    )
    method: str | None = Field(None, description="What says which parts matter; see docs/pruning.md.")
    repair: bool = Field(False, description="Fit what stays to what the whole computed, by least squares.")
    permute: bool = Field(False, description="First put channels in the order in which the pattern costs least.")
    block: tuple[int, int] | None = Field(None, description="Zero whole blocks of [rows, columns] of a matrix.")
    protect: list[int] = Field(default_factory=list, description="Layers that are left whole (from 0).")
    batch_size: int = Field(16, ge=1, description="Rows a batch while data is looked at.")
    seed: int = Field(0, description="Draws the rows and the random directions.")
    samples: int | None = Field(512, ge=1, description="Most rows (or windows of long texts) looked at; null for all.")
    max_length: int | None = Field(
        None, ge=4, description="Tokens a text is cut at while data is looked at; the model's own limit if not given."
    )

    @model_validator(mode="after")
    def _consistent(self) -> PruneSettings:
        stated = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(stated) != 1:
            raise UsageError(
                "Pruning takes exactly one of structure, pattern, sparsity and budget; given: "
                f"{', '.join(stated) or 'none'}.",
                "Use --structure ffn --keep 0.5, --pattern 2:4, --sparsity 0.5 or --budget; for two, prune twice, "
                "structures first.",
            )
        for name, kinds in _BELONG_TO.items():
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if getattr(self, name) != default and stated[0] not in kinds:
                raise UsageError(f"{name} is for pruning by {' or '.join(kinds)}, not by {stated[0]}.")
        self._check_values()
        return self

    def _check_method(self) -> None:
        known: tuple[str, ...] = (
            ZERO_METHODS if self.pattern is not None or self.sparsity is not None else STRUCTURE_METHODS
        )
        if self.budget is not None:
            known = ("taylor", "fisher")  # whose scores add up over layers
        if self.method == "movement":
            raise UsageError("movement looks at how weights move in training.", "Use sparsify beside distill.")
        if self.method is not None and self.method not in known:
            near = did_you_mean(self.method, known)
            what = next(kind for kind in _KINDS if getattr(self, kind) is not None)
            raise UsageError(f"There is no method {self.method!r} for a {what}; valid are {', '.join(known)}.{near}")
        if self.method == "block-influence" and self.structure != "layers":
            raise UsageError(
                f"block-influence scores layers, not {self.structure}.", "Use activation, taylor or fisher."
            )

    def _check_values(self) -> None:
        self._check_method()
        if self.structure is not None:
            if self.keep is None:
                raise UsageError("Cutting a structure needs the share that stays.", "Add --keep 0.5 to keep half.")
            self._check_shares()
        if self.repair and self.structure not in ("heads", "ffn"):
            raise UsageError(f"repair fits what stays of heads or ffn, not of {self.structure}: train it instead.")
        if self.protect and self.structure == "width":
            raise UsageError("protect cannot leave layers whole when the width that they share is cut.")
        if self.pattern is not None:
            parse_pattern(self.pattern)
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise UsageError(f"sparsity is {self.sparsity:g}; it must be between 0 and 1.", "Use --sparsity 0.5.")
        if self.block is not None and min(self.block) < 1:
            raise UsageError(f"block is {list(self.block)}; both of its sizes must be at least 1.")

    def _check_shares(self) -> None:
        shares = self.keep if isinstance(self.keep, list) else [self.keep]
        for share in shares:
            if share is None or not 0 < share <= 1:
                raise UsageError(f"keep is {share:g}; it must be more than 0 and at most 1.", "Use --keep 0.5.")
        if isinstance(self.keep, list) and (self.structure not in ("heads", "ffn") or self.allocation == "global"):
            raise UsageError("keep takes one share for each layer with heads and ffn only, and allocation uniform.")

    @property
    def chosen_by(self) -> str:
        """The method, or the default of what is pruned."""
        if self.method is not None:
            return self.method
        if self.budget is not None:
            return "fisher"
        return "block-influence" if self.structure == "layers" else "magnitude"

    def of_the_same_shape(self) -> PruneSettings:
        """Settings that need no data and leave a model of the same sizes, to learn what it will cost."""
        plain = {"method": "magnitude", "repair": False, "permute": False}
        return PruneSettings(**{**self.model_dump(exclude_defaults=True), **plain})
