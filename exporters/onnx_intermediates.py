"""An ONNX graph that also shows what happens inside it, by the names of the modules it was traced from."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from .node_scopes import module_of

if TYPE_CHECKING:
    import onnx_ir


def with_intermediates(model: onnx_ir.Model, modules: Collection[str]) -> onnx_ir.Model:
    """The model, changed in place, with what these modules hand on (the result of the last node of their own forward)
    as further outputs of their names. Modules that it does not show, because a fusion made one node of several modules'
    or removed what they computed, are left out."""
    import onnx_ir

    graph = model.graph
    found: dict[str, onnx_ir.Value] = {}
    for node in graph:
        name, value = module_of(node), node.outputs[0]
        if name in modules and (value.dtype is None or value.dtype.is_floating_point()):
            found[name] = value
    for name, value in found.items():
        shown = onnx_ir.Value(name=name, type=value.type, shape=value.shape)
        graph.append(onnx_ir.Node("", "Identity", [value], outputs=[shown]))
        graph.outputs.append(shown)
    return model
