"""What a distillation is asked for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StudentSettings(_Settings):
    """How an untrained student is drawn from its teacher; what is not given is as large as the teacher's."""

    layers: int | list[int] | None = None
    """How many of the teacher's layers the student has, or which (from 0)."""
    choose: Literal["uniform", "first", "last", "importance"] = "uniform"
    """Which, where `layers` is a number; `importance` measures on the training text what each layer changes."""
    hidden_size: int | None = Field(None, ge=8)
    """Width of the residual stream; the channels that are kept are the ones that carry most on the training text."""
    heads: int | None = Field(None, ge=1)
    """Attention heads; the teacher's head size is kept where the architecture allows it."""
    ffn: int | None = Field(None, ge=8)
    """Feed-forward channels of a layer."""
    config: str | dict[str, Any] | None = None
    """From scratch, with random weights: a `config.json`, or what to change in the teacher's configuration. Takes the
    place of all of the above."""


class OnPolicy(_Settings):
    """Text that the student wrote itself, corrected by the teacher (GKD, Agarwal et al. 2024): the student is trained
    on the mistakes that it makes."""

    share: float = Field(0.5, gt=0, le=1)
    """Share of the steps that train on the student's own continuations instead of the data."""
    prompt_tokens: int = Field(16, ge=1)
    new_tokens: int = Field(48, ge=1)
    temperature: float = Field(1.0, gt=0)


class DistillSettings(_Settings):
    """Settings of one distillation, kept in the student's lineage."""

    student: StudentSettings | None = None
    """How the student is drawn from its teacher; `None` trains the checkpoint at hand as it is."""
    objectives: dict[str, Any] | None = None
    """Objective to weight, or to a mapping of its settings (`logits-kl: {weight: 1, temperature: 4}`); the task's
    default when not given."""
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; ends training whatever `epochs` says."""
    batch_size: int = Field(32, ge=1)
    """Examples a process and step."""
    gradient_accumulation: int = Field(1, ge=1)
    """Batches whose gradients make one optimiser step."""
    learning_rate: float = Field(4e-4, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.01, ge=0)
    max_length: int | None = Field(None, ge=4)
    """Tokens a text is cut at while training; the model's own limit when not given."""
    freeze_embeddings: bool = False
    """Keep the embeddings inherited from the teacher: their dense update is a large share of a small student's step."""
    train_layers: list[int] | None = None
    """Only these layers learn (from 0), with whatever is learnt beside the student: layer-by-layer distillation is a
    stage for each."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """What matrix products are computed in while training (autocast); weights stay float32. `auto` is bf16 where the
    hardware multiplies it, fp32 elsewhere."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    on_policy: OnPolicy | None = None
    """text-generation only."""
    evaluate_every: int | None = Field(None, ge=1)
    """Steps between two measurements of the task's metrics, where there is something to measure them on."""
    metric: str | None = None
    """The metric that decides which weights are kept, and when to stop; the task's own when not given."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many measurements without a better metric."""
    save_every: int | None = Field(None, ge=1)
    """Steps between two checkpoints that a killed run resumes from; a tenth of the run when not given."""
    seed: int = 0
