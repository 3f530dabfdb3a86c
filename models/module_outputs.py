"""What every module of a model hands on while it runs, by the module's qualified name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class ModuleOutputs:
    """What a forward left behind, in the order in which modules were done.

    A tensor that several modules hand on untouched (a layer what its last norm gave, a dropout what went in) stands
    under the name of the one that made it. Modules that hand on several tensors, or that run more than once, are not
    kept.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """The module that made what goes into a module, where its input is what some module handed on."""
    _makers: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _alive: list[torch.Tensor] = field(default_factory=list)
    """Memory is not handed out twice while it is held: a tensor is known by where it lies."""
    _dropped: set[str] = field(default_factory=set)

    def maker(self, tensor: torch.Tensor) -> str | None:
        """The module that handed this tensor on."""
        return self._makers.get(_place(tensor))

    def record(self, name: str, inputs: Any, output: Any) -> None:
        """Take note of one call of a module."""
        found = list(_floats(output))
        if name in self.tensors or name in self._dropped:
            self.tensors.pop(name, None)
            self._dropped.add(name)
            return
        if len(found) != 1 or self.maker(found[0]) is not None:
            return
        self._alive += found
        self._makers[_place(found[0])] = name
        self.tensors[name] = found[0].detach().float().clone()  # what comes later may write into it
        source = next((self.maker(tensor) for tensor in _floats(inputs)), None)
        if source is not None:
            self.sources[name] = source


@contextmanager
def module_outputs(module: nn.Module) -> Iterator[ModuleOutputs]:
    """Collect what the modules inside hand on when `module` runs in the block, once."""
    outputs = ModuleOutputs()
    handles = [
        part.register_forward_hook(
            lambda _m, args, kwargs, output, name=name: outputs.record(name, (args, kwargs), output), with_kwargs=True
        )
        for name, part in module.named_modules()
        if name
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _floats(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floats(item)
