"""Structured pruning: feed-forward channels are cut out of the matrices, so that every runtime gets a smaller model."""

from __future__ import annotations

from ..errors import UsageError
from ..models.anatomy import anatomy_of
from ..models.batching import Examples
from ..models.checkpoint import Checkpoint
from ..models.lineage import LayerWidths
from ..models.surgery import Selection, select, strongest
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

    blocks = anatomy_of(checkpoint.model).ffn(checkpoint.model)
    before = blocks[0].width
    after = kept_width(before, keep)
    model = select(checkpoint.model, Selection(ffn=[strongest(score, after) for score in scores]))
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
