"""What a distillation is asked for."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DistillSettings(BaseModel):
    """Settings of one distillation, kept in the student's lineage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int | list[int] | None = None
    """How many of the teacher's layers the student has (evenly spread), or which (from 0); `None` trains the
    checkpoint at hand as it is."""
    objectives: dict[str, float] | None = None
    """Objective to weight; the task's default when not given."""
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; ends training whatever `epochs` says."""
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(4e-4, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.01, ge=0)
    max_length: int | None = Field(None, ge=4)
    """Tokens a text is cut at while training; the model's own limit when not given."""
    freeze_embeddings: bool = False
    """Keep the embeddings inherited from the teacher: their dense update is a large share of a small student's step."""
    bf16: bool = False
    """Train under bfloat16 autocast."""
    seed: int = 0
