"""Zeroing weights without training: the methods by name, and the walk over a model that applies one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..errors import InputError, UsageError, did_you_mean
from ..models.anatomy import Linear, anatomy_of, in_features, out_features, reduction_axis
from ..models.checkpoint import Checkpoint
from ..models.mapped import copy_of, is_large, settle
from .layerwise import Moments, layerwise_pass
from .masks import Pattern
from .result import skipped_note
from .sparsegpt import SparseGPT
from .sparsifier import Magnitude, Sparsifier
from .wanda import Wanda

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.importance import Calibration

SPARSIFIERS: dict[str, type[Sparsifier]] = {method.name: method for method in (Magnitude, Wanda, SparseGPT)}


def get_sparsifier(name: str) -> Sparsifier:
    """The one-shot method of that name.

    Raises:
        UsageError: there is none, or it belongs to training; the message lists them.
    """
    known = ", ".join(SPARSIFIERS)
    if name == "movement":
        raise UsageError(
            "Movement is how weights change in training, so there is none to prune by before it; one-shot methods are "
            f"{known}.",
            "Give movement to a sparsity schedule in distillation.",
        )
    if name not in SPARSIFIERS:
        raise UsageError(f"There is no method {name!r}; valid are {known}.{did_you_mean(name, SPARSIFIERS)}")
    return SPARSIFIERS[name]()


@dataclass
class Plan:
    """Which matrices get zeros, by qualified name, and which are left dense, each with the reason."""

    chosen: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def note(self) -> str:
        """How many of the matrices, and the others with their reasons."""
        count = f"{len(self.chosen)} of {len(self.chosen) + len(self.skipped)} matrices."
        return f"{count} {skipped_note(self.skipped)}".rstrip()


def plan(checkpoint: Checkpoint, what: str, why_not: Callable[[int, int], str | None]) -> Plan:
    """Go through the matrices inside the layers: embeddings and heads (tied ones among them) stay dense.

    Args:
        what: the pattern, for messages.
        why_not: (rows, columns) -> the reason for which a matrix is left dense, or `None`.

    Raises:
        InputError: an unknown architecture, or a model of which no matrix can be taken.
    """
    found = Plan()
    for name, module in anatomy_of(checkpoint.model).linear_layers(checkpoint.model):
        if (reason := why_not(out_features(module), in_features(module))) is not None:
            found.skipped.append((name, reason))
        else:
            found.chosen.append(name)
    if not found.chosen:
        raise InputError(f"No matrix of {checkpoint.source} can be made {what}: {skipped_note(found.skipped)}")
    return found


def require_calibration(sparsifier: Sparsifier, calibration: Calibration | None) -> Calibration | None:
    """The calibration where the method looks at it, else nothing.

    Raises:
        UsageError: the method needs examples, and there are none.
    """
    if not sparsifier.needs_data:
        return None
    if calibration is None:
        raise UsageError(
            f"Method {sparsifier.name!r} needs examples.", "Add --data (labels are not needed), or --method magnitude."
        )
    return calibration


def matrix_scores(
    checkpoint: Checkpoint, sparsifier: Sparsifier, calibration: Calibration | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The scores [out, in] of every matrix inside the layers under its qualified name, all layers as they are.

    Raises:
        UsageError: the method needs examples, and there are none.
    """
    looked_at = require_calibration(sparsifier, calibration)
    for layer in layerwise_pass(checkpoint, looked_at, sparsifier.statistic, changes=False):
        for name, module in layer.linear_layers():
            yield name, sparsifier.scores(matrix(module), layer.moments.get(name))


def sparsify(
    checkpoint: Checkpoint,
    sparsifier: Sparsifier,
    patterns: Mapping[str, Pattern],
    calibration: Calibration | None,
    moments: Mapping[str, Moments] | None = None,
) -> PreTrainedModel:
    """A copy of the model with zeros, made layer by layer: each method sees what the pruned layers before make of the
    examples. Large models are kept on disk, one layer at a time in memory (`models/mapped.py`).

    Args:
        patterns: by the matrix's qualified name; others stay dense.
        moments: of all matrices, where they are known already; then nothing runs.

    Raises:
        UsageError: the method needs examples, and there are none.
        DiskFull: no room for a large model's weights in the folder for temporary files.
    """
    looked_at = None if moments is not None else require_calibration(sparsifier, calibration)
    model = copy_of(checkpoint.model, lambda weight: weight.detach())
    on_disk = is_large(model)
    shared = set(model.parameters())
    for layer in layerwise_pass(checkpoint, looked_at, sparsifier.statistic, names=patterns):
        known = layer.moments if moments is None else moments
        changed: dict[torch.nn.Parameter, torch.Tensor] = {}
        for name, module in layer.linear_layers():
            if name not in patterns:
                continue
            weight = model.get_submodule(name).weight
            zeroed = sparsifier.sparsify(matrix(module), patterns[name], known.get(name))
            with torch.no_grad():
                matrix(module).copy_(zeroed.to(weight.dtype))  # rounded as stored: the next layers will get that
            changed[weight] = module.weight
            del zeroed
        settle(changed, on_disk)
        shared -= set(changed)
    settle({parameter: parameter for parameter in model.parameters() if parameter in shared}, on_disk)
    return model


def matrix(module: Linear) -> torch.Tensor:
    """The weight as [out, in], a view."""
    weight = module.weight.detach()
    return weight if reduction_axis(module) == 1 else weight.T
