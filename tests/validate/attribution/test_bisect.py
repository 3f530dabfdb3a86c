"""Defects planted in one module of a written program: bisect names that module first. The compilers are the real ones;
what is changed are the files that they read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch

from limbeck.exporters.artifact import open_artifact, seal
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import load_checkpoint
from limbeck.models.module_outputs import module_outputs
from limbeck.recipes.bisection import bisect
from limbeck.recipes.exporting import export
from limbeck.validate.records.bisection import Bisection

TinyCheckpoint = Callable[..., Path]
Exported = Callable[..., Path]
SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=48, opt_sequence=16)
LAYER = "encoder.encoder.layer.1"
THOROUGH = pytest.mark.thorough


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"text": text} for text in texts])


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: TinyCheckpoint, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported("onnx", "fp32")`: an artifact of a tiny model, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def make(backend: str, precision: str, family: str = "bert", task: str = "sentence-similarity") -> Path:
        key = backend, precision, family
        if key not in made:
            checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task)
            settings = ExportSettings(backend=backend, precision=precision, shapes=SMALL)
            made[key] = tmp_path_factory.mktemp("artifacts") / "-".join(key)
            calibration = checkpoint.read(rows)
            export(checkpoint, settings, made[key], calibration=calibration, beside_float=False)
        return made[key]

    return make


def with_defect(artifact: Path, folder: Path, plant: Callable[[Path], None]) -> Path:
    """A copy whose manifest lists the files as they are now: integrity gives nothing away."""
    shutil.copytree(artifact, folder)
    plant(folder)
    (folder / "manifest.json").unlink()
    seal(open_artifact(artifact), folder)
    return folder


def replaced(old: str, new: str, which: int) -> Callable[[Path], None]:
    """Another attribute for one of the IR's operations, counted from 0."""

    def plant(folder: Path) -> None:
        file = folder / "openvino_model.xml"
        parts = file.read_text().split(old)
        file.write_text(old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :]))

    return plant


def in_graph(change: Callable[[onnx_ir.Graph], None]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        model = onnx_ir.load(str(folder / "model.onnx"))
        for value in model.graph.initializers.values():  # read before the file is written over
            value.const_value = onnx_ir.Tensor(value.const_value.numpy().copy(), name=value.name)
        change(model.graph)
        onnx_ir.save(model, str(folder / "model.onnx"), external_data="model.onnx.data")

    return plant


def large_epsilon(graph: onnx_ir.Graph) -> None:
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    norms[3].attributes["epsilon"] = onnx_ir.AttrFloat32("epsilon", 1e-2)


def tanh_gelu(graph: onnx_ir.Graph) -> None:
    gelu = [node for node in graph if node.op_type == "Gelu"][1]
    gelu.attributes["approximate"] = onnx_ir.AttrString("approximate", "tanh")


def other_weight(graph: onnx_ir.Graph) -> None:
    value = graph.initializers[f"{LAYER}.attention.self.key.weight.T"]
    changed = value.const_value.numpy() * np.where(np.arange(32) < 8, 0, 1)  # one head of four
    value.const_value = onnx_ir.Tensor(changed.astype("float32"), name=value.name)


DEFECTS = {
    "onnx: epsilon of a norm": ("onnx", in_graph(large_epsilon), f"{LAYER}.attention.output.LayerNorm"),
    "onnx: tanh for erf": ("onnx", in_graph(tanh_gelu), f"{LAYER}.intermediate.intermediate_act_fn"),
    "onnx: a head of zeros": ("onnx", in_graph(other_weight), f"{LAYER}.attention.self.key"),
    "openvino: epsilon of a norm": (
        "openvino", replaced('eps="9.999999', 'eps="1e-2" was="', 3), f"{LAYER}.attention.output.LayerNorm",
    ),
    "openvino: tanh for erf": (
        "openvino", replaced('approximation_mode="ERF"', 'approximation_mode="TANH"', 1),
        f"{LAYER}.intermediate.intermediate_act_fn",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "defect", [pytest.param(name, marks=[THOROUGH] * name.startswith("openvino")) for name in DEFECTS]
)
def test_the_module_with_a_defect_is_named_first(defect: str, exported: Exported, rows: Path, tmp_path: Path) -> None:
    backend, plant, module = DEFECTS[defect]
    artifact = with_defect(exported(backend, "fp32"), tmp_path / "artifact", plant)
    found = bisect(artifact, str(rows), {}, samples=16)
    graph, program = found.steps
    assert graph.first is None
    assert program.first is not None and program.first.module == module
    assert not any(item.beyond for item in program.modules[: program.modules.index(program.first)])


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("onnx", "fp32"),
        pytest.param("onnx", "fp16", marks=THOROUGH),
        ("onnx", "int8"),
        pytest.param("openvino", "bf16", marks=THOROUGH),
        pytest.param("openvino", "int8", marks=THOROUGH),
        pytest.param("tensorrt", "fp16", marks=THOROUGH),
    ],
)
def test_a_sound_program_shows_every_module_and_none_is_named(
    backend: str, precision: str, exported: Exported, rows: Path
) -> None:
    found = bisect(exported(backend, precision), str(rows), {}, samples=16)
    for step in found.steps:
        names = [module.module for module in step.modules]
        assert step.first is None, step.first
        assert f"{LAYER}.output.LayerNorm" in names and names[-1] == "sentence_embedding"
        assert not step.not_visible
    assert found.tokens > found.rows == 16
    exact = max(module.error for module in found.steps[1].modules) < 1e-5
    assert exact == (precision == "fp32")


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_decoder_shows_its_layers(backend: str, exported: Exported, rows: Path) -> None:
    found = bisect(exported(backend, "fp32", "llama", "text-generation"), str(rows), {}, samples=8)
    for step in found.steps:
        names = [module.module for module in step.modules]
        wanted = {
            "model.layers.1",
            "model.layers.0.input_layernorm",
            "model.layers.1.mlp.act_fn",
            "model.norm",
            "logits",
        }
        assert wanted <= set(names) and step.first is None and not step.not_visible


def test_an_answer_is_kept_as_it_is(exported: Exported, rows: Path) -> None:
    found = bisect(exported("onnx", "fp32"), str(rows), {}, samples=8)
    assert Bisection.model_validate_json(found.model_dump_json()) == found


def test_modules_are_listed_once_under_the_one_that_made_the_tensor() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.ReLU())
    shared = torch.nn.Sequential(layer, layer[2], torch.nn.Sequential(torch.nn.Linear(4, 2))).eval()
    with module_outputs(shared) as outputs:
        shared(torch.randn(3, 4))
    assert list(outputs.tensors) == ["0.0", "2.0"]  # 0.2 ran twice, and 0 and 2 handed on what was made inside them
    assert outputs.sources == {"2.0": "0.2"} or "2.0" not in outputs.sources
