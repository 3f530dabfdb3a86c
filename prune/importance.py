"""How much each feed-forward channel matters: one small class a method, registered by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import InputError, UsageError, did_you_mean
from ..models.anatomy import FfnBlock, Linear, anatomy_of, reduction_axis
from ..models.batching import Batch, Examples, batches_by_length
from ..models.checkpoint import Checkpoint

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


@dataclass(frozen=True)
class Calibration:
    """The examples that an importance looks at, and how it goes through them."""

    examples: Examples
    batch_size: int = 16
    seed: int = 0
    progress: Progress | None = None


class Importance(ABC):
    """Scores channels: the higher, the more is lost by cutting the channel."""

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False

    @abstractmethod
    def ffn_scores(self, checkpoint: Checkpoint, calibration: Calibration | None) -> list[torch.Tensor]:
        """One float64 tensor [width] for each layer's feed-forward block, first layer first. The model is left as it
        was. Scores are compared within a layer only.

        Raises:
            UsageError: `needs_data`, and there is no calibration.
            InputError: an unknown architecture, or a loss that is not a number.
        """


class Magnitude(Importance):
    """`s_c = sqrt(|up[c]|^2 + |gate[c]|^2 + |down[:, c]|^2)`: the joint L2 norm of all the weights that go when
    channel c goes (biases left out). Needs no data.

    The norm of a filter as its importance: Li et al. 2017, "Pruning Filters for Efficient ConvNets"; the norm over the
    whole coupled group: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning".
    """

    name = "magnitude"

    def ffn_scores(self, checkpoint: Checkpoint, calibration: Calibration | None) -> list[torch.Tensor]:
        return [_joint_norm(block) for block in anatomy_of(checkpoint.model).ffn(checkpoint.model)]


@torch.no_grad()
def _joint_norm(block: FfnBlock) -> torch.Tensor:
    into = _squares(block.up, over=reduction_axis(block.up))
    if block.fused:
        into = into.view(2, block.width).sum(dim=0)
    elif block.gate is not None:
        into = into + _squares(block.gate, over=reduction_axis(block.gate))
    return (into + _squares(block.down, over=1 - reduction_axis(block.down))).sqrt()


def _squares(module: Linear, over: int) -> torch.Tensor:
    return module.weight.double().square().sum(dim=over)


class Taylor(Importance):
    """`s_c = mean over examples of (sum over tokens of a_c * dL/da_c)^2`, a the channel's activation at the input of
    the down projection: the squared first-order change of the loss when the channel is taken out.

    The sum is the gradient with respect to a gate of 1 on the channel, which is how it is computed: Molchanov et al.
    2019, "Importance Estimation for Neural Network Pruning" (equation 8, with gates). L is the task's loss; without
    labels it is the output in a random direction, and the expected square is how far the output itself moves.
    """

    name = "taylor"
    needs_data = True

    def ffn_scores(self, checkpoint: Checkpoint, calibration: Calibration | None) -> list[torch.Tensor]:
        if calibration is None:
            raise UsageError(f"Importance {self.name!r} needs examples.", "Add --data, or take --method magnitude.")
        blocks = anatomy_of(checkpoint.model).ffn(checkpoint.model)
        scores = [torch.zeros(block.width, dtype=torch.float64) for block in blocks]
        examples, size = calibration.examples, calibration.batch_size
        batches = -(-len(examples) // size)
        with torch.random.fork_rng():
            torch.manual_seed(calibration.seed)
            for done, (_, batch) in enumerate(batches_by_length(examples, checkpoint.tokenizer, size), start=1):
                for score, gradient in zip(scores, _gate_gradients(checkpoint, blocks, batch), strict=True):
                    score.add_(gradient.double().cpu().square().sum(dim=0))
                if calibration.progress is not None:
                    calibration.progress(done, batches)
        return [score / len(examples) for score in scores]


def _gate_gradients(checkpoint: Checkpoint, blocks: Sequence[FfnBlock], batch: Batch) -> tuple[torch.Tensor, ...]:
    """Per block the gradient [batch, width] of each example's loss with respect to gates on its channels."""
    module, task = checkpoint.module, checkpoint.task
    rows = len(batch["input_ids"])
    device = blocks[0].down.weight.device
    batch = {name: value.to(device) for name, value in batch.items()}
    gates = [torch.ones(rows, 1, block.width, device=device, requires_grad=True) for block in blocks]
    with torch.enable_grad(), _gated([block.down for block in blocks], gates):
        outputs: Mapping[str, torch.Tensor] = module(**checkpoint.model_inputs(batch), **task.forward_flags())
        loss = task.loss(outputs, batch)
    if not torch.isfinite(loss):
        raise InputError(
            f"The loss of {checkpoint.source} on a batch of {rows} rows is {loss.item()}; nothing can be ranked by it.",
            "Look for rows that are empty or out of the ordinary in the data.",
        )
    # Losses are means over the batch; times its rows, they are the examples' own, whatever the batch's size.
    return tuple(gradient.squeeze(1) * rows for gradient in torch.autograd.grad(loss, gates))


@contextmanager
def _gated(modules: Sequence[nn.Module], gates: Sequence[torch.Tensor]) -> Iterator[None]:
    """Multiply the input [batch, tokens, width] of each module by its gate [batch, 1, width] inside the block."""

    def hook_of(gate: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, inputs: (inputs[0] * gate.to(inputs[0].dtype), *inputs[1:])

    handles = [module.register_forward_pre_hook(hook_of(gate)) for module, gate in zip(modules, gates, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


IMPORTANCES: dict[str, type[Importance]] = {importance.name: importance for importance in (Magnitude, Taylor)}


def get_importance(name: str) -> Importance:
    """The importance of that name.

    Raises:
        UsageError: there is no such importance; the message lists them.
    """
    if name not in IMPORTANCES:
        known = ", ".join(IMPORTANCES)
        raise UsageError(f"There is no importance {name!r}; valid are {known}.{did_you_mean(name, IMPORTANCES)}")
    return IMPORTANCES[name]()
