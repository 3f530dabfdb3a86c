"""Least-squares repair: what stays of a layer is fitted to what the whole layer computed, without training, and kept
where the model's answers come nearer to the whole model's for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import UsageError
from ..models.anatomy import Linear, anatomy_of, reduction_axis
from ..models.checkpoint import Checkpoint
from ..models.importance import Calibration
from ..models.mapped import copy_of
from ..models.shapes import shapes_of
from ..models.surgery import Selection
from .layerwise import Moments, Statistic, layerwise_pass
from .nearness import distances, parted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPINGS = (1e-3, 1e-1, 1.0)
"""Shares of its own variance by which every kept channel's is raised; the held-out examples choose. The more, the
nearer to the weights as they were."""
Fit = tuple[torch.Tensor, torch.Tensor | None]
"""A projection's weight, as the module stores it, and its bias."""


@dataclass(frozen=True)
class Repaired:
    """A model of the same sizes that reads nothing of what is to go, and what repairing it brought."""

    model: PreTrainedModel
    kept: int
    """Projections whose repair was kept."""
    tried: int
    before: float
    """How far the held-out outputs are from the whole model's (see `distances`) without any repair."""
    after: float

    @property
    def note(self) -> str:
        """In a sentence, for the history."""
        return (
            f"Repair kept in {self.kept} of {self.tried} layers: the outputs on examples held out are off by "
            f"{self.after:.4f} of their square, {self.before:.4f} without repair."
        )


def repaired(checkpoint: Checkpoint, selection: Selection, calibration: Calibration | None) -> Repaired:
    """A copy of the model, of the same sizes, in which the matrices that read what the selection keeps are fitted anew
    and read nothing of what it drops: `select` then cuts without another change of the outputs.

    With the inputs x that an output or down projection W [out, channels] sees, the kept channels K and the others R,
    the kept weights change by D and the bias by d, which minimise `sum over tokens of |W_R x_R - D x_K - d|^2 / |x|^2`
    (where there is no bias, without d): `D = W_R C[R, K] (C[K, K] + damping)^-1`, C the tokens' covariance. Divided by
    |x|^2, because trained models give a few tokens activations that would outweigh all the others (Sun et al. 2024,
    "Massive Activations in Large Language Models"). x is what arrives after the layers before have been cut and
    repaired, so later layers make up for earlier ones. The reconstruction is the one of SparseGPT and OSSCAR (Meng et
    al. 2024) for a given choice; Kwon et al. 2022 ("A Fast Post-Training Pruning Framework for Transformers") fit one
    factor a head or channel by the same least squares.

    A layer that is nearer to what it computed is not always a better model, so some of the examples are held out. Layer
    by layer, the others as they are by then, that damping is taken with which the model's outputs on them come nearest
    to the whole model's; where no repair brings them nearer, the layer is cut without one.

    Args:
        selection: `heads` or `ffn` or both, for all layers of the model.

    Raises:
        UsageError: no examples.
        InputError: one example alone, so that none can be held out.
    """
    if calibration is None:
        raise UsageError("Repair looks at examples, and there are none.", "Add --data FILE (labels are not needed).")
    fitted_to, held_out = parted(calibration)
    kept = _kept_inputs(checkpoint.model, selection)
    model = copy_of(checkpoint.model, lambda weight: weight.detach().clone())
    for name, inputs in kept.items():
        _set(model.get_submodule(name), _cut(model.get_submodule(name), inputs))
    before = nearest = distances(checkpoint, [replace(checkpoint, model=model)], held_out)[0]
    successes = 0
    for work in layerwise_pass(checkpoint, fitted_to, Statistic.RELATIVE_GRAM, names=kept.keys()):
        for name, module in work.linear_layers():
            if name not in kept:
                continue
            tried = list(fits(module, kept[name], work.moments[name]))
            found = distances(checkpoint, [_with(checkpoint, model, name, fit) for fit in tried], held_out)
            best = int(np.argmin(found))
            if found[best] < nearest:
                _set(model.get_submodule(name), tried[best])
                nearest, successes = found[best], successes + 1
            module.load_state_dict(model.get_submodule(name).state_dict())  # the layers after see what was decided
    return Repaired(model, successes, len(kept), before, nearest)


def _kept_inputs(model: PreTrainedModel, selection: Selection) -> dict[str, torch.Tensor]:
    """Name of a projection to the input channels that stay of it, int64."""
    anatomy, size = anatomy_of(model), shapes_of(model).head_size
    kept: dict[str, torch.Tensor] = {}
    for index in range(len(anatomy.layers(model))):
        prefix = f"{anatomy.layers_name(model)}.{index}."
        if selection.heads is not None:
            query = selection.heads[index].query
            kept[prefix + anatomy.output] = (query.unsqueeze(1) * size + torch.arange(size)).flatten()
        if selection.ffn is not None:
            kept[prefix + anatomy.down] = selection.ffn[index]
    return kept


def _gone(size: int, kept: torch.Tensor) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bool, device=kept.device).index_fill(0, kept, False).nonzero().flatten()


def _cut(module: Linear, kept: torch.Tensor) -> Fit:
    """What the projection is without repair: it reads nothing of what goes."""
    axis = reduction_axis(module)
    gone = _gone(module.weight.shape[axis], kept)
    return module.weight.detach().index_fill(axis, gone, 0), None if module.bias is None else module.bias.detach()


@torch.no_grad()
def fits(module: Linear, kept: torch.Tensor, seen: Moments) -> Iterator[Fit]:
    """The projection fitted to the inputs that stay, zero where it read the others; one for each of `DAMPINGS`."""
    assert seen.gram is not None and seen.sums is not None
    rows = reduction_axis(module) == 1
    weight = module.weight if rows else module.weight.T
    gram, mean = seen.gram.double(), seen.sums / seen.weight
    kept = kept.to(gram.device)
    gone = _gone(len(gram), kept)
    if module.bias is not None:
        gram = gram - seen.weight * torch.outer(mean, mean)
    inside, lost = gram[kept][:, kept], weight[:, gone].double()
    variance, wanted = inside.diagonal().clone(), (lost @ gram[gone][:, kept]).T
    for damping in DAMPINGS:
        raised = damping * variance + 1e-6 * variance.mean()  # the second for channels that are silent
        change = torch.linalg.solve(inside + raised.diag(), wanted).T
        fitted = weight.index_fill(1, gone, 0)
        fitted[:, kept] += change.to(weight.dtype)
        bias = module.bias
        if bias is not None:
            bias = bias + (lost @ mean[gone] - change @ mean[kept]).to(bias.dtype)
        yield fitted if rows else fitted.T.contiguous(), bias


def _set(module: Linear, fit: Fit) -> None:
    """Give a projection these weights, without a copy."""
    weight, bias = fit
    module.weight.data = weight.to(module.weight.device, module.weight.dtype)
    if bias is not None and module.bias is not None:
        module.bias.data = bias.to(module.bias.device, module.bias.dtype)


def _with(checkpoint: Checkpoint, model: PreTrainedModel, name: str, fit: Fit) -> Checkpoint:
    """The model with another fit in one place; all else is shared memory."""
    other = copy_of(model, lambda weight: weight.detach())
    _set(other.get_submodule(name), fit)
    return replace(checkpoint, model=other)
