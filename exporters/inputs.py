"""Inputs to trace with, shapes that may vary, and shapes to probe an exported program with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..models.batching import Batch
from ..models.checkpoint import Checkpoint
from .settings import ShapeRange

TRACED_BATCH, TRACED_SEQUENCE = 2, 16
"""Sizes of the traced sample: 2 or more, since torch bakes in sizes of 0 and 1; unlike each other and any layer's."""


def random_ids(vocabulary: int, batch: int, sequence: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 [batch, sequence], the same ones for the same arguments everywhere."""
    generator = torch.Generator().manual_seed(seed * 7919 + batch * 1009 + sequence)
    lowest = min(5, vocabulary - 1)  # ids below are special tokens in most vocabularies (padding matters to RoBERTa)
    return torch.randint(lowest, vocabulary, (batch, sequence), generator=generator)


def random_batch(input_names: Sequence[str], vocabulary: int, shape: tuple[int, int], seed: int) -> Batch:
    """Random ids without padding, int64 [batch, sequence] by input name; whatever is neither ids, mask nor positions is
    0."""
    ids = random_ids(vocabulary, *shape, seed)
    positions = torch.arange(shape[1]).expand_as(ids)
    named = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    return {name: named.get(name, torch.zeros_like(ids)) for name in input_names}


def vocabulary_of(config: Mapping[str, Any], source: Path) -> int:
    """The vocabulary's size, also of a model whose text part has a configuration of its own.

    Raises:
        InputError: the configuration names none.
    """
    for part in (config, config.get("text_config") or {}):
        if isinstance(size := part.get("vocab_size"), int) and size > 0:
            return size
    raise InputError(f"{source / 'config.json'} has no vocab_size, so no token ids can be drawn for it.")


def token_stream(batches: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor | None:
    """The real tokens of some batches in one row, int64 [tokens], padding left out; `None` without batches."""
    rows = [batch["input_ids"][batch["attention_mask"].bool()] for batch in batches]
    return torch.cat(rows) if rows else None


def probe_batch(
    checkpoint: Checkpoint, batch: int, sequence: int, *, padded: bool = False, stream: torch.Tensor | None = None
) -> Batch:
    """A batch of the wanted shape: real text cut from `stream`, or random ids without one.

    With `padded`, row i is cut short by a third of its length and more.
    """
    ids = random_ids(int(checkpoint.model.config.vocab_size), batch, sequence)
    if stream is not None:
        repeated = stream.repeat(-(-batch * sequence // len(stream)))
        ids = repeated[: batch * sequence].reshape(batch, sequence)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            kept = max(1, sequence - (row + 1) * max(1, sequence // 3))
            mask[row, kept:] = 0
        ids = ids.where(mask.bool(), torch.tensor(_padding_id(checkpoint)))
    named = {"input_ids": ids, "attention_mask": mask}
    return {name: named.get(name, torch.zeros_like(ids)) for name in checkpoint.input_names}


def _padding_id(checkpoint: Checkpoint) -> int:
    token = checkpoint.tokenizer.pad_token_id
    return int(token if token is not None else 0)


def traced_sizes(checkpoint: Checkpoint, shapes: ShapeRange) -> tuple[int, int]:
    """Batch and sequence of the traced sample: the usual ones where the range allows them."""
    top = longest(checkpoint, shapes)
    batch = min(max(TRACED_BATCH, shapes.min_batch), shapes.max_batch)
    return batch, min(max(TRACED_SEQUENCE, shapes.min_sequence), top)


def sample_inputs(checkpoint: Checkpoint, shapes: ShapeRange) -> dict[str, Any]:
    """What the graph is traced with: a padded batch and the task's constant flags."""
    batch = probe_batch(checkpoint, *traced_sizes(checkpoint, shapes), padded=True)
    return {**batch, **checkpoint.task.forward_flags()}


def dynamic_shapes(checkpoint: Checkpoint, shapes: ShapeRange) -> dict[str, Any]:
    """Batch and sequence vary within their ranges in every input, unless a range holds one size; nothing else does."""
    top = longest(checkpoint, shapes)
    axes: dict[int, Any] = {}
    if shapes.min_batch < shapes.max_batch:
        axes[0] = torch.export.Dim("batch", min=shapes.min_batch, max=shapes.max_batch)
    if shapes.min_sequence < top:
        axes[1] = torch.export.Dim("sequence", min=shapes.min_sequence, max=top)
    return {name: dict(axes) for name in checkpoint.input_names}


def longest(checkpoint: Checkpoint, shapes: ShapeRange) -> int:
    """The longest sequence a program takes: what was asked for, within what the model has positions for."""
    return min(shapes.max_sequence, checkpoint.max_length)


def probe_batches(
    checkpoint: Checkpoint, shapes: ShapeRange, stream: torch.Tensor | None = None
) -> Iterator[tuple[str, Batch]]:
    """Shapes at which exports go wrong, each with its name: ones, odd sizes, padding, the longest length; where a size
    is static, that one.

    None of them is the traced shape where sizes vary, so an axis that was baked in shows.
    """
    top, seen = longest(checkpoint, shapes), set()
    for batch, sequence, padded in ((1, 1, False), (1, 7, False), (3, 13, False), (5, 24, True), (1, top, False)):
        size = min(max(batch, shapes.min_batch), shapes.max_batch), min(max(sequence, shapes.min_sequence), top)
        if (size, padded) not in seen:
            seen.add((size, padded))
            kind = ", padded" if padded else ""
            yield f"{size[0]} x {size[1]}{kind}", probe_batch(checkpoint, *size, padded=padded, stream=stream)
