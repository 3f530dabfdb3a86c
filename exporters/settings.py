"""What an export is asked for: what every backend understands, and the options that are one backend's own."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal[
    "fp32", "tf32", "fp16", "bf16", "fp8", "int8", "int8-weight-only", "int4-weight-only", "native"
]  # fmt: skip
"""`native` is what the runtime chooses on its own on the device at hand (OpenVINO: bf16 where the CPU has it). `int8`
and `fp8` quantise weights and activations, `...-weight-only` what is stored and not what is computed with."""

CALIBRATED: tuple[Precision, ...] = ("int8", "fp8")
"""Precisions whose activations are quantised, by ranges that are measured on real inputs."""
WEIGHT_ONLY: tuple[Precision, ...] = ("int8-weight-only", "int4-weight-only")
QUANTISED: tuple[Precision, ...] = (*CALIBRATED, *WEIGHT_ONLY)


class ShapeRange(BaseModel):
    """The input sizes that a program must take, and the one it is tuned for. Smallest = largest makes a size static:
    the program takes no other, and compilers make more of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_batch: int = Field(1, ge=1)
    opt_batch: int = Field(8, ge=1)
    max_batch: int = Field(64, ge=1)
    min_sequence: int = Field(1, ge=1)
    opt_sequence: int = Field(128, ge=1)
    max_sequence: int = Field(512, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for what in ("batch", "sequence"):
            smallest, largest = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if smallest > largest:
                raise ValueError(f"the smallest {what} {smallest} is above the largest, {largest}")
        return self

    def within(self, longest: int) -> Self:
        """The same for a model that has positions for `longest` tokens, with the tuned sizes inside the range.

        Raises:
            ValueError: even the smallest sequence is longer than that.
        """
        top = min(self.max_sequence, longest)
        sizes = {
            "max_sequence": top,
            "opt_batch": min(max(self.opt_batch, self.min_batch), self.max_batch),
            "opt_sequence": min(max(self.opt_sequence, self.min_sequence), top),
        }
        return type(self)(**{**self.model_dump(), **sizes})


class ExportSettings(BaseModel):
    """Settings of one export, kept in the artifact's manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str
    precision: Precision = "fp32"
    sparsity: Literal["2:4"] | None = None
    shapes: ShapeRange = ShapeRange()
    calibration_samples: int = Field(300, ge=1)
    """Rows that an int8 or fp8 export is calibrated on."""
    floor: float | None = Field(None, gt=0, le=1)
    """Share of the checkpoint's own quality that the program keeps, or it is not written."""
    tokenizer_graph: bool = False
    """Whether the tokenizer is written as a graph too, which the runtime runs beside the program."""
    kv_cache: bool = True
    """Whether a language model's program keeps keys and values of what it has read, and so writes text."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The backend's own, checked by its `Backend.options`; `limbeck backends NAME` lists them."""
