"""Range analysis on graphs small enough to know the answer."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import ExportMismatch
from limbeck.exporters.float_range import FLOAT16_MAX, TensorRange, check_ranges, float32_twin, measure_ranges


def scaled(factor: float) -> onnx_ir.Model:
    """int64 `input_ids` [batch, sequence] -> float16 -> times `factor` (float16) -> float32 -> times 1000."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    graph (int64[b, s] input_ids) => (float[b, s] y) {
        half = Cast <to = 10> (input_ids)
        product = Mul (half, factor)
        wide = Cast <to = 1> (product)
        y = Mul (wide, thousand)
    }"""
    import onnx

    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, dtype=np.float16), "factor"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1000, dtype=np.float32), "thousand"))
    model = onnx_ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'block.{node.op_type.lower()}', 'op']"
    return model


@given(
    factor=st.floats(-60_000, 60_000, width=16),
    ids=st.lists(st.integers(0, 30_000), min_size=1, max_size=8),
)
@settings(max_examples=20, deadline=None)
def test_each_half_tensor_has_its_largest_magnitude(factor: float, ids: list[int]) -> None:
    batches = [{"input_ids": torch.tensor([[value]])} for value in ids]
    ranges = {entry.tensor: entry for entry in measure_ranges(scaled(factor), batches)}
    assert set(ranges) == {"half", "product"}  # the last product is float32
    assert ranges["half"].largest == max(ids)
    assert math.isclose(ranges["product"].largest, abs(factor) * max(ids), rel_tol=1e-6)
    assert ranges["product"].module == "block.mul"


def test_an_overflow_shows_although_the_cpu_hides_it() -> None:
    ranges = measure_ranges(scaled(100.0), [{"input_ids": torch.tensor([[3, 1_000]])}])
    assert ranges[0].tensor == "product" and ranges[0].largest == 100_000
    with pytest.raises(ExportMismatch, match=r"block\.mul overflows float16: Mul reaches 100,000") as refused:
        check_ranges(ranges)
    assert "bf16" in str(refused.value.hint)


@given(largest=st.floats(0, 1e6), margin=st.floats(1, 8))
def test_the_margin_decides(largest: float, margin: float) -> None:
    ranges = [TensorRange("x", "layer", "Add", largest)]
    if largest * margin <= FLOAT16_MAX:
        check_ranges(ranges, margin)
    else:
        with pytest.raises(ExportMismatch):
            check_ranges(ranges, margin)


def test_what_is_not_a_number_is_beyond_the_range() -> None:
    with pytest.raises(ExportMismatch):
        check_ranges([TensorRange("x", "layer", "Add", float("nan"))])
    with pytest.raises(ExportMismatch):
        check_ranges([TensorRange("x", "layer", "Add", float("inf"))])


def test_a_mask_of_float16s_lowest_number_is_no_overflow() -> None:
    batch = {"input_ids": torch.tensor([[0, 1, 2]])}
    masked = scaled(-FLOAT16_MAX)
    assert [entry.largest for entry in measure_ranges(masked, [{"input_ids": batch["input_ids"][:, :2]}])] == [1, 0]
    assert measure_ranges(masked, [batch])[0].largest == 2 * FLOAT16_MAX  # twice that is one


def test_the_measured_graph_stays_as_it_was() -> None:
    model = scaled(3.0)
    measure_ranges(model, [{"input_ids": torch.tensor([[1]])}])
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert model.graph.initializers["factor"].const_value.dtype == onnx_ir.DataType.FLOAT16
    assert next(iter(model.graph)).attributes["to"].value == onnx_ir.DataType.FLOAT16
    assert [node.outputs[0].dtype.name for node in model.graph] == ["FLOAT16", "FLOAT16", "FLOAT", "FLOAT"]
    twin = float32_twin(model)
    assert twin.graph.initializers["factor"].const_value.dtype == onnx_ir.DataType.FLOAT
