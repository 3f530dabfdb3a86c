"""A model layer by layer over calibration examples: one layer's weights and one boundary's hidden states at a time."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError
from ..models.anatomy import Linear, anatomy_of, in_features
from ..models.batching import Batch, batches_by_length
from ..models.checkpoint import Checkpoint
from ..models.mapped import copy_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.importance import Calibration


class Statistic(StrEnum):
    """What is added up over the inputs x [in] of a linear module: `sum x^2` [in], `sum x x^T` [in, in], or
    `sum x x^T / |x|^2`, in which no token counts more than another."""

    SQUARES = "squares"
    GRAM = "gram"
    RELATIVE_GRAM = "relative gram"


@dataclass
class Moments:
    """Sums over the tokens that a linear module saw, padding left out. Modules that take the same input (query, key and
    value; gate and up) have the same object."""

    name: str
    """The first module of those that share these sums, for messages."""
    tokens: int
    squares: torch.Tensor
    """[in], float64: the sum of squares of every input channel."""
    gram: torch.Tensor | None = None
    """[in, in]: X^T X, where it was asked for. In float32 the products are, so that is enough unless it is inverted
    without damping."""
    factor: torch.Tensor | None = None
    """What SparseGPT makes of the Gram matrix, for the modules that share it."""
    relative: bool = False
    """Whether every token is weighted by 1 / |x|^2."""
    weight: float = 0.0
    """The sum of the weights; with `relative` only, as is `sums`."""
    sums: torch.Tensor | None = None
    """[in], float64: the weighted sum of the inputs."""

    def add(self, inputs: torch.Tensor) -> None:
        """Add tokens [tokens, in]."""
        self.tokens += len(inputs)
        if self.relative:
            lengths = inputs.norm(dim=1, keepdim=True).clamp_min(1e-12)
            inputs = inputs / lengths
            total = (inputs / lengths).sum(dim=0, dtype=torch.float64)
            self.sums = total if self.sums is None else self.sums + total
            self.weight += float(lengths.double().pow(-2).sum())
        if self.gram is None:
            self.squares += inputs.square().sum(dim=0)
        elif self.gram.dtype == inputs.dtype:
            self.gram.addmm_(inputs.T, inputs)
        else:
            self.gram += inputs.T @ inputs


@dataclass(frozen=True)
class LayerAtWork:
    """One layer, on the device and in float32, with what its linear modules saw. Holds until the next layer is taken:
    then weights and sums are let go, so that no two layers are in memory."""

    index: int
    name: str
    """As it stands in the model's state dict: `model.layers.3`."""
    module: nn.Module
    """A copy: changing it changes what the next layers see, and nothing in the checkpoint."""
    moments: Mapping[str, Moments] = field(default_factory=dict)
    """By the linear module's qualified name."""

    def linear_layers(self) -> Iterator[tuple[str, Linear]]:
        """The copy's linear modules with their qualified names, in the model's order."""
        for name, module in self.module.named_modules(prefix=self.name):
            if isinstance(module, Linear):
                yield name, module


