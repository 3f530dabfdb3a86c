"""Structured pruning: heads, feed-forward channels, layers and residual width are cut out of the matrices, so that
every runtime gets a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from ..models.anatomy import anatomy_of
from ..models.checkpoint import Checkpoint
from ..models.importance import Calibration, Scores, get_importance
from ..models.lineage import LayerWidths
from ..models.shapes import shapes_of
from ..models.surgery import Selection, select, strongest
from .choice import (
    WIDTH_MULTIPLE,
    choose_channels,
    choose_channels_globally,
    choose_heads,
    choose_heads_globally,
    choose_layers,
    kept_width,
)
from .repair import repaired
from .result import PruneResult, check_finite
from .settings import PruneSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune_structure(
    checkpoint: Checkpoint, settings: PruneSettings, calibration: Calibration | None = None
) -> PruneResult:
    """Keep the most important share of a structure and cut the rest out. The checkpoint's own model is left as it was.

    Raises:
        UsageError: a share that leaves nothing, an unknown importance or one that does not score this structure, or one
            that needs examples and has none.
        InputError: an unknown architecture, or weights that hold NaN.
    """
    assert settings.structure is not None
    check_finite(checkpoint)
    importance = get_importance(settings.chosen_by)
    scores = importance.scores(checkpoint, [settings.structure], calibration)
    if settings.allocation == "global" and not importance.comparable:
        scores = _as_shares(scores)
    selection = choose(checkpoint.model, settings, scores)
    repair = repaired(checkpoint, selection, calibration) if settings.repair else None
    smaller = select(repair.model if repair else checkpoint.model, selection)
    widths = widths_of(checkpoint.model, smaller, selection)
    return PruneResult(
        model=smaller,
        method=f"{settings.structure} by {settings.chosen_by}{', repaired' if settings.repair else ''}",
        widths=widths,
        note=_note(settings, checkpoint.model, smaller, widths) + (f" {repair.note}" if repair else ""),
    )


def _as_shares(scores: Scores) -> Scores:
    """Scores that rank the parts of one layer only, made comparable: each as a share of its layer's sum."""

    def shares(layers: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
        return [layer / layer.sum().clamp_min(1e-300) for layer in layers] if layers is not None else None

    return Scores(heads=shares(scores.heads), ffn=shares(scores.ffn), layers=scores.layers, width=scores.width)


def choose(model: PreTrainedModel, settings: PruneSettings, scores: Scores) -> Selection:
    """What stays, by these scores.

    Raises:
        UsageError: shares or protected layers that the model cannot have.
    """
    depth = len(anatomy_of(model).layers(model))
    _check_layers(settings, depth)
    keep = settings.keep
    if isinstance(keep, list):
        shares, share = keep, 1.0
    else:
        share = keep if keep is not None else 1.0
        shares = [1.0 if index in settings.protect else share for index in range(depth)]
    everywhere = settings.allocation == "global"
    if scores.ffn is not None:
        chosen = choose_channels_globally(scores.ffn, share, settings.protect) if everywhere else None
        return Selection(ffn=chosen or choose_channels(scores.ffn, shares))
    if scores.heads is not None:
        heads = choose_heads_globally(model, scores.heads, share, settings.protect) if everywhere else None
        return Selection(heads=heads or choose_heads(model, scores.heads, shares))
    if scores.layers is not None:
        return Selection(layers=choose_layers(model, scores.layers, share, settings.protect))
    assert scores.width is not None
    return Selection(channels=strongest(scores.width, kept_width(len(scores.width), share)))


def _check_layers(settings: PruneSettings, depth: int) -> None:
    wrong = [index for index in settings.protect if not 0 <= index < depth]
    if wrong:
        raise UsageError(f"protect names the layers {wrong}; the model has 0 to {depth - 1}.")
    if isinstance(settings.keep, list) and len(settings.keep) != depth:
        raise UsageError(f"keep has {len(settings.keep)} shares, and the model has {depth} layers.")


def widths_of(before: PreTrainedModel, after: PreTrainedModel, selection: Selection) -> list[LayerWidths]:
    """What every layer had and has, of the parts that were chosen from; 0 of a layer that went."""
    name, old, new = anatomy_of(before).layers_name(before), shapes_of(before).layers, shapes_of(after).layers
    stays = list(range(len(old))) if selection.layers is None else list(selection.layers)
    found = []
    for unit, field, touched in (("heads", "heads", selection.heads), ("channels", "ffn", selection.ffn)):
        if touched is None and selection.layers is None:
            continue
        for index, shape in enumerate(old):
            kept = getattr(new[stays.index(index)], field) if index in stays else 0
            found.append(LayerWidths(layer=f"{name}.{index}", unit=unit, before=getattr(shape, field), after=kept))
    return found


def _note(
    settings: PruneSettings, before: PreTrainedModel, after: PreTrainedModel, widths: Sequence[LayerWidths]
) -> str:
    """What was kept, and where that is not what was asked for, why."""
    where = ""
    if settings.structure == "width":
        what, old, new = (
            "channels of the residual stream",
            int(before.config.hidden_size),
            int(after.config.hidden_size),
        )
    elif settings.structure == "layers":
        what, old, new = "layers", len(shapes_of(before).layers), len(shapes_of(after).layers)
    else:
        what = "heads" if settings.structure == "heads" else "feed-forward channels"
        same = len({(item.before, item.after) for item in widths}) == 1
        some = widths[:1] if same else widths
        old, new = sum(item.before for item in some), sum(item.after for item in some)
        where = " in every layer" if same else " in all"
    said = f"{new} of {old} {what} kept{where}"
    asked = settings.keep * old if isinstance(settings.keep, float) and not settings.protect else new
    if abs(asked - new) < 1e-6:
        return f"{said}."
    reason = f"rounded to a multiple of {WIDTH_MULTIPLE} for the kernels' sake"
    if settings.structure in ("heads", "layers"):
        reason = "of which this is the nearest whole number that can be had"
    return f"{said}: {asked:g} asked for, {reason}."
