"""Attention as OpenVINO's CPU plug-in wants to see it: cache, repeated heads and attention become one kernel then."""

from __future__ import annotations

from typing import Any

_KEYS_AND_VALUES = (1, 2)
"""Inputs of the operator for attention."""


def repeat_heads_in_two_ways(model: Any) -> None:
    """Write the repeating of key heads that several query heads share as a two-way (bidirectional) broadcast, in an
    `openvino.Model` that is changed in place.

    torch's `expand` is converted to one, and transformers rewrites all of them to one-way broadcasts, since the plug-in
    has no kernel of its own for two ways. Here it needs none: it fuses state, broadcast and attention into one kernel
    that repeats nothing, and looks for two ways. Otherwise it writes keys and values anew in every step.
    """
    for attention in model.get_ordered_ops():
        if attention.get_type_name() != "ScaledDotProductAttention":
            continue
        for index in _KEYS_AND_VALUES:
            reshape = attention.input_value(index).get_node()
            if reshape.get_type_name() == "Reshape":
                _in_two_ways(reshape.input_value(0).get_node())


def _in_two_ways(broadcast: Any) -> None:
    from openvino import opset13

    if broadcast.get_type_name() != "Broadcast" or broadcast.get_attributes()["mode"] != "numpy":
        return
    shape = broadcast.input_value(1).get_node()
    if shape.get_type_name() != "Select":  # between the wanted size of an axis, where it is 1, and its own
        return
    wanted = shape.input_value(1)
    both = opset13.broadcast(broadcast.input_value(0), wanted, broadcast_spec="BIDIRECTIONAL")
    both.set_friendly_name(broadcast.get_friendly_name())
    broadcast.output(0).replace(both.output(0))
