"""Importance by the loss's gradient with respect to gates of 1 on the parts (see `models/gates.py`).

With `g = dL/dgate` of one example, cutting a part changes that example's loss by `-g` to first order (Molchanov et al.
2019, "Importance Estimation for Neural Network Pruning", equation 8 with gates). L is the task's loss of that example
alone; without labels it is the output in a random direction, and `g` estimates how far the output itself moves.

A channel of the residual stream has one gate at all its places, so its `g` is the sum over them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from ...errors import InputError
from ..anatomy import anatomy_of
from ..batching import IGNORED_LABEL, Batch, batches_by_length
from ..checkpoint import Checkpoint
from ..gates import Gates, gated
from .base import Calibration, Importance, Scores

_Place = tuple[str, int]
"""A structure and the number of the layer; of `width`, 0."""


class _GradientImportance(Importance):
    """The mean over the examples of what `_of` makes of each one's gradients."""

    needs_data: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    @abstractmethod
    def _of(self, gradients: torch.Tensor) -> torch.Tensor:
        """A function of each element, float64."""

    def _scores(self, checkpoint: Checkpoint, structures: frozenset[str], calibration: Calibration | None) -> Scores:
        assert calibration is not None
        counts = _units(checkpoint, structures)
        sums = {place: torch.zeros(count, dtype=torch.float64) for place, count in counts.items()}
        examples = 0
        for gradients, rows in _example_gradients(checkpoint, counts, calibration):
            examples += rows
            for place, values in gradients.items():
                sums[place] += self._of(values).sum(dim=0)
        if examples == 0:
            raise InputError(
                f"No example has anything that {checkpoint.task.name} scores, so nothing can be ranked by the loss."
            )
        means = {place: total / examples for place, total in sums.items()}
        depth = range(len(anatomy_of(checkpoint.model).layers(checkpoint.model)))
        return Scores(
            heads=[means["heads", layer] for layer in depth] if "heads" in structures else None,
            ffn=[means["ffn", layer] for layer in depth] if "ffn" in structures else None,
            layers=torch.cat([means["layers", layer] for layer in depth]) if "layers" in structures else None,
            width=means.get(("width", 0)),
        )


class Taylor(_GradientImportance):
    """`mean over examples of |g|`: how much cutting the part changes an example's loss, either way, to first order.

    Molchanov et al. 2019 (see above), with the absolute value of Molchanov et al. 2017, "Pruning Convolutional Neural
    Networks for Resource Efficient Inference", and of Michel et al. 2019, "Are Sixteen Heads Really Better than One?".
    """

    name = "taylor"

    def _of(self, gradients: torch.Tensor) -> torch.Tensor:
        return gradients.abs()


class Fisher(_GradientImportance):
    """`mean over examples of g^2 / 2`: the second-order change of the loss when the part is cut, with the diagonal of
    the empirical Fisher information of the gates in the Hessian's place; the first-order change is taken for nothing,
    as it is at a minimum.

    Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers". The sum over a set of parts
    is the estimate for cutting all of them.
    """

    name = "fisher"

    def _of(self, gradients: torch.Tensor) -> torch.Tensor:
        return gradients.square() / 2


def _units(checkpoint: Checkpoint, structures: frozenset[str]) -> dict[_Place, int]:
    """How many gates there are in each place."""
    model, anatomy = checkpoint.model, anatomy_of(checkpoint.model)
    size, blocks = anatomy.head_size_of(model), anatomy.ffn(model)
    units: dict[_Place, int] = {}
    for index, (layer, block) in enumerate(zip(anatomy.layers(model), blocks, strict=True)):
        each = {"heads": anatomy.heads_of(layer, size), "ffn": block.width, "layers": 1}
        units |= {(structure, index): count for structure, count in each.items() if structure in structures}
    if "width" in structures:
        units["width", 0] = int(model.config.hidden_size)
    return units


def _example_gradients(
    checkpoint: Checkpoint, units: Mapping[_Place, int], calibration: Calibration
) -> Iterator[tuple[dict[_Place, torch.Tensor], int]]:
    """For each batch the examples' gradients [batch, units], float64 on the CPU, and how many examples had a loss; the
    gradients of the others are 0."""
    size = calibration.batch_size
    batches = -(-len(calibration.examples) // size)
    with torch.random.fork_rng():
        torch.manual_seed(calibration.seed)
        pairs = batches_by_length(calibration.examples, checkpoint.tokenizer, size)
        for done, (_, batch) in enumerate(pairs, start=1):
            yield _gradients(checkpoint, units, batch)
            if calibration.progress is not None:
                calibration.progress(done, batches)


def _gradients(
    checkpoint: Checkpoint, units: Mapping[_Place, int], batch: Batch
) -> tuple[dict[_Place, torch.Tensor], int]:
    device = checkpoint.model.device
    rows = [row for row in range(len(batch["input_ids"])) if _is_scored(batch, row)]
    if not rows:
        return {}, 0
    batch = {name: value.to(device) for name, value in batch.items()}
    gates = {
        place: torch.ones(len(batch["input_ids"]), count, device=device, requires_grad=True)
        for place, count in units.items()
    }
    with torch.enable_grad(), gated(checkpoint.model, _as_gates(gates)):
        outputs = checkpoint.module(**checkpoint.model_inputs(batch), **checkpoint.task.forward_flags())
        each = outputs[checkpoint.task.output].split(1)
        # Example by example, so that what one weighs does not depend on which others share its batch.
        losses = [checkpoint.task.loss({checkpoint.task.output: each[row]}, _row(batch, row)) for row in rows]
        loss = torch.stack(losses).sum()
    if not torch.isfinite(loss):
        raise InputError(
            f"The loss of {checkpoint.source} on {len(rows)} rows is {loss.item()}; nothing can be ranked by it.",
            "Look for rows that are empty or out of the ordinary in the data.",
        )
    found = torch.autograd.grad(loss, list(gates.values()))
    return {place: gradient.cpu().double() for place, gradient in zip(gates, found, strict=True)}, len(rows)


def _as_gates(gates: Mapping[_Place, torch.Tensor]) -> Gates:
    def of(structure: str) -> dict[int, torch.Tensor]:
        return {layer: gate for (kind, layer), gate in gates.items() if kind == structure}

    layers = {layer: gate.squeeze(1) for layer, gate in of("layers").items()}
    return Gates(heads=of("heads"), ffn=of("ffn"), layers=layers, width=gates.get(("width", 0)))


def _is_scored(batch: Batch, row: int) -> bool:
    """Whether a row has a loss: one whose tokens' labels are all left out has none."""
    labels = batch.get("labels")
    return labels is None or labels.dim() == 1 or bool((labels[row] != IGNORED_LABEL).any())


def _row(batch: Batch, row: int) -> Batch:
    return {name: value[[row]] for name, value in batch.items()}
