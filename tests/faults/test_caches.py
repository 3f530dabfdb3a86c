"""Programs that write text and go on from something else than what they have read: right in one piece, so that parity
and every check of whole texts passes, and wrong as soon as they write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import openvino
import pytest
from onnx import helper
from openvino import opset13 as ops
from transformers.cache_utils import DynamicLayer

from limbeck.errors import ExportMismatch
from limbeck.exporters.artifact import read_manifest, seal
from limbeck.exporters.kv_cache import PAST_INPUTS
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.recipes.steps import export

Bench = Any
SHAPES = ShapeRange(max_batch=8, opt_batch=2, max_sequence=48, opt_sequence=16)
BACKENDS = pytest.mark.parametrize("backend", ["onnx", pytest.param("openvino", marks=pytest.mark.thorough)])
UNTRAINED = "teacher"
"""The check that the teacher fails, whose weights are random."""
GraphChange = Callable[[onnx.ModelProto], None]
ModelChange = Callable[[openvino.Model], None]


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Any) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("llama", task="text-generation"))


@pytest.fixture(scope="module")
def rows(teacher: Checkpoint, write_jsonl: Any, texts: list[str], tmp_path_factory: Any) -> Data:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return teacher.read(write_jsonl(file, [{"text": text} for text in texts]))


@pytest.fixture(scope="module")
def writers(teacher: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(backend: str) -> Path:
        if backend not in made:
            made[backend] = tmp_path_factory.mktemp("writers") / backend
            export(teacher, ExportSettings(backend=backend, shapes=SHAPES), made[backend])
        return made[backend]

    return make


@pytest.fixture
def planted(
    writers: Callable[[str], Path], edit_onnx: Callable[[Path, GraphChange], None], tmp_path: Path
) -> Callable[[str, GraphChange, ModelChange], Path]:
    def plant(backend: str, in_onnx: GraphChange, in_openvino: ModelChange) -> Path:
        folder = Path(shutil.copytree(writers(backend), tmp_path / backend))
        if backend == "onnx":
            edit_onnx(folder, in_onnx)
        else:
            edit_ir(folder, in_openvino)
        seal(read_manifest(folder), folder)
        return folder

    return plant


def edit_ir(folder: Path, change: ModelChange) -> None:
    model = openvino.Core().read_model(str(folder / "openvino_model.xml"))
    change(model)
    scratch = folder.parent / "scratch"
    openvino.save_model(model, str(scratch / "openvino_model.xml"), compress_to_fp16=False)
    del model  # it reads the weights where they lie
    shutil.copytree(scratch, folder, dirs_exist_ok=True)


def parameter(model: openvino.Model, name: str) -> Any:
    return next(each for each in model.get_parameters() if name in each.output(0).get_names())


def put_between(value: Any, made_of: Callable[[Any], Any]) -> None:
    """Whoever reads the value reads what is made of it."""
    readers = list(value.get_target_inputs())
    made = made_of(value).output(0)
    for reader in readers:
        reader.replace_source_output(made)


def in_front(model: onnx.ModelProto, value: str, made: str, nodes: list[onnx.NodeProto]) -> None:
    """Whoever reads the value reads what these nodes make of it."""
    for node in model.graph.node:
        node.input[:] = [made if name == value else name for name in node.input]
    rest = [*nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(rest)


def constant(model: onnx.ModelProto, name: str, values: list[int]) -> str:
    model.graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values))
    return name


def assert_cache_alone_says_no(report: Any) -> None:
    failed = {check.name for check in report.candidates[0].checks if not check.passed}
    assert failed - {UNTRAINED} == {"cache"}


@BACKENDS
def test_padding_on_the_left_that_is_read(
    backend: str, bench: Bench, planted: Any, teacher: Checkpoint, rows: Data
) -> None:
    def in_onnx(model: onnx.ModelProto) -> None:
        mask = next(node for node in model.graph.node if node.op_type == "GatherND").output[0]
        both = next(node for node in model.graph.node if node.op_type == "And" and mask in node.input)
        causal = next(name for name in both.input if name != mask)
        both.input[:] = [causal, causal]

    def in_openvino(model: openvino.Model) -> None:
        put_between(
            parameter(model, "attention_mask").output(0),
            lambda mask: ops.maximum(mask, ops.constant(1, openvino.Type.i64)),
        )

    folder = planted(backend, in_onnx, in_openvino)
    said = "padding on the left is read as text"
    assert_cache_alone_says_no(bench.assert_caught(folder, "cache", said, teacher=teacher, data=rows))


@BACKENDS
def test_positions_off_by_one_after_the_prompt(
    backend: str, bench: Bench, planted: Any, teacher: Checkpoint, rows: Data
) -> None:
    def in_onnx(model: onnx.ModelProto) -> None:
        past = next(value.name for value in model.graph.input if value.name.startswith(PAST_INPUTS))
        one, two = constant(model, "one", [1]), constant(model, "two", [2])
        in_front(
            model, "position_ids", "shifted",
            [helper.make_node("Shape", [past], ["past_shape"]),
             helper.make_node("Gather", ["past_shape", two], ["past_length"]),
             helper.make_node("Min", ["past_length", one], ["by"]),
             helper.make_node("Add", ["position_ids", "by"], ["shifted"])],
        )  # fmt: skip

    def in_openvino(model: openvino.Model) -> None:
        def length(name: str) -> Any:
            axis, zero = ops.constant([1], openvino.Type.i64), ops.constant(0, openvino.Type.i64)
            return ops.gather(ops.shape_of(parameter(model, name).output(0), "i64"), axis, zero)

        past = ops.subtract(length("attention_mask"), length("input_ids"))
        by = ops.minimum(past, ops.constant([1], openvino.Type.i64))
        put_between(parameter(model, "position_ids").output(0), lambda positions: ops.add(positions, by))

    folder = planted(backend, in_onnx, in_openvino)
    said = "positions are off by one after the prompt (+1)"
    assert_cache_alone_says_no(bench.assert_caught(folder, "cache", said, teacher=teacher, data=rows))


def test_a_cache_that_drops_a_token(bench: Bench, planted: Any, teacher: Checkpoint, rows: Data) -> None:
    def change(model: onnx.ModelProto) -> None:
        bounds = [constant(model, "from", [1]), constant(model, "to", [2**40]), constant(model, "along", [2])]
        for past in [value.name for value in model.graph.input if value.name.startswith(PAST_INPUTS)]:
            less = f"{past}.less"
            in_front(model, past, less, [helper.make_node("Slice", [past, *bounds], [less])])

    folder = planted("onnx", change, lambda model: None)
    said = "a token is lost at every step: the first that is kept"
    assert_cache_alone_says_no(bench.assert_caught(folder, "cache", said, teacher=teacher, data=rows))


@BACKENDS
def test_a_good_cache_passes(backend: str, writers: Any, bench: Bench, teacher: Checkpoint, rows: Data) -> None:
    report = bench.validated(writers(backend), teacher=teacher, data=rows)
    checks = {check.name: check for check in report.candidates[0].checks}
    assert [check.detail for check in checks.values() if not check.passed and check.name != UNTRAINED] == []
    assert checks["cache"].passed


@BACKENDS
def test_an_export_that_reads_its_cache_in_another_order_is_refused(
    backend: str, teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = DynamicLayer.update

    def turned(self: Any, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_initialized:
            self.values = self.values.flip(-2)
        return update(self, key_states, value_states, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", turned)
    with pytest.raises(ExportMismatch, match=r"is not the model: cache: one text: 6 tokens read after 12 others") as no:
        export(teacher, ExportSettings(backend=backend, shapes=SHAPES), tmp_path / "out")
    assert no.value.exit_code == 6 and list(tmp_path.iterdir()) == []
