"""What is told of a program's layers is what its files hold: precision, sizes, zeros and FLOPs, backend by backend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nncf
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import openvino
import pytest
import torch
from openvino import opset13 as ops

from limbeck.backends.base import Backend, ExportJob
from limbeck.backends.registry import get_backend
from limbeck.errors import InputError
from limbeck.exporters.artifact import Manifest
from limbeck.exporters.inputs import probe_batch
from limbeck.exporters.layer_facts import LayerFacts, ProgramFacts, checkpoint_facts
from limbeck.exporters.onnx_facts import onnx_facts
from limbeck.exporters.onnx_weight_only import quantize_weights
from limbeck.exporters.openvino_facts import openvino_facts
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.anatomy import MATRIX_KINDS, Place, place_of
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.prune.costs import counted_flops
from limbeck.prune.semi_structured import prune_semi_structured

TinyCheckpoint = Callable[..., Path]
SHAPES = ShapeRange(max_batch=8, max_sequence=48)
KINDS = ["q", "k", "v", "o", "up", "down"]
DECODERS = ("gpt2", "llama")
INT8 = "int8 weights and activations"
THOROUGH = pytest.mark.thorough

# backend, precision: the layers' precision, that of the embeddings, and bytes a weight in the layers
EXPORTS = {
    ("onnx", "fp32"): ("float32", "float32", 4),
    ("onnx", "fp16"): ("float16", "float16", 2),
    ("onnx", "int8"): (INT8, "float32", 1),
    ("openvino", "fp32"): ("float32", "float32", 4),
    ("openvino", "int8"): (INT8, "int8", 1),
    ("tensorrt", "fp16"): ("float16", "float16", 2),
}
FURTHER = [("onnx", "fp16"), ("openvino", "int8")]


def load(tiny_checkpoint: TinyCheckpoint, family: str) -> Checkpoint:
    task = "text-generation" if family in DECODERS else "sentence-similarity"
    return load_checkpoint(tiny_checkpoint(family, task=task), task)


def export(
    checkpoint: Checkpoint, folder: Path, backend: str, shapes: ShapeRange = SHAPES, **given: object
) -> Manifest:
    """The program's files and what the manifest would say of them."""
    settings = ExportSettings.model_validate({"backend": backend, "shapes": shapes, **given})
    calibration = [probe_batch(checkpoint, 1, length) for length in (1, 2, 3, 5, 7, 9, 14, 24, 40)]
    program = get_backend(backend).export(ExportJob(checkpoint, settings, calibration), folder)
    return program.manifest(checkpoint, settings)


