"""What the files of a torch program tell of its layers: their weights, and their kinds from the model that the
configuration describes. Nothing is compiled, and no machine code is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import InputError, first_line
from ..models.anatomy import Linear, reduction_axis
from ..models.checkpoint import empty_model, load_model
from ..models.embedding import read_pooling
from ..models.features import showing_attention
from ..models.tasks import Task, get_task
from .artifact import Manifest
from .layer_facts import ProgramFacts
from .sparsity import WeightUse
from .torch import WEIGHTS_FILE, dtype_of, name_in_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Values = Callable[[str, torch.Tensor], torch.Tensor]
"""The stored values of a weight of the model, by its name and its place."""


def model_facts(folder: Path, manifest: Manifest, shape: tuple[int, int], why: str) -> ProgramFacts:
    """The facts of weights that transformers loads.

    Args:
        folder: of a written program, which may be anybody's.
        shape: [batch, sequence] of the call whose FLOPs are counted.
        why: as `no_kernels` of `LayerFacts.of_product`.

    Raises:
        InputError: a configuration or weights that do not load.
    """
    task = get_task(manifest.task)
    module = task.module(load_model(folder, task, dtype=dtype_of(manifest)), read_pooling(folder))
    products, tables = _uses(module, lambda _, weight: weight), _tables(module, lambda _, weight: weight)
    return ProgramFacts.of(products, tables, count_flops(folder, task, shape), why)


def package_facts(folder: Path, manifest: Manifest, shape: tuple[int, int], why: str) -> ProgramFacts:
    """The facts of the weights beside a package; arguments and errors as for `model_facts`."""
    task = get_task(manifest.task)
    module = task.module(empty_model(folder, task), read_pooling(folder))
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            stored = {name_in_module(name): name for name in file.keys()}  # noqa: SIM118  # it is no mapping
            places = dict(module.named_parameters(remove_duplicate=False))
            names = {id(place): stored[name] for name, place in places.items() if name in stored}  # tied ones once

            def values(name: str, weight: torch.Tensor) -> torch.Tensor:
                if id(weight) not in names:
                    raise InputError(f"{folder / WEIGHTS_FILE} lacks {name}, which its model has.")
                found: torch.Tensor = file.get_tensor(names[id(weight)])
                return found

            flops = count_flops(folder, task, shape)
            return ProgramFacts.of(_uses(module, values), _tables(module, values), flops, why)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE} cannot be read: {first_line(error)}.") from error


def _uses(module: nn.Module, values: Values) -> Iterator[WeightUse]:
    for name, part in module.named_modules():
        if isinstance(part, Linear):
            yield _use(name, values(f"{name}.weight", part.weight), reduction_axis(part))


def _tables(module: nn.Module, values: Values) -> Iterator[WeightUse]:
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            yield _use(name, values(f"{name}.weight", part.weight), 0, "")


def _use(name: str, weight: torch.Tensor, axis: int, computed: str | None = None) -> WeightUse:
    stored = str(weight.dtype).removeprefix("torch.")
    array: np.ndarray = weight.detach().float().numpy()
    return WeightUse(name, array, axis, "", stored, stored if computed is None else computed, weight.nbytes)


def count_flops(folder: Path, task: Task, shape: tuple[int, int]) -> int | None:
    """FLOPs of one call on [batch, sequence] tokens, as torch counts them on a model without weights, attention written
    out; `None` where the model's code looks into its inputs."""
    model = empty_model(folder, task)
    task.module(model, read_pooling(folder))  # drops a head that is not used
    ids = torch.zeros(shape, dtype=torch.int64, device="meta")
    # Encoders look whether a mask hides anything, decoders without one whether several texts share a row.
    for inputs in ({"attention_mask": torch.ones_like(ids)}, {}):
        found = _flops(model, {"input_ids": ids, **inputs, **task.forward_flags()})
        if found is not None:
            return found
    return None


@torch.inference_mode()
def _flops(model: PreTrainedModel, inputs: dict[str, Any]) -> int | None:
    try:
        with showing_attention(model), FlopCounterMode(display=False) as counter:
            model(**inputs)
    except RuntimeError:  # a value was asked for, and there is none
        return None
    return int(counter.get_total_flops())
