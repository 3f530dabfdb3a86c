"""What an ONNX graph tells of its layers, and the FLOPs of its matrix products."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, LimbeckError, first_line
from .kv_cache import PAST_INPUTS
from .layer_facts import ProgramFacts
from .sparsity import table_uses, weight_uses

if TYPE_CHECKING:
    import onnx

_RUNTIME = "com.microsoft"
_COUNTED = 2
"""The inference of shapes cannot tell an axis of 1 from one that is stretched, so none is 1 when products are counted.
FLOPs grow in proportion to the batch: they are those of a batch of 2, halved. In the sequence they are a polynomial of
the second degree (attention is its square): one token's follow from those of 2, 3 and 4."""

_KEEP_SHAPE = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization",
               "BiasGelu", "Gelu", "FastGelu", "QuickGelu", "RotaryEmbedding")  # fmt: skip
"""ONNX Runtime's own operators without a matrix product, whose outputs have the shape of the first input."""
_SUM = 3
"""Which output of a skip norm is the sum that it normalised; those between are statistics."""
_NOT_COUNTED = ("MatMulInteger", "QLinearMatMul", "Einsum", "Conv", "ConvInteger", "QLinearConv", "ConvTranspose",
                "DeformConv", "LSTM", "GRU", "RNN")  # fmt: skip
"""ONNX's other operators that multiply; those of any other domain may."""


def onnx_facts(graph: Path, batch: int, sequence: int, no_kernels: str = "") -> ProgramFacts:
    """The facts of a written graph, which may be anybody's.

    Args:
        graph: the `.onnx` file.
        batch: with `sequence`, the shape whose FLOPs are counted.
        no_kernels: as for `LayerFacts.of_product`.

    Raises:
        InputError: a graph that does not parse, or keeps a weight outside its folder.
    """
    import onnx_ir

    try:
        model = onnx_ir.load(str(graph))
        flops = count_flops(graph, batch, sequence)
        return ProgramFacts.of(weight_uses(model), table_uses(model), flops, no_kernels)
    except LimbeckError:
        raise
    except Exception as error:  # parsers raise anything at a file that is not what it says
        raise InputError(f"{graph} cannot be read as an ONNX graph: {first_line(error)}.") from error


def count_flops(graph: Path, batch: int, sequence: int) -> int | None:
    """FLOPs of one call on [batch, sequence] tokens, as torch counts them: two for each multiplication in a matrix
    product. `None` where a product's sizes cannot be told, or the graph has operators that are not known here."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    _write_as_onnx(model.graph)
    if any(_is_unknown(node) for node in model.graph.node):
        return None
    static_batch, static_sequence = _static_sizes(model)
    counted = static_batch or _COUNTED
    if sequence > 1 or static_sequence:
        total = _flops_of(_at_shape(model, counted, sequence))
    else:
        totals = [_flops_of(_at_shape(model, counted, length)) for length in (2, 3, 4)]
        two, three, four = (total or 0 for total in totals)
        total = None if None in totals else 3 * two - 3 * three + four
    return None if total is None else total * batch // counted


def _write_as_onnx(graph: onnx.GraphProto) -> None:
    """Put ONNX's operators, with the same sizes and products, in the place of ONNX Runtime's own, which the inference
    of shapes does not know. The graph is for counting only: what it computes is another thing."""
    from onnx import TensorProto, helper

    nodes = []
    for node in graph.node:
        if node.domain in ("", _RUNTIME) and node.op_type in _KEEP_SHAPE:
            outputs = [name for index, name in enumerate(node.output) if name and index in (0, _SUM)]
            nodes += [helper.make_node("Identity", node.input[:1], [name]) for name in outputs]
        elif node.domain == _RUNTIME and node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            weight = TensorProto(name=f"{node.output[0]}_weight", dims=[sizes["K"], sizes["N"]])
            weight.data_type = TensorProto.FLOAT
            graph.initializer.append(weight)
            nodes.append(helper.make_node("MatMul", [node.input[0], weight.name], node.output))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _is_unknown(node: onnx.NodeProto) -> bool:
    """Whether products may hide in the node, which are not counted: in its operator, or in graphs of its own."""
    inside = [inner for attribute in node.attribute for inner in attribute.g.node]
    if node.domain not in ("", "ai.onnx") or node.op_type in _NOT_COUNTED:
        return True
    return any(inner.op_type in ("MatMul", "Gemm", "Attention") or _is_unknown(inner) for inner in inside)


def _static_sizes(model: onnx.ModelProto) -> tuple[int, int]:
    """Batch and sequence where the graph takes no other; 0 where it does."""
    first = model.graph.input[0].type.tensor_type.shape.dim
    return first[0].dim_value, first[1].dim_value


def _at_shape(model: onnx.ModelProto, batch: int, sequence: int) -> onnx.ModelProto:
    from onnx import shape_inference

    del model.graph.value_info[:]
    for value in model.graph.input:
        axes = value.type.tensor_type.shape.dim
        axes[0].dim_value = batch
        if value.name.startswith(PAST_INPUTS):
            axes[2].dim_value = 0  # a whole text is read onto an empty cache
        elif len(axes) > 1:
            axes[1].dim_value = sequence
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return shape_inference.infer_shapes(model, data_prop=True)


def _flops_of(model: onnx.ModelProto) -> int | None:
    graph, total = model.graph, 0
    shapes = {value.name: _sizes(value) for value in (*graph.value_info, *graph.input, *graph.output)}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            flops = _product(node, shapes)
        elif "Attention" in node.op_type:
            flops = _attention(node, shapes)
        else:
            continue
        if flops is None:
            return None
        total += flops
    return total


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    """0 stands for what is not known."""
    return [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]


def _product(node: Any, shapes: dict[str, list[int]]) -> int | None:
    output, left = shapes.get(node.output[0]), shapes.get(node.input[0])
    if not output or not left or 0 in output:
        return None
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * math.prod(output) * left[0 if transposed else -1] or None


def _attention(node: Any, shapes: dict[str, list[int]]) -> int | None:
    """ONNX's own Attention on [batch, heads, sequence, size]; others hide their sizes."""
    found = [shapes.get(name) for name in node.input[:3]]
    if node.domain or len(found) < 3 or any(not sizes or len(sizes) != 4 or 0 in sizes for sizes in found):
        return None
    query, key, value = (sizes for sizes in found if sizes)
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])
