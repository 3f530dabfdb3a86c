"""The 2:4 check on arrays, and the evidence that is read from ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from limbeck.errors import UsageError
from limbeck.exporters.artifact import SparseLayer
from limbeck.exporters.constant_weights import fold_weights
from limbeck.exporters.sparsity import require_pattern, sparsity_evidence
from limbeck.models.sparsity import first_break, is_semi_structured, why_not_sparse, zero_share

matrices = hnp.arrays(
    np.int8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.sampled_from([0, 0, 0, 1, -2])
)


def masked(weight: np.ndarray, axis: int) -> np.ndarray:
    """The two largest of every four along `axis`, the plain way."""
    rows = np.moveaxis(weight.copy(), axis, -1)
    for row in rows:
        for start in range(0, len(row), 4):
            row[start + np.argsort(abs(row[start : start + 4]))[:2]] = 0
    return np.moveaxis(rows, -1, axis)


@given(weight=matrices, axis=st.integers(0, 1))
def test_the_pattern_is_counted_group_by_group(weight: np.ndarray, axis: int) -> None:
    rows = weight if axis == 1 else weight.T
    plain = all(
        len(row[start : start + 4]) == 4 and (row[start : start + 4] != 0).sum() <= 2
        for row in rows
        for start in range(0, len(row), 4)
    )
    assert is_semi_structured(weight, axis) == plain
    assert is_semi_structured(weight.T, 1 - axis) == plain
    assert zero_share(weight) == (weight == 0).sum() / weight.size


@given(weight=matrices, axis=st.integers(0, 1))
def test_a_break_is_where_it_is_said_to_be(weight: np.ndarray, axis: int) -> None:
    broken = first_break(weight, axis)
    if broken is not None:
        position, other = broken
        rows = weight if axis == 1 else weight.T
        assert (rows[other, position : position + 4] != 0).sum() > 2


@given(
    weight=hnp.arrays(np.float32, (8, 16), elements=st.floats(0.5, 2, width=32)),
    axis=st.integers(0, 1),
    data=st.data(),
)
def test_one_weight_put_back_breaks_a_masked_matrix(weight: np.ndarray, axis: int, data: st.DataObject) -> None:
    sparse = masked(weight, axis)
    assert is_semi_structured(sparse, axis)
    zero = data.draw(st.sampled_from([tuple(place) for place in np.argwhere(sparse == 0)]))
    sparse[zero] = 1e-7
    assert not is_semi_structured(sparse, axis)
    broken = first_break(sparse, axis)
    assert broken == (zero[axis] // 4 * 4, zero[1 - axis])


@pytest.mark.parametrize(
    ("reduction", "output", "said"), [(64, 32, None), (30, 32, "input size 30"), (32, 3, "output")]
)
def test_sizes_that_sparse_kernels_do_not_take(reduction: int, output: int, said: str | None) -> None:
    reason = why_not_sparse(reduction, output)
    assert reason is None if said is None else said in str(reason)


def written(folder: Path, body: str, **weights: np.ndarray) -> Path:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    graph (float[n, 64] x) => (float[n, m] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    for name, value in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("body", "axis", "shape"),
    [
        ("y = MatMul (x, w)", 0, (64, 32)),
        ("y = Gemm (x, w)", 0, (64, 32)),
        ("y = Gemm <transB = 1> (x, w)", 1, (32, 64)),
        ("t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)", 1, (32, 64)),
        ("t = Transpose (w) h = Identity (t) y = MatMul (x, h)", 1, (32, 64)),
    ],
)
@given(seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_the_pattern_is_looked_for_along_the_summed_axis(
    tmp_path_factory: pytest.TempPathFactory, body: str, axis: int, shape: tuple[int, int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("graph")
    dense = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    (row,) = sparsity_evidence(written(folder, body, w=masked(dense, axis)))
    assert row.shape == [64, 32] and row.pattern and row.zeros == 0.5
    assert row.eligible == ("Transpose" not in body)
    (wrong,) = sparsity_evidence(written(folder, body, w=masked(dense, 1 - axis)))
    assert not wrong.pattern and wrong.zeros == 0.5

    model = onnx_ir.load(str(written(folder, body, w=masked(dense, axis))))
    assert fold_weights(model) == ("Transpose" in body)
    onnx_ir.save(model, str(folder / "folded.onnx"))
    (folded,) = sparsity_evidence(folder / "folded.onnx")
    assert folded.eligible and folded.pattern
    onnx.checker.check_model(str(folder / "folded.onnx"), full_check=True)


def test_products_without_a_stored_weight_are_not_listed(tmp_path: Path) -> None:
    body = "t = Transpose (x) y = MatMul (x, t)"
    assert sparsity_evidence(written(tmp_path, body)) == []


def test_what_pruning_does_not_touch_is_not_eligible(tmp_path: Path) -> None:
    graph = written(tmp_path, "y = MatMul (x, w)", w=np.zeros((64, 32), dtype=np.float32))
    (row,) = sparsity_evidence(graph, prunable=["another"])
    assert not row.eligible and "outside the layers" in row.reason


def layer(name: str, eligible: bool, pattern: bool) -> SparseLayer:
    return SparseLayer(layer=name, shape=[64, 32], eligible=eligible, pattern=pattern, zeros=0.5, reason="why")


def test_a_pattern_that_is_not_there_is_refused() -> None:
    require_pattern([layer("a", True, True), layer("head", False, False)], "model")
    with pytest.raises(UsageError, match=r"1 of 2 eligible layers are not 2:4: b \(why\)") as refused:
        require_pattern([layer("a", True, True), layer("b", True, False)], "model")
    assert "limbeck prune model --pattern 2:4" in str(refused.value.hint)
    with pytest.raises(UsageError, match="no layer that could be"):
        require_pattern([layer("head", False, True)], "model")
    with pytest.raises(UsageError, match="no layer that could be"):
        require_pattern([], "model")
    many = [layer(str(index), True, False) for index in range(9)]
    with pytest.raises(UsageError, match="and 4 more"):
        require_pattern(many, "model")
