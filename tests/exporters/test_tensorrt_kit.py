"""TensorRT kits of tiny models: strongly typed graphs that compute what the model computes, and evidence that holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from transformers import AutoModel
from transformers.exporters import AutoHfExporter, ExportedModel
from transformers.exporters.auto import EXPORT_BACKENDS

from limbeck.backends.base import ExportJob
from limbeck.backends.onnx import OnnxRunner
from limbeck.backends.tensorrt import TensorRTBackend
from limbeck.errors import ExportMismatch, InputError, UsageError
from limbeck.exporters.artifact import Manifest
from limbeck.exporters.build_plan import BuildPlan
from limbeck.exporters.inputs import probe_batch, probe_batches
from limbeck.exporters.node_scopes import module_of
from limbeck.exporters.onnx import GRAPH_FILE, read_weights
from limbeck.exporters.program import ExportedProgram, ProgramWeight
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.exporters.sparsity import sparsity_evidence
from limbeck.exporters.tensorrt import TensorRTConfig, TensorRTExporter
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.prune.semi_structured import prune_semi_structured
from limbeck.validate.proofs.parity import check_parity
from limbeck.validate.proofs.weight_audit import audit_weights

THOROUGH = pytest.mark.thorough
every_family = pytest.mark.parametrize(
    "family",
    ["bert", *(pytest.param(family, marks=THOROUGH) for family in ("distilbert", "roberta", "llama"))],
)
SHAPES = ShapeRange(max_batch=8, max_sequence=48)


@dataclass(frozen=True)
class Kit:
    checkpoint: Checkpoint
    settings: ExportSettings
    folder: Path
    program: ExportedProgram

    def weights(self) -> Iterator[ProgramWeight]:
        return read_weights(self.folder / GRAPH_FILE)

    @property
    def graph(self) -> onnx_ir.Graph:
        return onnx_ir.load(str(self.folder / "model.onnx")).graph

    @property
    def manifest(self) -> Manifest:
        return Manifest(
            format=self.program.format,
            task=self.checkpoint.task.name,
            settings=self.settings,
            parent_hash=self.checkpoint.hash,
            parent=self.checkpoint.source,
            parameters=self.checkpoint.parameters,
            inputs=self.program.inputs,
            outputs=self.program.outputs,
            max_length=self.checkpoint.max_length,
            lineage=self.checkpoint.lineage,
        )


def load(tiny_checkpoint: Callable[..., Path], family: str) -> Checkpoint:
    task = "text-generation" if family == "llama" else "sentence-similarity"
    return load_checkpoint(tiny_checkpoint(family, task=task), task)


def export(checkpoint: Checkpoint, folder: Path, **settings: object) -> Kit:
    chosen = ExportSettings.model_validate({"backend": "tensorrt", "precision": "fp16", "shapes": SHAPES, **settings})
    # One token alone, too: attention hands a single value on unmixed, the widest that an int8 range has to hold.
    calibration = [probe_batch(checkpoint, 2, length) for length in (1, 5, 20)]
    folder.mkdir()
    return Kit(checkpoint, chosen, folder, TensorRTBackend().export(ExportJob(checkpoint, chosen, calibration), folder))


@pytest.fixture(scope="module")
def sparse_kit(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kit]:
    """`sparse_kit(family)`: the fp16 kit of a tiny model that was pruned 2:4, made once."""
    made: dict[str, Kit] = {}

    def make(family: str) -> Kit:
        if family not in made:
            checkpoint = load(tiny_checkpoint, family)
            pruned = replace(checkpoint, model=prune_semi_structured(checkpoint).model)
            made[family] = export(pruned, tmp_path_factory.mktemp("kits") / family, sparsity="2:4")
        return made[family]

    return make


@every_family
def test_a_kit_is_valid_and_computes_what_the_model_computes(sparse_kit: Callable[[str], Kit], family: str) -> None:
    kit = sparse_kit(family)
    onnx.checker.check_model(str(kit.folder / "model.onnx"), full_check=True)
    with torch.inference_mode():
        parity = check_parity(
            TensorRTBackend().load(kit.folder, kit.manifest),
            kit.checkpoint.run,
            probe_batches(kit.checkpoint, SHAPES),
            "fp16",
        )
    assert parity.passed, parity.rows
    assert len(parity.rows) == 5
    audit = audit_weights(kit.checkpoint.module, kit.weights())
    assert audit.passed, audit.rows
    assert kit.program.unverified is not None


@every_family
def test_normalisation_and_softmax_are_float32_islands(sparse_kit: Callable[[str], Kit], family: str) -> None:
    graph = sparse_kit(family).graph
    norms = [node for node in graph if module_of(node).lower().endswith(("norm", "layernorm"))]
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    assert softmaxes and any(node.op_type in ("LayerNormalization", "ReduceMean") for node in norms)
    for node in (*norms, *softmaxes):
        if node.op_type == "Cast":
            continue
        floats = [value.dtype for value in node.inputs if value is not None and value.dtype.is_floating_point()]
        assert set(floats) <= {onnx_ir.DataType.FLOAT}, (node.op_type, module_of(node), floats)
    products = [node for node in graph if node.op_type in ("MatMul", "Gemm") and "rotary" not in module_of(node)]
    assert {value.dtype for node in products for value in node.inputs[:2]} == {onnx_ir.DataType.FLOAT16}
    assert {value.dtype for value in graph.outputs} == {onnx_ir.DataType.FLOAT}


@every_family
def test_every_eligible_layer_is_listed_and_none_with_a_weight_put_back(
    sparse_kit: Callable[[str], Kit], family: str, tmp_path: Path
) -> None:
    kit = sparse_kit(family)
    eligible = [layer for layer in kit.program.sparse_layers if layer.eligible]
    modules = dict(kit.checkpoint.module.named_modules())
    assert len(eligible) >= 8
    assert all(layer.layer in modules and layer.pattern and 0.5 <= layer.zeros < 0.6 for layer in eligible)

    model = onnx_ir.load(str(kit.folder / "model.onnx"))
    changed = eligible[len(eligible) // 2].layer
    weight = model.graph.initializers[f"{changed}.weight.T"]
    values = weight.const_value.numpy().copy()
    group = values[4:8, 3]  # inputs 4 to 7 of output 3
    group[np.flatnonzero(group == 0)[0]] = 0.5
    weight.const_value = onnx_ir.tensor(values, name=weight.name)
    onnx_ir.save(model, str(tmp_path / "model.onnx"), external_data="model.onnx.data")
    again = {layer.layer: layer for layer in sparsity_evidence(tmp_path / "model.onnx")}
    assert not again[changed].pattern
    assert "inputs 4 to 7 of output 3" in again[changed].reason
    assert all(again[layer.layer].pattern for layer in eligible if layer.layer != changed)


@every_family
def test_the_model_is_unchanged_by_its_export(
    sparse_kit: Callable[[str], Kit], tiny_checkpoint: Callable[..., Path], family: str
) -> None:
    exported = sparse_kit(family).checkpoint
    fresh = prune_semi_structured(load(tiny_checkpoint, family)).model.state_dict()
    found = exported.model.state_dict()
    for name, values in found.items():
        assert values.dtype == fresh[name].dtype and torch.equal(values, fresh[name]), name
    assert exported.model.config._attn_implementation == "sdpa"
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in exported.module.modules())


def test_the_plan_says_what_the_builder_is_told(sparse_kit: Callable[[str], Kit]) -> None:
    kit = sparse_kit("bert")
    plan = BuildPlan.load(kit.folder)
    assert plan.flags == ["SPARSE_WEIGHTS"]
    assert plan.precision == "fp16"
    (profile,) = plan.profiles
    assert set(profile) == {"input_ids", "token_type_ids", "attention_mask"}
    assert profile["input_ids"].model_dump() == {"min": [1, 1], "opt": [8, 48], "max": [8, 48]}
    evidence = kit.program.evidence["float16 range"]
    assert evidence["real batches"] == 3 and evidence["widest"][0]["share"] < 0.01


def test_a_kit_opens_in_transformers_without_a_runner(sparse_kit: Callable[[str], Kit]) -> None:
    opened = ExportedModel.from_pretrained(sparse_kit("bert").folder)
    assert opened.export_format == "tensorrt"
    assert EXPORT_BACKENDS["tensorrt"].runner is None


def test_a_dense_checkpoint_is_not_exported_as_sparse(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = load(tiny_checkpoint, "distilbert")
    with pytest.raises(UsageError, match=r"12 of 12 eligible layers are not 2:4.*q_lin") as refused:
        export(checkpoint, tmp_path / "kit", sparsity="2:4")
    assert "limbeck prune" in str(refused.value.hint) and "--pattern 2:4" in str(refused.value.hint)


@pytest.mark.thorough
def test_a_model_that_leaves_float16s_range_is_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = load(tiny_checkpoint, "distilbert")
    block = checkpoint.module.get_submodule("encoder.transformer.layer.1.ffn")
    with torch.no_grad():
        block.lin1.weight.mul_(2_000)
        block.lin2.weight.mul_(2_000)
    with pytest.raises(ExportMismatch, match=r"encoder\.transformer\.layer\.1.* overflows float16") as refused:
        export(checkpoint, tmp_path / "kit")
    assert "bf16" in str(refused.value.hint)
    assert export(checkpoint, tmp_path / "bf16", precision="bf16").program.outputs[0].dtype == "float"
    with pytest.raises(ExportMismatch, match="overflows float16") as refused:
        export(checkpoint, tmp_path / "int8", precision="int8")
    assert "rest=fp32" in str(refused.value.hint)


def test_a_bf16_kit_runs_as_its_float32_twin(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    kit = export(load(tiny_checkpoint, "bert"), tmp_path / "kit", precision="bf16")
    runner = TensorRTBackend().load(kit.folder, kit.manifest)
    assert "bfloat16" in runner.properties["arithmetic"]
    with torch.inference_mode():
        parity = check_parity(runner, kit.checkpoint.run, probe_batches(kit.checkpoint, SHAPES), "bf16")
    assert parity.passed, parity.rows
    assert not parity.passed or audit_weights(kit.checkpoint.module, kit.weights()).passed


@pytest.mark.parametrize(
    ("precision", "rest"),
    [
        ("int8", "fp16"),
        pytest.param("int8", "fp32", marks=THOROUGH),
        pytest.param("fp8", "fp16", marks=THOROUGH),
        ("fp8", "fp32"),
    ],
)
def test_a_quantised_kit_is_symmetric_and_quantises_products_with_weights_only(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, precision: str, rest: str
) -> None:
    kit = export(load(tiny_checkpoint, "bert"), tmp_path / "kit", precision=precision, options={"rest": rest})
    onnx.checker.check_model(str(kit.folder / "model.onnx"), full_check=True)
    stored = {"int8": onnx_ir.DataType.INT8, "fp8": onnx_ir.DataType.FLOAT8E4M3FN}[precision]
    around = {"fp16": onnx_ir.DataType.FLOAT16, "fp32": onnx_ir.DataType.FLOAT}[rest]
    products = [node for node in kit.graph if node.op_type == "MatMul"]
    quantised = [node for node in products if node.inputs[1].producer().op_type == "DequantizeLinear"]
    assert len(products) == 16 and len(quantised) == 12  # attention's own four products have no weight
    for node in kit.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero_point = (node.inputs[position].const_value for position in (1, 2))
            assert zero_point.dtype == stored and not zero_point.numpy().astype(np.float32).any()
            assert scale.dtype == around and (scale.numpy() > 0).all()
    dequantised = [node.inputs[1].producer() for node in quantised]
    assert {node.inputs[0].const_value.dtype for node in dequantised} == {stored}
    ranks = {len(node.inputs[1].const_value.shape) for node in dequantised}
    assert ranks == ({1} if precision == "int8" else {0})  # a scale a channel; one a tensor
    with torch.inference_mode():
        parity = check_parity(
            TensorRTBackend().load(kit.folder, kit.manifest),
            kit.checkpoint.run,
            probe_batches(kit.checkpoint, SHAPES),
            kit.settings.precision,
        )
    assert parity.passed, parity.rows
    assert min(float(row["cosine"]) for row in parity.rows) > 0.99
    audit = audit_weights(kit.checkpoint.module, kit.weights())
    assert audit.passed and not audit.rows, audit.rows
    assert ("float16 range" in kit.program.evidence) == (rest == "fp16")
    assert kit.program.compile_properties["where not quantised"] == rest


def test_float8_reaches_the_largest_weight_and_rounds_each_to_four_bits(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = load(tiny_checkpoint, "distilbert")
    weight = checkpoint.module.get_submodule("encoder.transformer.layer.0.ffn.lin1").weight
    with torch.no_grad():
        weight[3, 5] = 25 * weight.std()  # far beyond what ONNX Runtime's own float8 scale would hold
    kit = export(checkpoint, tmp_path / "kit", precision="fp8")
    found = next(found for found in kit.weights() if found.name.endswith("layer.0.ffn.lin1.weight"))
    expected = weight.detach().numpy()
    assert found.values[3, 5] == pytest.approx(expected[3, 5], rel=2e-3)
    large = np.abs(expected) > 2.0**-6 * np.abs(expected).max() / 448
    relative = np.abs(found.values - expected)[large] / np.abs(expected)[large]
    assert 0.01 < relative.max() < 1 / 15  # float8 and no finer, float8 and no coarser


@pytest.mark.thorough
def test_the_audit_sees_a_float8_weight_that_is_a_step_away(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    kit = export(load(tiny_checkpoint, "distilbert"), tmp_path / "kit", precision="fp8")
    model = onnx_ir.load(str(kit.folder / "model.onnx"))
    name = next(name for name in model.graph.initializers if name.endswith("lin1.weight.T_quantized"))
    value = model.graph.initializers[name]
    codes = value.const_value.numpy().copy()
    codes.view(np.uint8)[0, 0] ^= 0b11  # one or three steps within the same power of two
    value.const_value = onnx_ir.Tensor(codes, name=name)
    onnx_ir.save(model, str(tmp_path / "model.onnx"), external_data="model.onnx.data")
    audit = audit_weights(kit.checkpoint.module, read_weights(tmp_path / "model.onnx"))
    assert not audit.passed and "lin1.weight" in audit.detail


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_sparse_kit_keeps_its_pattern(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    checkpoint = load(tiny_checkpoint, "bert")
    pruned = replace(checkpoint, model=prune_semi_structured(checkpoint).model)
    kit = export(pruned, tmp_path / "kit", precision=precision, sparsity="2:4")
    eligible = [layer for layer in kit.program.sparse_layers if layer.eligible]
    assert len(eligible) == 12 and all(layer.pattern for layer in eligible)
    assert BuildPlan.load(kit.folder).flags == ["SPARSE_WEIGHTS"]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantising_without_calibration_data_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    settings = ExportSettings.model_validate({"backend": "tensorrt", "precision": precision})
    with pytest.raises(InputError, match=f"{precision} export needs real inputs"):
        TensorRTBackend().export(ExportJob(load(tiny_checkpoint, "bert"), settings), tmp_path)


@pytest.mark.thorough
def test_a_tf32_kit_is_the_float32_graph_with_a_flag(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    kit = export(load(tiny_checkpoint, "bert"), tmp_path / "kit", precision="tf32")
    assert BuildPlan.load(kit.folder).flags == ["TF32"]
    floats = {value.const_value.dtype for value in kit.graph.initializers.values()} - {onnx_ir.DataType.INT64}
    assert onnx_ir.DataType.FLOAT in floats and onnx_ir.DataType.FLOAT16 not in floats
    with torch.inference_mode():
        parity = check_parity(
            TensorRTBackend().load(kit.folder, kit.manifest),
            kit.checkpoint.run,
            probe_batches(kit.checkpoint, SHAPES),
            "fp32",
        )
    assert parity.passed, parity.rows


def test_plain_transformers_users_need_one_import(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_checkpoint("distilbert")).eval()
    inputs = {"input_ids": torch.randint(5, 100, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    axes = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("sequence", min=1, max=48)}
    config = TensorRTConfig(precision="fp16", dynamic_shapes=dict.fromkeys(inputs, axes))
    exported = AutoHfExporter.from_config(config).export(model, inputs, config)
    exported.save_pretrained(tmp_path)
    batch = {"input_ids": torch.randint(5, 100, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    with torch.inference_mode():
        expected = model(**batch).last_hidden_state.numpy()
    found = OnnxRunner(tmp_path / "model.onnx", threads=1)(batch)["last_hidden_state"]
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp8"},
        {"precision": "int4-weight-only"},
        {"precision": "int8"},
        {"ort_fusions": "cpu"},
        {"quantizer": object()},
    ],
)
def test_settings_that_tensorrt_cannot_read_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        TensorRTConfig(**settings)


@pytest.mark.thorough
def test_another_exporter_of_that_name_keeps_its_place() -> None:
    code = (
        "from transformers.exporters import OnnxConfig, OnnxExporter\n"
        "from transformers.exporters.auto import EXPORT_BACKENDS, register_backend\n"
        "theirs = type('Theirs', (OnnxExporter,), {'export_format': 'tensorrt'})\n"
        "register_backend(theirs)\n"
        "from limbeck.exporters.tensorrt import TensorRTExporter\n"
        "assert EXPORT_BACKENDS['tensorrt'].exporter is theirs\n"
        "assert EXPORT_BACKENDS['limbeck-tensorrt'].exporter is TensorRTExporter\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_exporter_is_a_transformers_exporter() -> None:
    assert EXPORT_BACKENDS["tensorrt"].exporter is TensorRTExporter
    assert TensorRTExporter.config_class is TensorRTConfig
