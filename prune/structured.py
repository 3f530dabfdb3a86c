"""Structured pruning: feed-forward channels are cut out of the matrices, so that every runtime gets a smaller model."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..errors import UsageError
from ..models.anatomy import FfnBlock, Linear, anatomy_of, in_features, out_features, reduction_axis
from ..models.batching import Examples
from ..models.checkpoint import Checkpoint
from ..models.lineage import LayerWidths
from .importance import Calibration, Progress, get_importance
from .result import PruneResult, check_finite

WIDTH_MULTIPLE = 8
"""Widths are rounded to this: matrix kernels work on tiles, and an odd width is padded up to the next one or falls to a
slow path (tensor cores want 16 bytes, which is 8 values of float16; NVIDIA, "Matrix Multiplication Background")."""


def prune_ffn(
    checkpoint: Checkpoint,
    keep: float,
    importance: str = "magnitude",
    examples: Examples | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruneResult:
    """Keep the most important share of every layer's feed-forward channels, and cut the others out of the up, gate and
    down matrices and their biases.

    Every layer keeps the same number of channels, which is what a Hugging Face configuration can say: the result
    loads with plain `from_pretrained`. The checkpoint's own model is left as it was.

    Args:
        keep: share of channels that stay, in (0, 1]; the width is rounded to a multiple of `WIDTH_MULTIPLE`.
        importance: one of `IMPORTANCES`.
        examples: what the importance looks at, where it needs data.
        batch_size, seed, progress: see `Calibration`.

    Raises:
        UsageError: `keep` outside (0, 1], an unknown importance, or one that needs examples and has none.
        InputError: an unknown architecture, or weights that hold NaN.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"keep is {keep:g}; it must be more than 0 and at most 1.", "Use --keep 0.5 to keep half.")
    check_finite(checkpoint)
    calibration = Calibration(examples, batch_size, seed, progress) if examples is not None else None
    scores = get_importance(importance).ffn_scores(checkpoint, calibration)

    model = copy.deepcopy(checkpoint.model)
    anatomy = anatomy_of(model)
    blocks = anatomy.ffn(model)
    before = blocks[0].width
    after = kept_width(before, keep)
    for block, score in zip(blocks, scores, strict=True):
        keep_channels(block, strongest(score, after))
    setattr(model.config, anatomy.ffn_width, after)
    return PruneResult(
        model=model,
        method=f"ffn by {importance}",
        settings={"structure": "ffn", "keep": keep, "method": importance},
        widths=[LayerWidths(layer=block.layer, before=before, after=after) for block in blocks],
        note=_rounding_note(before, keep, after),
    )


def kept_width(width: int, keep: float) -> int:
    """The number of channels that stay: the multiple of `WIDTH_MULTIPLE` nearest to `keep * width`, at least one such
    multiple and at most `width`; with `keep` 1 the width as it is."""
    if keep == 1:
        return width
    nearest = int(keep * width / WIDTH_MULTIPLE + 0.5) * WIDTH_MULTIPLE
    return min(width, max(WIDTH_MULTIPLE, nearest))


def _rounding_note(before: int, keep: float, after: int) -> str:
    said = f"{after} of {before} feed-forward channels kept in every layer"
    asked = keep * before
    if abs(asked - after) < 1e-6:
        return f"{said}."
    return f"{said}: {asked:g} asked for, rounded to a multiple of {WIDTH_MULTIPLE} for the kernels' sake."


def strongest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The positions of the `count` highest scores [width], ascending, int64; of equal scores the first ones."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


@torch.no_grad()
def keep_channels(block: FfnBlock, channels: torch.Tensor) -> None:
    """Cut a feed-forward block in place down to these channels (int64 [kept], ascending)."""
    width = block.width
    # A fused matrix holds the gate's channels, then the up projection's: the same ones go from both halves.
    rows = torch.cat([channels, channels + width]) if block.fused else channels
    _select(block.up, rows, axis=1 - reduction_axis(block.up))
    if block.gate is not None:
        _select(block.gate, channels, axis=1 - reduction_axis(block.gate))
    _select(block.down, channels, axis=reduction_axis(block.down))


def _select(module: Linear, channels: torch.Tensor, axis: int) -> None:
    channels = channels.to(module.weight.device)
    module.weight = _cut(module.weight, channels, axis)
    if axis != reduction_axis(module) and module.bias is not None:
        module.bias = _cut(module.bias, channels, 0)
    _update_sizes(module)


def _cut(parameter: torch.Tensor, channels: torch.Tensor, axis: int) -> nn.Parameter:
    kept = parameter.index_select(axis, channels).contiguous()
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _update_sizes(module: Linear) -> None:
    """Let the sizes that the module keeps beside its weight follow the weight (Conv1D computes with `nf`)."""
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = in_features(module), out_features(module)
    else:
        module.nx, module.nf = in_features(module), out_features(module)