def layerwise_pass(
    checkpoint: Checkpoint,
    calibration: Calibration | None = None,
    statistic: Statistic | None = None,
    *,
    names: Collection[str] | None = None,
    changes: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Iterator[LayerAtWork]:
    """The layers of a model one after the other, each with sums over what reaches its linear modules.

    A layer sees what the layers before make of the examples *as the caller left them*: it changes `module` before it
    takes the next layer. The checkpoint's own model is only read, a layer at a time (see `models/mapped.py`). Kept are
    the hidden states [tokens, width] at one boundary, in float32 on the CPU, and one layer's sums; what else a layer is
    called with (masks, positions) the model makes again for every batch. Computes on the GPU where there is one.

    Args:
        calibration: without it nothing runs, and there are no sums.
        statistic: what to add up.
        names: the linear modules to add up for, by qualified name; all where not given.
        changes: whether the caller changes layers. If not, each is run once instead of twice.
        dtype: of Gram matrices.

    Raises:
        InputError: an unknown architecture, or no examples.
    """
    model = checkpoint.model
    anatomy = anatomy_of(model)
    layers = anatomy.layers(model)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    stream = None if calibration is None else _Stream(checkpoint, calibration, device)
    for index, layer in enumerate(layers):
        copied = copy_of(layer, lambda weight: weight.detach().to(device, torch.float32, copy=True)).to(device).eval()
        moments: dict[str, Moments] = {}
        work = LayerAtWork(index, f"{anatomy.layers_name(model)}.{index}", copied, moments)
        if stream is not None:
            with ExitStack() as hooks:
                if statistic is not None:
                    wanted = {n: m for n, m in work.linear_layers() if names is None or n in names}
                    hooks.enter_context(_Collector(wanted, moments, stream, statistic, dtype))
                stream.run(index, copied, advance=not changes)
        yield work
        moments.clear()
        if stream is not None and changes and index + 1 < len(layers):
            stream.run(index, copied, advance=True)
        for parameter in copied.parameters():
            parameter.data = torch.empty(0)


class _Stream:
    """The calibration batches on their way through the model: the hidden states before one layer."""

    def __init__(self, checkpoint: Checkpoint, calibration: Calibration, device: torch.device) -> None:
        if len(calibration.examples) == 0:
            raise InputError("There are no examples to calibrate with.")
        tokenizer, size = checkpoint.tokenizer, calibration.batch_size
        self.batches = [
            checkpoint.model_inputs(batch) for _, batch in batches_by_length(calibration.examples, tokenizer, size)
        ]
        self.kept: torch.Tensor | None = None
        """Bool [batch, sequence] of the batch at work, false at padding; `None` where there is none."""
        self._hidden: list[torch.Tensor] = []
        self._prelude = _Prelude(checkpoint.model)
        self._device = device
        self._progress = calibration.progress
        self._total = len(self.batches) * len(self._prelude.stations)

    @torch.no_grad()
    def run(self, index: int, layer: nn.Module, advance: bool) -> None:
        """Run layer `index` on every batch; with `advance`, what comes out is what the next layer gets."""
        for place, batch in enumerate(self.batches):
            mask = batch.get("attention_mask")
            self.kept = None if mask is None or bool(mask.all()) else mask.bool().to(self._device)
            entering, args, kwargs = self._prelude.arguments(index, batch)
            if index == 0 and len(self._hidden) == place:
                self._hidden.append(entering.float().cpu())
            args, kwargs = _moved((args, kwargs), self._device)
            output = layer(self._hidden[place].to(self._device), *args, **kwargs)
            self._prelude.in_tuples = isinstance(output, tuple)
            if advance:
                self._hidden[place] = (output[0] if isinstance(output, tuple) else output).cpu()
            if self._progress is not None:
                self._progress(min(index * len(self.batches) + place + 1, self._total), self._total)


class _Prelude:
    """All of a model but its layers: says what it would call a layer with. It is the model itself with stand-ins for
    its layers, so masks, rotary tables and position biases are right in every architecture, for every layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        base: Any = model.base_model
        layers = anatomy_of(model).layers(model)
        self.stations = [_Station(layer) for layer in layers]
        tables = {id(table.weight) for table in base.modules() if isinstance(table, nn.Embedding)}
        # Tables are large: they keep their type, and what is looked up in them becomes float32.
        self._model = copy_of(
            base,
            lambda weight: weight.detach() if id(weight) in tables else weight.float(),
            instead={layers: nn.ModuleList(self.stations)},
        ).eval()
        for module in self._model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda _, inputs, output: output.float())
        self._device = next(base.parameters()).device
        self._flags = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
        self.in_tuples = False
        """Whether layers return their hidden states in a tuple."""

    def arguments(self, index: int, batch: Batch) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
        """What enters the first layer, then the arguments of layer `index` beside its hidden states."""
        for place, station in enumerate(self.stations):
            station.ends, station.in_tuples = place == index, self.in_tuples
        try:
            self._model(**{name: value.to(self._device) for name, value in batch.items()}, **self._flags)
        except _Reached as reached:
            return reached.hidden, reached.arguments, reached.named
        raise InputError(f"A {type(self._model).__name__} does not call its layer {index}.")


class _Reached(Exception):
    def __init__(self, hidden: torch.Tensor, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.arguments, self.named = hidden, arguments, named


class _Station(nn.Module):
    """Stands in for a layer: lets the hidden states pass, or ends the run and hands out what it was called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.ends = False
        self.in_tuples = False
        self.__dict__["_layer"] = layer  # not a child: its weights are not this module's

    def __getattr__(self, name: str) -> Any:
        """What models ask of their layers (ModernBERT: which attention) is the layer's."""
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        hidden = arguments[0] if arguments else named.pop("hidden_states")
        if self.ends:
            raise _Reached(hidden, arguments[1:], named)
        return (hidden,) if self.in_tuples else hidden


class _Collector:
    """Adds up over the inputs of linear modules while its block runs."""

    def __init__(
        self,
        modules: Mapping[str, Linear],
        moments: dict[str, Moments],
        stream: _Stream,
        statistic: Statistic,
        dtype: torch.dtype,
    ) -> None:
        self._modules, self._moments, self._stream = modules, moments, stream
        self._statistic, self._dtype = statistic, dtype
        self._last: tuple[torch.Tensor, Moments] | None = None

    def __enter__(self) -> None:
        self._handles = [
            module.register_forward_pre_hook(lambda module, inputs, name=name: self._see(name, module, inputs[0]))
            for name, module in self._modules.items()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None
        for moments in self._moments.values():
            if moments.gram is not None:
                moments.squares = moments.gram.diagonal().double()

    def _see(self, name: str, module: Linear, inputs: torch.Tensor) -> None:
        if self._last is not None and self._last[0] is inputs:  # the module before took the very same tensor
            self._moments[name] = self._last[1]
            return
        if name not in self._moments:
            self._moments[name] = self._empty(name, in_features(module), inputs.device)
        kept = self._stream.kept
        self._moments[name].add(inputs[kept] if kept is not None else inputs.reshape(-1, inputs.shape[-1]))
        self._last = inputs, self._moments[name]

    def _empty(self, name: str, size: int, device: torch.device) -> Moments:
        squares = torch.zeros(size, dtype=torch.float64, device=device)
        whole = self._statistic is not Statistic.SQUARES
        gram = torch.zeros(size, size, dtype=self._dtype, device=device) if whole else None
        return Moments(name, 0, squares, gram, relative=self._statistic is Statistic.RELATIVE_GRAM)


def _moved(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dictionaries with its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return value
