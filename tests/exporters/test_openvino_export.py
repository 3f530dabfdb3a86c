"""OpenVINO exports of tiny models: what is right passes the checks, and every planted defect fails them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch

from limbeck.backends.base import ExportJob
from limbeck.backends.openvino import OpenVINOBackend, OpenVINORunner
from limbeck.environment import cpu_facts
from limbeck.errors import InputError
from limbeck.exporters.inputs import probe_batch, probe_batches
from limbeck.exporters.openvino import (
    COMPILE_PROPERTIES,
    GRAPH_FILE,
    compiled,
    export_graph,
    quantize_int8,
    quantize_to_floor,
    read_weights,
    run_of,
)
from limbeck.exporters.program import ExportedProgram, Floor
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.validate.proofs.parity import check_parity
from limbeck.validate.proofs.weight_audit import audit_weights

TinyCheckpoint = Callable[..., Path]
SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=64, opt_sequence=16)
PROBES = ["1 x 1", "1 x 7", "3 x 13", "5 x 24, padded", "1 x 64"]

# family, task, precision, a weight to break; the other families are exported in test_onnx_export.py.
EXPORTS = [
    ("bert", "sentence-similarity", "int8", "encoder.encoder.layer.1.attention.output.dense.weight"),
    ("distilbert", "token-classification", "fp32", "distilbert.transformer.layer.1.attention.out_lin.weight"),
    ("gpt2", "text-generation", "fp16", "transformer.h.1.attn.c_proj.weight"),
]


def settings_for(precision: str) -> ExportSettings:
    return ExportSettings.model_validate({"backend": "openvino", "precision": precision, "shapes": SMALL})


@dataclasses.dataclass
class Export:
    checkpoint: Checkpoint
    precision: Any
    folder: Path
    program: ExportedProgram

    def audit(self, folder: Path | None = None) -> Any:
        module = self.checkpoint.module
        weights = read_weights((folder or self.folder) / GRAPH_FILE, module)
        return audit_weights(module, weights, corrected=self.precision == "int8")


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Export]:
    made: dict[tuple[str, str, str], Export] = {}

    def make(family: str, task: str, precision: str) -> Export:
        key = family, task, precision
        if key not in made:
            checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task=task)
            folder = tmp_path_factory.mktemp("openvino")
            calibration = [probe_batch(checkpoint, 1, length) for length in (1, 2, 3, 5, 7, 9, 14, 24, 40, 64)]
            job = ExportJob(checkpoint, settings_for(precision), calibration)
            made[key] = Export(checkpoint, precision, folder, OpenVINOBackend().export(job, folder))
        return made[key]

    return make


every_export = pytest.mark.parametrize(
    ("family", "task", "precision", "name"), [*EXPORTS[:2], pytest.param(*EXPORTS[2], marks=pytest.mark.thorough)]
)


@every_export
def test_an_export_computes_what_its_checkpoint_computes(
    exported: Callable[..., Export], family: str, task: str, precision: str, name: str
) -> None:
    export = exported(family, task, precision)
    runner = OpenVINORunner(export.folder / GRAPH_FILE, export.program.compile_properties, threads=1)
    assert runner.properties["threads"] == "1"
    probes = probe_batches(export.checkpoint, SMALL)
    parity = check_parity(runner, export.checkpoint.run, probes, export.precision)
    assert parity.passed, parity.detail
    assert [row["shape"] for row in parity.rows] == PROBES
    audit = export.audit()
    assert audit.passed, audit.detail
    places = ["position_ids"] * (export.program.cache is not None)
    assert sorted(spec.name for spec in export.program.inputs) == sorted([*export.checkpoint.input_names, *places])
    assert all(spec.shape == [None, None] for spec in export.program.inputs)
    assert [spec.name for spec in export.program.outputs] == [export.checkpoint.task.output]


@every_export
def test_every_matrix_is_found_under_its_parameters_name(
    exported: Callable[..., Export], family: str, task: str, precision: str, name: str
) -> None:
    export = exported(family, task, precision)
    matrices = {name for name, value in export.checkpoint.module.named_parameters() if value.ndim == 2}
    found = {weight.name: weight for weight in read_weights(export.folder / GRAPH_FILE, export.checkpoint.module)}
    assert matrices <= set(found)
    assert name in found
    stored = {operation.get_element_type().get_type_name() for operation in constants(export.folder)}
    assert {"fp32": "f32", "fp16": "f16", "int8": "i8"}[precision] in stored
    rounding = np.max(found[name].step)
    assert (rounding > 0) == (precision != "fp32")
    assert rounding <= np.abs(found[name].values).max() / 100


def constants(folder: Path) -> list[Any]:
    """The stored matrices of a written graph."""
    model = openvino.Core().read_model(str(folder / GRAPH_FILE))
    operations = [operation for operation in model.get_ordered_ops() if operation.get_type_name() == "Constant"]
    return [operation for operation in operations if len(operation.data.shape) == 2 and min(operation.data.shape) > 1]


@every_export
def test_one_zeroed_head_is_found_and_named(
    exported: Callable[..., Export], tmp_path: Path, family: str, task: str, precision: str, name: str
) -> None:
    export = exported(family, task, precision)
    (audited,) = [w for w in read_weights(export.folder / GRAPH_FILE, export.checkpoint.module) if w.name == name]
    folder = Path(shutil.copytree(export.folder, tmp_path / "copy"))
    weights = folder / GRAPH_FILE.replace(".xml", ".bin")
    stored = bytearray(weights.read_bytes())
    (constant,) = [
        operation
        for operation in constants(export.folder)
        if operation.data.size == audited.values.size and holds(operation.data, audited.values)
    ]
    values = np.array(constant.data)
    place = bytes(stored).find(values.tobytes())
    assert place >= 0 and bytes(stored).find(values.tobytes(), place + 1) < 0
    values[8:16] = 0  # the second of four heads
    stored[place : place + values.nbytes] = values.tobytes()
    weights.write_bytes(bytes(stored))
    audit = export.audit(folder)
    assert not audit.passed
    assert audit.detail.startswith(name) and "(1 weights are wrong)" in audit.detail


def holds(stored: np.ndarray, values: np.ndarray) -> bool:
    """Whether a stored matrix is these values, up to a scale for each channel and a transposition."""
    candidates = [values, values.T] if values.shape[0] == values.shape[1] else [values.reshape(stored.shape)]
    return any(abs(np.corrcoef(stored.astype(float).ravel(), one.ravel())[0, 1]) > 0.9 for one in candidates)


@pytest.mark.parametrize(("family", "task", "precision", "name"), EXPORTS[:2])
def test_a_checkpoint_that_changed_after_the_export_is_found(
    exported: Callable[..., Export], family: str, task: str, precision: str, name: str
) -> None:
    export = exported(family, task, precision)
    changed = load_checkpoint(export.checkpoint.source, task=task)
    with torch.no_grad():
        weight = changed.module.get_parameter(name)
        weight[3, 5] += 0.05 * weight.abs().max()
    stale = dataclasses.replace(export, checkpoint=changed)
    audit = stale.audit()
    assert not audit.passed
    assert audit.detail.startswith(name) and "(1 weights are wrong)" in audit.detail


def test_a_graph_of_fixed_shape_is_found(exported: Callable[..., Export], tmp_path: Path) -> None:
    export = exported(*EXPORTS[1][:3])
    model = openvino.Core().read_model(str(export.folder / GRAPH_FILE))
    model.reshape({name: [2, 16] for name in export.checkpoint.input_names})
    openvino.save_model(model, tmp_path / GRAPH_FILE, compress_to_fp16=False)
    runner = OpenVINORunner(tmp_path / GRAPH_FILE, COMPILE_PROPERTIES["fp32"], threads=1)
    parity = check_parity(runner, export.checkpoint.run, probe_batches(export.checkpoint, SMALL), "fp32")
    assert [row["shape"] for row in parity.rows if not row["passed"]] == PROBES
    assert "logits" in parity.detail and "does not take inputs of shape" in parity.detail
    traced = [("2 x 16", probe_batch(export.checkpoint, 2, 16, padded=True))]
    assert check_parity(runner, export.checkpoint.run, traced, "fp32").passed
    with pytest.raises(InputError, match=r"does not take inputs of shape \(1, 7\)"):
        runner(probe_batch(export.checkpoint, 1, 7))


def test_a_precision_is_what_the_runtime_was_told_and_says(exported: Callable[..., Export]) -> None:
    export = exported(*EXPORTS[1][:3])
    told = {}
    for precision in ("fp32", "bf16", "native"):
        runner = OpenVINORunner(export.folder / GRAPH_FILE, COMPILE_PROPERTIES[precision], threads=1)
        told[precision] = runner.properties["INFERENCE_PRECISION_HINT"]
    assert told["fp32"] == "f32"
    assert told["native"] in ("f32", "bf16", "f16")
    multiplies_bf16 = {"avx512_bf16", "amx_bf16"} & set(cpu_facts()["instruction_sets"])
    assert told["bf16"] == ("bf16" if multiplies_bf16 else "f32")  # elsewhere the plug-in falls back, and says so


def test_the_prepared_call_computes_the_batch_that_it_was_given(exported: Callable[..., Export]) -> None:
    export = exported(*EXPORTS[1][:3])
    runner = OpenVINORunner(export.folder / GRAPH_FILE, COMPILE_PROPERTIES["fp32"], threads=1)
    batch = probe_batch(export.checkpoint, 2, 7)
    (found,) = runner.prepare(batch)().values()  # type: ignore[attr-defined]
    np.testing.assert_allclose(found, export.checkpoint.run(batch)["logits"], atol=1e-4)


@pytest.mark.thorough
def test_accuracy_control_puts_back_what_int8_costs(tiny_checkpoint: TinyCheckpoint) -> None:
    """One channel carries what int8 of the whole row cannot hold; putting everything back would be no answer either."""
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    layer = checkpoint.model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[5] *= 30_000
        layer.output.dense.weight[:, 5] /= 30_000
    calibration = [probe_batch(checkpoint, 1, length) for length in range(2, 60, 6)]
    expected = [checkpoint.run(batch)["logits"] for batch in calibration]

    def nearness(run: Any) -> float:
        found = [run(batch)["logits"] for batch in calibration]
        return -float(np.mean([np.mean((a - b) ** 2) for a, b in zip(found, expected, strict=True)]))

    exported = export_graph(checkpoint, settings_for("int8"))
    whole = exported.program.clone()
    quantize_int8(exported, calibration)
    lost = nearness(run_of(compiled(exported.program)))
    exported.components["model"].program = whole
    told = quantize_to_floor(exported, calibration, Floor("nearness", lost / 10, nearness))
    assert nearness(run_of(compiled(exported.program))) >= lost / 10
    products = {name for name, part in checkpoint.module.named_modules() if isinstance(part, torch.nn.Linear)}
    assert set() < set(told["float again"]) < products
