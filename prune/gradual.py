"""Sparsity that is reached while a model trains: `SparsityInTraining` holds the masks, its callback tells it of steps.

What happens in one optimiser step, whatever the method:

1. before the step begins, a new mask where the schedule has one (`make_masks`);
2. forward and backward see the sparse weights, so the gradient, once averaged, is dL/dw';
3. before the optimiser: the dense weights are put back where a method keeps them, and the method takes in the gradient
   (`before_update`);
4. after it: the dense weights are kept aside again, and the mask is applied (`after_update`).

So whatever looks at the model between two steps (an evaluation, a checkpoint, the end of training) sees sparse weights.
Step 1 comes before a step and not after the last one, so that what is logged and measured at a step belongs to the
sparsity that was trained until then.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ..errors import InputError, UsageError
from ..models.anatomy import Linear, anatomy_of, in_features, out_features, reduction_axis
from ..models.checkpoint import Checkpoint
from ..models.sparsity import is_semi_structured, parse_pattern, why_not_sparse
from .masks import nm_mask
from .result import check_finite, skipped_note
from .schedules import masks_at
from .sparsify_settings import SparsifySettings
from .training_masks import block_sums, fill_blocks, keep_share
from .training_methods import ByMagnitude, ByMovement, SparseMatrix, SrSte, TrainingMethod

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

STATE_FILE = "sparsity.safetensors"
_POINTS = 20
"""Masks of a schedule, unless `every` says otherwise, and the most that are measured: enough to see a cliff."""
_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


class SparsityInTraining:
    """Makes the matrices inside a model's layers sparse while it trains."""

    def __init__(self, checkpoint: Checkpoint, settings: SparsifySettings) -> None:
        """Find what can be made sparse: the matrices inside the layers that learn. The model is left as it is.

        Raises:
            UsageError: no such matrix, or a training that holds its weights in shards.
            InputError: an unknown architecture, or weights that hold NaN.
        """
        for variable, what in _SHARDING.items():
            if os.environ.get(variable) == "true":
                raise UsageError(
                    f"Sparsity cannot be reached under {what}: no process sees whole weights to rank.",
                    "Train with --multi_gpu (DistributedDataParallel), or prune first: zeros are kept in training.",
                )
        check_finite(checkpoint)
        self.settings = settings
        self.method = _method(settings)
        self.callback = SparsityCallback(self)
        self.settled = False
        """Whether the last mask has been made (of sr-ste, whose pattern is whole from the start: the first)."""
        self.matrices: list[SparseMatrix] = []
        self.skipped: list[tuple[str, str]] = []
        for name, module in anatomy_of(checkpoint.model).linear_layers(checkpoint.model):
            if (reason := _why_dense(module, settings)) is not None:
                self.skipped.append((name, reason))
                continue
            mask = torch.ones_like(module.weight, dtype=torch.bool)
            matrix = SparseMatrix(f"{name}.weight", module.weight, reduction_axis(module), mask)
            self.method.prepare(matrix)
            self.matrices.append(matrix)
        if not self.matrices:
            raise UsageError(
                f"No matrix of {checkpoint.source} can reach {settings.summary}: {skipped_note(self.skipped)}"
            )

    def masks_of(self, steps: int) -> dict[int, float]:
        """When new masks are made in a training of so many optimiser steps, and their shares of zeros; at least one
        step is trained with the last one. Empty for sr-ste, which makes one after every step."""
        settings = self.settings
        if settings.method == "sr-ste":
            return {}
        first = min(round(settings.begin * steps), steps - 1)
        if settings.target is None:
            return {first: settings.zeros}
        last = max(first, min(round(settings.end * steps), steps - 1))
        every = settings.every or max(1, (last - first) // _POINTS)
        return masks_at(settings.schedule, settings.target, first, last, every)

    @torch.no_grad()
    def make_masks(self, zeros: float) -> None:
        """Choose anew what stays, and put the rest to zero."""
        if zeros > 0:
            for matrix, mask in zip(self.matrices, self._chosen(zeros), strict=True):
                matrix.mask = mask
                _show_sparse(matrix)

    def _chosen(self, zeros: float) -> list[torch.Tensor]:
        if self.settings.pattern is not None:
            n, m = parse_pattern(self.settings.pattern)
            return [nm_mask(self.method.scores(matrix), n, m, matrix.axis) for matrix in self.matrices]
        together = self.settings.allocation == "global"
        if self.settings.block is None:
            return keep_share([self.method.scores(matrix) for matrix in self.matrices], 1 - zeros, together)
        blocks = [_block_of(matrix, self.settings.block) for matrix in self.matrices]
        sums = [block_sums(self.method.scores(each), *size) for each, size in zip(self.matrices, blocks, strict=True)]
        kept = keep_share(sums, 1 - zeros, together)
        return [fill_blocks(mask, *size) for mask, size in zip(kept, blocks, strict=True)]

    @torch.no_grad()
    def before_update(self) -> None:
        """Show the optimiser the dense weights, and the gradient that they shall follow."""
        for matrix in self.matrices:
            if matrix.dense is not None:
                matrix.weight.copy_(matrix.dense)
            if matrix.weight.grad is not None:  # no objective may read this layer
                self.method.learn(matrix, matrix.weight.grad)

    @torch.no_grad()
    def after_update(self) -> None:
        """Keep the dense weights aside, and show the sparse ones."""
        for matrix in self.matrices:
            if matrix.dense is not None:
                matrix.dense.copy_(matrix.weight)
        if self.settings.method == "sr-ste":
            self.make_masks(self.settings.zeros)
        else:
            for matrix in self.matrices:
                matrix.weight.masked_fill_(~matrix.mask, 0)

    def zero_share(self) -> float:
        """The share of all weights in these matrices that is exactly zero now."""
        zeros = sum(int((matrix.weight == 0).sum()) for matrix in self.matrices)
        return zeros / sum(matrix.weight.numel() for matrix in self.matrices)

    def traced(self) -> dict[str, float]:
        """What belongs into every entry of the training's log."""
        return {"sparsity": self.zero_share()}

    def note(self) -> str:
        """What was reached, for the history."""
        weights = sum(matrix.weight.numel() for matrix in self.matrices)
        count = f"{len(self.matrices)} of {len(self.matrices) + len(self.skipped)}"
        said = [f"{100 * self.zero_share():.4g} % of {weights:,} weights in {count} matrices are zero."]
        empty = [matrix.name for matrix in self.matrices if not matrix.weight.any()]
        if empty:
            said.append(f"Nothing is left of {', '.join(empty)}.")
        return " ".join([*said, skipped_note(self.skipped)]).rstrip()

    def save_state(self, folder: Path) -> None:
        """Write what is needed to go on beside a checkpoint's weights."""
        tensors = {
            f"{attribute}:{matrix.name}": tensor.contiguous()
            for matrix in self.matrices
            for attribute, tensor in matrix.tensors().items()
        }
        save_file(tensors, str(folder / STATE_FILE))

    def load_state(self, folder: Path) -> None:
        """Go on from what `save_state` wrote; the weights themselves are read by the trainer.

        Raises:
            InputError: the folder holds no such file.
        """
        path = folder / STATE_FILE
        if not path.exists():
            raise InputError(
                f"{folder} has no {STATE_FILE}, so its training cannot be gone on with.", f"Delete {folder}."
            )
        tensors = load_file(str(path))
        for matrix in self.matrices:
            for attribute in matrix.tensors():
                setattr(matrix, attribute, tensors[f"{attribute}:{matrix.name}"])
            matrix.place()


class SparsityCallback(TrainerCallback):
    """Tells a `SparsityInTraining` where the training is, and has each of its steps logged and measured."""

    def __init__(self, sparsity: SparsityInTraining) -> None:
        self._sparsity = sparsity
        self._masks: dict[int, float] = {}
        self._measured: set[int] = set()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        sparsity = self._sparsity
        for matrix in sparsity.matrices:
            matrix.place()
        self._masks = sparsity.masks_of(state.max_steps)
        self._measured = _measured(self._masks)
        if not self._masks:
            sparsity.make_masks(sparsity.settings.zeros)
            sparsity.settled = True

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self._masks:
            self._sparsity.make_masks(self._masks[state.global_step])
        self._sparsity.settled = state.global_step >= max(self._masks, default=0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._sparsity.before_update()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._sparsity.after_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self._measured:
            control.should_evaluate |= args.eval_strategy != "no"
        if state.global_step in self._measured or state.global_step >= state.max_steps:
            control.should_log = True


def _measured(masks: dict[int, float]) -> set[int]:
    """The steps at which the next mask cuts more, thinned: what the sparsity until then did to the model is known just
    before."""
    steps = sorted(masks)
    shares = [0.0, *(masks[step] for step in steps)]
    cuts = [step for step, before, after in zip(steps, shares, shares[1:], strict=False) if after > before]
    return set(cuts[:: -max(1, math.ceil(len(cuts) / _POINTS))])  # from the last one backwards


def _method(settings: SparsifySettings) -> TrainingMethod:
    if settings.method == "sr-ste":
        return SrSte(settings.pull)
    return ByMovement() if settings.method == "movement" else ByMagnitude()


def _why_dense(module: Linear, settings: SparsifySettings) -> str | None:
    """The reason for which a matrix cannot be made as sparse as asked."""
    if not module.weight.requires_grad:
        return "they do not learn"
    if settings.block is not None:
        sizes = (out_features(module), in_features(module))
        for size, channels, what in zip(settings.block, sizes, ("output", "input"), strict=True):
            if channels % size:
                return f"its {what} size {channels} is not a multiple of the block's {size}"
    if settings.pattern is not None:
        _, m = parse_pattern(settings.pattern)
        if in_features(module) % m:
            return f"its input size {in_features(module)} is not a multiple of {m}"
        if (reason := why_not_sparse(in_features(module), out_features(module))) is not None:
            return reason
    if _is_there(module, settings):
        return f"{settings.pattern or f'{100 * settings.zeros:g} % zeros'} is there already, and zeros are kept"
    return None


def _is_there(module: Linear, settings: SparsifySettings) -> bool:
    weight = module.weight.detach()
    if settings.pattern is not None:
        return is_semi_structured(weight.cpu().numpy(), reduction_axis(module), *parse_pattern(settings.pattern))
    return float((weight == 0).float().mean()) >= settings.zeros


def _block_of(matrix: SparseMatrix, block: tuple[int, int]) -> tuple[int, int]:
    """The block's sizes along the weight's own two axes."""
    outputs, inputs = block
    return (outputs, inputs) if matrix.axis == 1 else (inputs, outputs)


def _show_sparse(matrix: SparseMatrix) -> None:
    """The weights under the mask; from the dense ones where they are kept, so that a weight can come back."""
    if matrix.dense is not None:
        matrix.weight.copy_(matrix.dense)
    matrix.weight.masked_fill_(~matrix.mask, 0)