Exported = Callable[[str, str], tuple[Path, Manifest]]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported(backend, precision)`: a tiny BERT's program, made once; do not write into its folder."""
    made: dict[tuple[str, str], tuple[Path, Manifest]] = {}

    def make(backend: str, precision: str) -> tuple[Path, Manifest]:
        if (backend, precision) not in made:
            folder = tmp_path_factory.mktemp("program")
            manifest = export(load(tiny_checkpoint, "bert"), folder, backend, precision=precision)
            made[backend, precision] = folder, manifest
        return made[backend, precision]

    return make


def facts_of(folder: Path, manifest: Manifest, batch: int = 1, sequence: int = 16) -> ProgramFacts:
    found = get_backend(manifest.settings.backend).program_facts(folder, manifest, batch, sequence)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("backend", "precision"), [pytest.param(*each, marks=[THOROUGH] * (each in FURTHER)) for each in EXPORTS]
)
def test_the_layers_of_a_program_are_those_of_its_graph(
    backend: str, precision: str, exported: Exported, tiny_checkpoint: TinyCheckpoint
) -> None:
    checkpoint = load(tiny_checkpoint, "bert")
    folder, manifest = exported(backend, precision)
    found = facts_of(folder, manifest)
    inside, table, size = EXPORTS[backend, precision]
    assert [(layer.number, layer.kind) for layer in found.layers] == [(row, kind) for row in (0, 1) for kind in KINDS]
    assert {layer.precision for layer in found.layers} == {inside}
    assert {layer.precision for layer in found.tables} == {table}
    assert all(layer.size_bytes == size * layer.shape[0] * layer.shape[1] for layer in found.layers)
    assert [layer.shape for layer in found.layers[-2:]] == [[32, 64], [64, 32]]  # [reduction, output]
    assert sorted(layer.shape for layer in found.tables) == [[2, 32], [64, 32], [400, 32]]
    assert {layer.eligible for layer in found.layers} == {backend == "tensorrt"}  # no other has sparse kernels
    assert all(layer.sparsity.startswith("dense") and layer.reason for layer in found.layers)
    for batch, sequence in ((1, 1), (1, 48), (3, 17)):
        assert facts_of(folder, manifest, batch, sequence).flops == counted_flops(checkpoint, sequence, batch)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        pytest.param("gpt2", "onnx", marks=THOROUGH),
        pytest.param("modernbert", "onnx", marks=THOROUGH),
        pytest.param("llama", "openvino", marks=THOROUGH),
    ],
)
def test_every_family_says_what_its_matrices_are_for(
    family: str, backend: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = load(tiny_checkpoint, family)
    found = facts_of(tmp_path, export(checkpoint, tmp_path, backend), 2, 11)
    assert found.flops == counted_flops(checkpoint, 11, 2)
    stored = checkpoint_facts(checkpoint, Path(checkpoint.source))
    places = [(layer.number, layer.kind, layer.shape) for layer in stored.layers if layer.number is not None]
    graph = [(layer.number, layer.kind, layer.shape) for layer in found.layers if layer.number is not None]
    assert sorted(graph) == sorted(places)
    assert {kind for _, kind, _ in graph} <= set(MATRIX_KINDS)


def test_names_say_the_place() -> None:
    assert place_of("encoder.encoder.layer.11.attention.output.dense") == Place(11, "o")
    assert place_of("transformer.h.3.mlp.c_proj") == Place(3, "down")
    assert place_of("blocks.2.mixer.in_proj") == Place(2, "mixer.in_proj")  # of an unknown family
    assert place_of("bert.embeddings.word_embeddings") is None
    assert place_of(f"layer.{'9' * 5000}.x") is None


@pytest.mark.parametrize("backend", ["onnx", pytest.param("openvino", marks=THOROUGH)])
def test_flops_of_a_static_program(backend: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load(tiny_checkpoint, "bert")
    static = ShapeRange(min_batch=1, max_batch=1, min_sequence=16, max_sequence=16)
    manifest = export(checkpoint, tmp_path, backend, static)
    assert facts_of(tmp_path, manifest, 1, 16).flops == counted_flops(checkpoint, 16, 1)


def test_a_sparse_kit_shows_its_pattern_and_what_breaks_it(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load(tiny_checkpoint, "bert")
    pruned = replace(checkpoint, model=prune_semi_structured(checkpoint).model)
    manifest = export(pruned, tmp_path, "tensorrt", precision="fp16", sparsity="2:4")
    found = facts_of(tmp_path, manifest)
    assert all(layer.eligible and layer.pattern and layer.sparsity == "2:4" for layer in found.layers)
    # The graph decides, whatever the checkpoint was: one weight overwritten, another emptied.
    model = onnx_ir.load(str(tmp_path / "model.onnx"))
    broken, emptied = found.layers[0].layer, found.layers[1].layer
    overwrite(model, f"{broken}.weight.T", lambda weight: np.ones_like(weight))
    overwrite(model, f"{emptied}.weight.T", lambda weight: weight * (np.arange(weight.size).reshape(weight.shape) < 32))
    shutil.copytree(tmp_path, tmp_path / "changed")
    onnx_ir.save(model, str(tmp_path / "changed" / "model.onnx"))
    changed = {layer.layer: layer for layer in facts_of(tmp_path / "changed", manifest).layers}
    assert changed[broken].sparsity == "dense" and "more than 2 of 4" in changed[broken].reason
    assert changed[emptied].zeros >= 1 - 1 / 32
    engine = manifest.model_copy(update={"format": "tensorrt-engine"})
    assert get_backend("tensorrt").program_facts(tmp_path, engine, 1, 16) is None


def overwrite(model: onnx_ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    changed = change(value.const_value.numpy()).astype(value.const_value.numpy().dtype)
    value.const_value = onnx_ir.tensor(changed, name=name)


def test_four_bit_weights_in_blocks_with_zero_points(tmp_path: Path) -> None:
    """What stands for zero is not 0 in unsigned types: the runtime says which weights are zero."""
    generator = np.random.default_rng(0)
    stored = generator.integers(0, 16, (64, 32)).astype(np.uint8)
    points = generator.integers(4, 12, (2, 32)).astype(np.uint8)
    where = generator.random(stored.shape) < 0.4
    stored[where] = points.repeat(32, axis=0)[where]
    four = onnx.TensorProto.UINT4
    initializers = [
        onnx.helper.make_tensor("w", four, stored.shape, stored.flatten()),
        onnx.helper.make_tensor("z", four, points.shape, points.flatten()),
        onnx.numpy_helper.from_array(generator.random((2, 32), dtype=np.float32) + 0.5, "s"),
    ]
    unpack = onnx.helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0, block_size=32)
    product = onnx.helper.make_node("MatMul", ["x", "d"], ["y"], name="product")
    kind = onnx.TensorProto.FLOAT
    ports = [onnx.helper.make_tensor_value_info(name, kind, ["n", size]) for name, size in (("x", 64), ("y", 32))]
    graph = onnx.helper.make_graph([unpack, product], "g", ports[:1], ports[1:], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    weight = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": np.eye(64, dtype=np.float32)})[0]
    (layer,) = onnx_facts(tmp_path / "model.onnx", 1, 64).layers
    assert layer.precision == "int4 weights only, computed in float32"
    assert layer.zeros == (np.abs(weight) < 1e-4).mean() and layer.zeros > 0.4  # it rounds
    assert (layer.shape, layer.size_bytes) == ([64, 32], 1024)
    assert layer.sparsity.startswith("unstructured, ")


PRECISIONS = {"int8-weight-only": ("int8", 1), "int4-weight-only": ("int4", 0.5)}


@pytest.mark.parametrize(
    ("family", "precision", "fusions"),
    [
        ("bert", "int8-weight-only", False),
        pytest.param("gpt2", "int4-weight-only", False, marks=THOROUGH),
        pytest.param("llama", "int4-weight-only", True, marks=THOROUGH),
        pytest.param("bert", "fp32", True, marks=THOROUGH),
    ],
)
def test_layers_that_onnx_runtimes_own_operators_hold(
    family: str, precision: str, fusions: bool, tiny_checkpoint: TinyCheckpoint, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Integers in a MatMulNBits, tables beside their scales, and weights that fusions put side by side."""
    monkeypatch.setattr("limbeck.exporters.onnx_weight_only._SMALLEST_TABLE", 1000)
    checkpoint = load(tiny_checkpoint, family)
    manifest = export(checkpoint, tmp_path, "onnx", precision=precision, options={"fusions": fusions}, kv_cache=False)
    found, stored = facts_of(tmp_path, manifest), checkpoint_facts(checkpoint, Path(checkpoint.source))
    kind, size = PRECISIONS.get(precision, ("float32", 4))
    assert {(layer.stored, layer.computed) for layer in found.layers} == {(kind, "float32")}
    assert shapes_of(found.layers) == shapes_of(stored.layers)
    whole_groups = [layer for layer in found.layers if layer.shape[0] % 32 == 0]
    assert whole_groups and all(layer.size_bytes == size * np.prod(layer.shape) for layer in whole_groups)
    assert shapes_of(found.tables) == shapes_of(stored.tables)
    tables = {layer.stored for layer in found.tables if np.prod(layer.shape) >= 1000}
    assert tables == {"float32" if precision == "fp32" else "int8"}
    for batch, sequence in ((1, 1), (3, 17)):
        assert facts_of(tmp_path, manifest, batch, sequence).flops == counted_flops(checkpoint, sequence, batch)


def shapes_of(layers: list[LayerFacts]) -> list[tuple[str, list[int]]]:
    """Names as they end, since an embedder's program holds its encoder under a name of its own."""
    return sorted((layer.layer.removeprefix("encoder.").removeprefix("encoder."), layer.shape) for layer in layers)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_of_packed_integers_are_those_that_the_runtime_computes_with(bits: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight = (generator.normal(size=(40, 24)) * (generator.random((40, 24)) < 0.6)).astype(np.float32)  # 40 is padded
    ports = [onnx.helper.make_tensor_value_info(name, 1, ["b", "n", size]) for name, size in (("x", 40), ("y", 24))]
    parts = "a.weight.T{16}+b.weight.T{8}"
    product = onnx.helper.make_node("MatMul", ["x", parts], ["y"])
    graph = onnx.helper.make_graph([product], "g", ports[:1], ports[1:], [onnx.numpy_helper.from_array(weight, parts)])
    plain = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    packed = quantize_weights(onnx_ir.from_proto(plain), bits, 32)
    onnx_ir.save(packed, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    real = session.run(None, {"x": np.eye(40, dtype=np.float32)[None]})[0][0]
    found = onnx_facts(tmp_path / "model.onnx", 3, 5)
    assert [(layer.layer, layer.shape) for layer in found.layers] == [("a", [40, 16]), ("b", [40, 8])]
    zeros = [(np.abs(columns) < 1e-6).mean() for columns in (real[:, :16], real[:, 16:])]
    assert [layer.zeros for layer in found.layers] == pytest.approx(zeros) and min(zeros) > 0.3
    assert {layer.precision for layer in found.layers} == {f"int{bits} weights only, computed in float32"}
    assert found.flops == 2 * 3 * 5 * 40 * 24


@pytest.mark.parametrize("operator", ["FusedMatMul", "MultiHeadAttention"])
def test_flops_are_not_told_where_a_product_is_not_known(operator: str, exported: Exported, tmp_path: Path) -> None:
    source, manifest = exported("onnx", "fp32")
    folder = tmp_path / "artifact"
    shutil.copytree(source, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.op_type, node.domain = operator, "com.microsoft"
    onnx.save(model, folder / "model.onnx")
    assert facts_of(folder, manifest).flops is None


@pytest.mark.parametrize(
    ("mode", "words"), [("INT4_ASYM", "int4"), ("INT4_SYM", "int4"), ("INT8_ASYM", "int8"), ("INT8_SYM", "int8")]
)
def test_weights_that_alone_are_quantised_in_an_ir(mode: str, words: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight = (generator.normal(size=(32, 64)) * (generator.random((32, 64)) < 0.6)).astype(np.float32)
    inputs = ops.parameter([-1, 64], openvino.Type.f32, name="x")
    model = openvino.Model([ops.matmul(inputs, ops.constant(weight), False, True)], [inputs])
    groups = {"group_size": 32, "all_layers": True, "ratio": 1} if words == "int4" else {}
    smaller = nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **groups)
    openvino.save_model(smaller, tmp_path / "model.xml", compress_to_fp16=False)
    (layer,) = openvino_facts(tmp_path / "model.xml", {"INFERENCE_PRECISION_HINT": "f32"}, 1, 64, "none").layers
    assert layer.precision == f"{words} weights only, computed in float32"
    compiled = openvino.Core().compile_model(smaller, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (real,) = compiled({"x": np.eye(64, dtype=np.float32)}).values()
    assert layer.zeros == pytest.approx((np.abs(real) < 1e-6).mean()) and layer.zeros > 0.3
    assert layer.shape == [64, 32] and layer.size_bytes == 64 * 32 * (0.5 if words == "int4" else 1)


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"INFERENCE_PRECISION_HINT": "bf16"}, "float32, computed in bfloat16"),
        ({}, "float32, computed in what the runtime chooses"),
    ],
)
def test_what_is_computed_in_is_what_the_runtime_is_told(
    properties: dict[str, str], words: str, exported: Exported
) -> None:
    folder, manifest = exported("openvino", "fp32")
    told = manifest.model_copy(update={"compile_properties": properties})
    assert {layer.precision for layer in facts_of(folder, told).layers} == {words}


@pytest.mark.parametrize("location", ["../secret", "{absolute}/secret"])
def test_a_graph_may_not_read_outside_its_folder(location: str, exported: Exported, tmp_path: Path) -> None:
    source, manifest = exported("onnx", "fp32")
    folder = tmp_path / "artifact"
    shutil.copytree(source, folder)
    shutil.move(folder / "model.onnx.data", tmp_path / "secret")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.format(absolute=tmp_path)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="points outside"):
        facts_of(folder, manifest)


@pytest.mark.parametrize(("backend", "name"), [("onnx", "model.onnx"), ("openvino", "openvino_model.xml")])
@pytest.mark.parametrize("content", [b"", b"no graph at all", b"<net><layers><layer/>"])
def test_a_file_that_is_no_graph_is_named(
    backend: str, name: str, content: bytes, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    checkpoint = load(tiny_checkpoint, "bert")
    manifest = Manifest(
        format=backend, task=checkpoint.task.name, settings=ExportSettings(backend=backend), parent_hash="", parent="",
        parameters=0, inputs=[], outputs=[], max_length=64, lineage=checkpoint.lineage,
    )  # fmt: skip
    with pytest.raises(InputError, match=name):
        facts_of(tmp_path, manifest)


def test_a_plug_in_need_not_know_its_layers(tmp_path: Path) -> None:
    class Plain(Backend):
        name = "plain"
        summary = "a plug-in"
        probe = export = load = lambda self, *args: None  # type: ignore[assignment]

    assert Plain().program_facts(tmp_path, None, 1, 1) is None  # type: ignore[arg-type]


def test_a_checkpoint_shows_the_types_of_its_files(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("bert")
    full = load_checkpoint(source)
    stored = checkpoint_facts(full, source)
    assert {layer.precision for layer in (*stored.layers, *stored.tables)} == {"float32"}
    assert [layer.kind for layer in stored.layers] == KINDS * 2  # the pooler is not used
    assert all(layer.eligible for layer in stored.layers)
    half = tmp_path / "half"
    shutil.copytree(source, half)
    load_checkpoint(source).model.to(torch.bfloat16).save_pretrained(half)
    found = checkpoint_facts(load_checkpoint(half), half)
    assert {layer.precision for layer in found.layers} == {"bfloat16, computed in float32"}
    assert sum(layer.size_bytes for layer in found.layers) == sum(layer.size_bytes for layer in stored.layers) // 2
