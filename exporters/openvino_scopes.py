"""Which tensor of an IR is what a module hands on: noted while the trace is converted, as a second name of the tensor.

An IR keeps neither modules nor where an operation came from; the names of its tensors survive writing, quantising and
compiling.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def recorded_scopes() -> Iterator[dict[str, str]]:
    """Collect, of the program that is converted inside the block, the name of the tensor that each module of the model
    hands on: that of the last operation in its own forward."""
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    found: dict[str, str] = {}
    original = TorchFXPythonDecoder.__init__

    def recording(decoder: Any, module: Any, *args: Any, **settings: Any) -> None:
        if isinstance(module, torch.fx.GraphModule):
            found.update(_last_tensors(module.graph))
        original(decoder, module, *args, **settings)

    TorchFXPythonDecoder.__init__ = recording
    try:
        yield found
    finally:
        TorchFXPythonDecoder.__init__ = original


def _last_tensors(graph: torch.fx.Graph) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        stack, value = list((node.meta.get("nn_module_stack") or {}).values()), node.meta.get("val")
        # a norm's statistics come after its output, and nobody uses them
        if stack and node.users and isinstance(value, torch.Tensor) and value.is_floating_point():
            yield stack[-1][0], f"{node.name}:0"  # as OpenVINO's decoder calls the first output of a node


def name_module_outputs(model: Any, scopes: dict[str, str]) -> None:
    """Name tensors of an `openvino.Model` after the modules whose outputs they are. Those that are the program's own
    outputs keep the one name that they have."""
    results = {result.input_value(0) for result in model.get_results()}
    named = _by_name(model)
    for module, tensor in scopes.items():
        port = named.get(tensor)
        if module and port is not None and port not in results:
            port.get_tensor().add_names({module})


def with_intermediates(model: Any, modules: list[str]) -> Any:
    """The `openvino.Model`, changed in place, with what these modules hand on as further outputs of their names; those
    that it does not show are left out."""
    named, taken = _by_name(model), {result.input_value(0) for result in model.get_results()}
    for module in modules:
        port = named.get(module)
        if port is not None and port not in taken and port.get_element_type().is_real():
            taken.add(port)
            port.get_tensor().set_names({module})
            model.add_outputs([port])
    return model


def _by_name(model: Any) -> dict[str, Any]:
    ports = (port for operation in model.get_ordered_ops() for port in operation.outputs())
    return {name: port for port in ports for name in port.get_names()}
