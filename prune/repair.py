"""Least-squares repair: what stays of a layer is fitted to what the whole layer computed, without training."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from ..models.anatomy import Linear, anatomy_of, reduction_axis
from ..models.checkpoint import Checkpoint
from ..models.importance import Calibration
from ..models.shapes import shapes_of
from ..models.surgery import Selection
from .layerwise import Moments, Statistic, layerwise_pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 1e-3
"""Share of its own variance by which every kept channel's is raised. It draws what is fitted towards the weights as
they were; more was tried on MiniLM and is worse: it leaves a correction along the few strongest directions only."""


def repaired(checkpoint: Checkpoint, selection: Selection, calibration: Calibration | None) -> PreTrainedModel:
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

    Args:
        selection: `heads` or `ffn` or both, for all layers of the model.

    Raises:
        UsageError: no examples.
    """
    if calibration is None:
        raise UsageError("Repair looks at examples, and there are none.", "Add --data FILE (labels are not needed).")
    anatomy = anatomy_of(checkpoint.model)
    kept = _kept_inputs(checkpoint.model, selection)
    model = copy.deepcopy(checkpoint.model)
    for work in layerwise_pass(checkpoint, calibration, Statistic.RELATIVE_GRAM, names=kept.keys()):
        for name, module in work.linear_layers():
            if name in kept:
                _fit(module, kept[name], work.moments[name])
                target = anatomy.layers(model)[work.index].get_submodule(name.removeprefix(f"{work.name}."))
                target.load_state_dict(module.state_dict())
    return model


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


@torch.no_grad()
def _fit(module: Linear, kept: torch.Tensor, seen: Moments) -> None:
    """Fit a projection to the inputs that stay, and zero what reads the others."""
    assert seen.gram is not None and seen.sums is not None
    weight = module.weight if reduction_axis(module) == 1 else module.weight.T
    gram, mean = seen.gram.double(), seen.sums / seen.weight
    kept = kept.to(gram.device)
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device).index_fill(0, kept, False).nonzero().flatten()
    if module.bias is not None:
        gram = gram - seen.weight * torch.outer(mean, mean)
    inside = gram[kept][:, kept]
    inside.diagonal().mul_(1 + DAMPING).add_(1e-6 * inside.diagonal().mean())  # the second for channels that are silent
    lost = weight[:, gone].double()
    change = torch.linalg.solve(inside, (lost @ gram[gone][:, kept]).T).T
    if module.bias is not None:
        module.bias.add_((lost @ mean[gone] - change @ mean[kept]).to(module.bias.dtype))
    weight[:, kept] += change.to(weight.dtype)
    weight[:, gone] = 0
