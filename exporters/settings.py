"""What an export is asked for."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["fp32", "fp16", "bf16", "int8", "native"]
"""`native` is what the runtime chooses on its own on the device at hand (OpenVINO: bf16 where the CPU has it)."""


class ShapeRange(BaseModel):
    """The input sizes that a program must take, and the one it is tuned for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_batch: int = Field(1, ge=1)
    opt_batch: int = Field(8, ge=1)
    max_batch: int = Field(64, ge=1)
    min_sequence: int = Field(1, ge=1)
    opt_sequence: int = Field(128, ge=1)
    max_sequence: int = Field(512, ge=1)


class ExportSettings(BaseModel):
    """Settings of one export, kept in the artifact's manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str
    precision: Precision = "fp32"
    sparsity: Literal["2:4"] | None = None
    shapes: ShapeRange = ShapeRange()
    calibration_samples: int = Field(300, ge=1)
    """Rows that an int8 export is calibrated on."""
