"""ONNX exports of tiny models: what is right passes the checks, and every planted defect fails them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from limbeck.backends.base import ExportJob
from limbeck.backends.onnx import OnnxBackend, OnnxRunner
from limbeck.backends.registry import backend_of_format, get_backend, load_runner
from limbeck.errors import ExportMismatch, InputError, IntegrityError, UsageError
from limbeck.exporters.artifact import MANIFEST_FILE, Manifest, open_artifact, read_manifest, seal
from limbeck.exporters.inputs import probe_batch, probe_batches, sample_inputs
from limbeck.exporters.onnx import GRAPH_FILE, name_weights, quiet_exporters, read_weights
from limbeck.exporters.options import OPSET
from limbeck.exporters.program import ExportedProgram
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.recipes.steps import export
from limbeck.validate.proofs.parity import check_parity
from limbeck.validate.proofs.weight_audit import audit_weights

TinyCheckpoint = Callable[..., Path]
SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=64, opt_sequence=16)

# family, task, precision; the other families are exported in test_openvino_export.py.
EXPORTS = [
    ("roberta", "text-classification", "fp16"),
    ("mpnet", "sentence-similarity", "int8"),
    ("llama", "text-generation", "fp32"),
]


def settings_for(precision: str) -> ExportSettings:
    return ExportSettings.model_validate({"backend": "onnx", "precision": precision, "shapes": SMALL})


def calibration_of(checkpoint: Checkpoint) -> list[dict[str, torch.Tensor]]:
    return [probe_batch(checkpoint, 1, length) for length in (1, 2, 3, 5, 7, 9, 14, 24, 40, 64)]


@dataclasses.dataclass
class Export:
    checkpoint: Checkpoint
    precision: Any
    folder: Path
    program: ExportedProgram

    def audit(self, folder: Path | None = None, checkpoint: Checkpoint | None = None) -> Any:
        weights = read_weights((folder or self.folder) / GRAPH_FILE)
        module = (checkpoint or self.checkpoint).module
        return audit_weights(module, weights)

    def copy_to(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder, folder))


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Export]:
    made: dict[tuple[str, str, str], Export] = {}

    def make(family: str, task: str, precision: str) -> Export:
        key = family, task, precision
        if key not in made:
            checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task=task)
            folder = tmp_path_factory.mktemp("onnx")
            job = ExportJob(checkpoint, settings_for(precision), calibration_of(checkpoint))
            made[key] = Export(checkpoint, precision, folder, OnnxBackend().export(job, folder))
        return made[key]

    return make


every_export = pytest.mark.parametrize(
    ("family", "task", "precision"), [*EXPORTS[:2], pytest.param(*EXPORTS[2], marks=pytest.mark.thorough)]
)


@every_export
def test_an_export_computes_what_its_checkpoint_computes(
    exported: Callable[..., Export], family: str, task: str, precision: str
) -> None:
    export = exported(family, task, precision)
    onnx.checker.check_model(str(export.folder / GRAPH_FILE), full_check=True)
    runner = OnnxRunner(export.folder / GRAPH_FILE, threads=1)
    parity = check_parity(runner, export.checkpoint.run, probe_batches(export.checkpoint, SMALL), export.precision)
    assert parity.passed, parity.detail
    assert [row["shape"] for row in parity.rows] == ["1 x 1", "1 x 7", "3 x 13", "5 x 24, padded", "1 x 64"]
    audit = export.audit()
    assert audit.passed, audit.detail
    places = ["position_ids"] * (export.program.cache is not None)
    assert [spec.name for spec in export.program.inputs] == [*export.checkpoint.input_names, *places]
    assert all(spec.shape == [None, None] and spec.dtype == "int64" for spec in export.program.inputs)
    assert [spec.name for spec in export.program.outputs] == [export.checkpoint.task.output]


def test_int8_does_not_round_what_a_product_hands_on(exported: Callable[..., Export]) -> None:
    export = exported(*EXPORTS[1])
    graph = onnx.load(export.folder / GRAPH_FILE).graph
    products = {name for node in graph.node if node.op_type in ("MatMul", "Gemm") for name in node.output}
    rounded = {name for node in graph.node if node.op_type == "QuantizeLinear" for name in node.input}
    assert products and rounded and not products & rounded


@every_export
def test_weights_bear_their_parameters_names(
    exported: Callable[..., Export], family: str, task: str, precision: str
) -> None:
    export = exported(family, task, precision)
    parameters = {name for name, value in export.checkpoint.module.named_parameters() if value.ndim == 2}
    graph = onnx.load(export.folder / GRAPH_FILE).graph
    matrices = {value.name for value in graph.initializer if len(value.dims) == 2 and min(value.dims) > 1}
    names = {name.removesuffix("_quantized").removesuffix(".T") for name in matrices}
    assert names == parameters
    assert {weight.name for weight in read_weights(export.folder / GRAPH_FILE)} >= parameters


@every_export
def test_one_zeroed_head_is_found_and_named(
    exported: Callable[..., Export], tmp_path: Path, family: str, task: str, precision: str
) -> None:
    export = exported(family, task, precision)
    folder = export.copy_to(tmp_path / "copy")
    layers = {"gpt2": "attn.c_proj", "llama": "o_proj", "distilbert": "out_lin", "mpnet": "attn.o"}
    wanted = layers.get(family, "attention.output.dense") + ".weight"
    model = onnx.load(folder / GRAPH_FILE)
    (tensor, *_) = [value for value in model.graph.initializer if wanted in value.name and len(value.dims) == 2]
    values = numpy_helper.to_array(tensor).copy()
    # The second head's 8 of 32 input channels, which stand first in [in, out] as MatMul has it.
    rows = values if tensor.name.removesuffix("_quantized").endswith(".T") or family == "gpt2" else values.T
    rows[8:16] = 0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / GRAPH_FILE)
    audit = export.audit(folder)
    assert not audit.passed
    assert wanted in audit.detail and "(1 weights are wrong)" in audit.detail
    assert "in 25.0% of it" in audit.detail or precision == "int8"  # int8 rounds some weights to zero by itself


@pytest.mark.parametrize(("family", "task", "precision"), EXPORTS[:2])
def test_a_checkpoint_that_changed_after_the_export_is_found(
    exported: Callable[..., Export], family: str, task: str, precision: str
) -> None:
    export = exported(family, task, precision)
    changed = load_checkpoint(export.checkpoint.source, task=task)
    name = "encoder.layer.1.output.dense.weight"
    with torch.no_grad():
        weight = changed.model.base_model.get_parameter(name)
        weight[3, 5] += 0.05 * weight.abs().max()
    audit = export.audit(checkpoint=changed)
    assert not audit.passed
    assert name in audit.detail and "(1 weights are wrong)" in audit.detail
    # What the program lacks altogether is named too.
    lacking = [weight for weight in read_weights(export.folder / GRAPH_FILE) if not weight.name.endswith(name)]
    missing = audit_weights(export.checkpoint.module, lacking)
    assert not missing.passed and f"{name}: not in the program" in missing.detail


def traced(checkpoint: Checkpoint, module: torch.nn.Module, folder: Path, dynamic: Any) -> OnnxRunner:
    """A graph of `module`, made with the exporter's own settings instead of ours."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    config = OnnxConfig(opset_version=OPSET, dynamic_shapes=dynamic)
    with quiet_exporters():
        exported = OnnxExporter().export(module, sample_inputs(checkpoint, SMALL), config)
    name_weights(exported.program, checkpoint.module)
    exported.save_pretrained(folder)
    return OnnxRunner(folder / GRAPH_FILE, threads=1)


@pytest.mark.parametrize("fixed", ["batch", "both"])
def test_an_axis_that_was_baked_in_is_found(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, fixed: str) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    sequence = torch.export.Dim("sequence", min=1, max=64)
    dynamic = {name: {1: sequence} for name in checkpoint.input_names} if fixed == "batch" else None
    runner = traced(checkpoint, checkpoint.module, tmp_path, dynamic)
    parity = check_parity(runner, checkpoint.run, probe_batches(checkpoint, SMALL), "fp32")
    assert not parity.passed
    refused = {row["shape"] for row in parity.rows if not row["passed"]}
    assert refused == {"1 x 1", "1 x 7", "3 x 13", "5 x 24, padded", "1 x 64"}
    assert "sentence_embedding" in parity.detail and "does not take inputs of shape" in parity.detail
    same_batch = [("2 x 16", probe_batch(checkpoint, 2, 16, padded=True))]
    assert check_parity(runner, checkpoint.run, same_batch, "fp32").passed  # at the traced shape nothing shows


class WithoutMask(torch.nn.Module):
    """A model that looks at padding too."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.inner = module
        self.config = module.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> Any:
        return self.inner(input_ids, attention_mask | 1, **inputs)


def test_a_dropped_attention_mask_is_found(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("mpnet"))
    batch, sequence = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("sequence", min=1, max=64)
    dynamic = {name: {0: batch, 1: sequence} for name in checkpoint.input_names}
    runner = traced(checkpoint, WithoutMask(checkpoint.module), tmp_path, dynamic)
    parity = check_parity(runner, checkpoint.run, probe_batches(checkpoint, SMALL), "fp32")
    assert [row["shape"] for row in parity.rows if not row["passed"]] == ["5 x 24, padded"]
    assert "sentence_embedding at 5 x 24, padded" in parity.detail


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_int8_needs_calibration_data(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, backend: str) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    settings = ExportSettings(backend=backend, precision="int8", shapes=SMALL)
    with pytest.raises(InputError, match="calibrate") as caught:
        export(checkpoint, settings, tmp_path / "out")
    assert "--calibration" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


# The artifact folder.


@pytest.fixture(scope="module")
def sealed(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("artifact") / "out"
    return folder, export(load_checkpoint(tiny_checkpoint("bert")), settings_for("fp32"), folder)


@pytest.fixture
def artifact(sealed: tuple[Path, Manifest], tmp_path: Path) -> Path:
    """An artifact of its own, to be broken."""
    return Path(shutil.copytree(sealed[0], tmp_path / "artifact"))


def edit(artifact: Path, **changes: Any) -> None:
    value = json.loads((artifact / MANIFEST_FILE).read_text())
    (artifact / MANIFEST_FILE).write_text(json.dumps({**value, **changes}))


def test_an_artifact_opens_wherever_it_lies(
    artifact: Path, sealed: tuple[Path, Manifest], tiny_checkpoint: TinyCheckpoint
) -> None:
    manifest = sealed[1]
    assert manifest.parent_hash == load_checkpoint(tiny_checkpoint("bert")).hash
    assert open_artifact(artifact) == manifest
    assert set(manifest.files) == {p.relative_to(artifact).as_posix() for p in artifact.rglob("*") if p.is_file()} - {
        MANIFEST_FILE
    }
    assert {"tokenizer.json", "modules.json", GRAPH_FILE} <= set(manifest.files)
    assert [check.name for check in manifest.checks] == ["parity", "weight audit"]
    assert all(check.passed for check in manifest.checks)
    runner, _ = load_runner(artifact, threads=1)
    assert runner.properties["threads"] == "1"


def test_the_artifact_id_is_that_of_its_payload(artifact: Path, sealed: tuple[Path, Manifest]) -> None:
    manifest = sealed[1]
    elsewhere = manifest.model_copy(update={"created": "2001-01-01", "cpu": {}, "versions": {}, "artifact_id": ""})
    assert seal(elsewhere, artifact).artifact_id == manifest.artifact_id  # no times, no device
    flip_a_byte(artifact)
    assert seal(elsewhere, artifact).artifact_id != manifest.artifact_id
    assert open_artifact(artifact).created == "2001-01-01"  # sealed anew, it is whole again


def flip_a_byte(artifact: Path) -> None:
    data = bytearray((artifact / GRAPH_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / GRAPH_FILE).write_bytes(bytes(data))


def other_hashes(artifact: Path) -> None:
    """A changed file with its hash changed along: only the artifact's id tells."""
    import hashlib

    flip_a_byte(artifact)
    files = json.loads((artifact / MANIFEST_FILE).read_text())["files"]
    edit(artifact, files={**files, GRAPH_FILE: hashlib.sha256((artifact / GRAPH_FILE).read_bytes()).hexdigest()})


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte changed": (flip_a_byte, r"model\.onnx is not the file that was exported: its SHA-256 differs"),
    "a file and its hash changed": (other_hashes, "artifact id"),
    "a file missing": (lambda folder: (folder / "tokenizer.json").unlink(), r"lacks tokenizer\.json"),
    "a file added": (
        lambda folder: (folder / "extra.py").touch(),
        r"holds extra\.py, which its manifest does not list",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_artifact_is_not_opened(case: str, artifact: Path) -> None:
    damage, said = TAMPERED[case]
    damage(artifact)
    with pytest.raises(IntegrityError, match=said) as caught:
        open_artifact(artifact)
    assert caught.value.exit_code == 4
    with pytest.raises(IntegrityError):
        load_runner(artifact)


MALFORMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer schema": (lambda folder: edit(folder, schema_version=2), "schema version 2; this limbeck reads up to 1"),
    "path out of the folder": (lambda folder: edit(folder, files={"../x": "0"}), r"'\.\./x' points outside"),
    "absolute path": (lambda folder: edit(folder, files={"/etc/hostname": "0"}), "points outside"),
    "wrong type": (lambda folder: edit(folder, task=3), "not a valid manifest: task:"),
    "unknown key": (lambda folder: edit(folder, color="red"), "not a valid manifest: color:"),
    "a list": (lambda folder: (folder / MANIFEST_FILE).write_text("[]"), "not a valid manifest"),
    "not JSON": (lambda folder: (folder / MANIFEST_FILE).write_text("{"), "is not valid JSON"),
    "no manifest": (lambda folder: (folder / MANIFEST_FILE).unlink(), "is not a limbeck artifact"),
    "unknown format": (lambda folder: edit(folder, format="tflite"), "No backend here opens artifacts of the format"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_manifest_is_refused(case: str, artifact: Path) -> None:
    damage, said = MALFORMED[case]
    damage(artifact)
    with pytest.raises(InputError, match=said):
        load_runner(artifact)


@pytest.mark.parametrize(
    ("artifact_format", "name"),
    [
        ("onnx", "session.model_external_initializers_file_folder_path"),
        ("onnx", "INFERENCE_PRECISION_HINT"),
        ("openvino", "CACHE_DIR"),
    ],
)
def test_a_manifest_sets_no_property_of_the_runtime_that_is_not_its_backends(
    artifact_format: str, name: str, sealed: tuple[Path, Manifest]
) -> None:
    folder, manifest = sealed
    asking = manifest.model_copy(update={"compile_properties": {name: "/elsewhere"}})
    with pytest.raises(InputError, match=f"sets the compile property '{name}', which {artifact_format} does not take"):
        backend_of_format(artifact_format).load(folder, asking)


def test_a_folder_that_does_not_exist_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(tmp_path / "absent")


# The verb.


def test_an_export_that_fails_its_checks_leaves_nothing(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter loses a head between the graph and the file."""
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    written = OnnxBackend.export

    def lossy(backend: OnnxBackend, job: ExportJob, folder: Path) -> ExportedProgram:
        program = written(backend, job, folder)
        model = onnx.load(folder / GRAPH_FILE)
        (tensor,) = [v for v in model.graph.initializer if v.name.endswith("layer.0.attention.output.dense.weight.T")]
        values = numpy_helper.to_array(tensor).copy()
        values[:8] = 0
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(model, folder / GRAPH_FILE)
        return program

    monkeypatch.setattr(OnnxBackend, "export", lossy)
    with pytest.raises(ExportMismatch, match=r"parity: sentence_embedding at .* differs by") as caught:
        export(checkpoint, settings_for("fp32"), tmp_path / "out")
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def test_what_the_backend_cannot_do_is_said_before_any_work(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert"))
    with pytest.raises(UsageError, match="no precision fp8; it has fp32, fp16, bf16, int8"):
        export(checkpoint, settings_for("fp8"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="not empty"):
        export(checkpoint, settings_for("fp32"), tmp_path / "full")


def test_the_runner_is_the_same_whether_called_or_prepared(sealed: tuple[Path, Manifest]) -> None:
    folder, manifest = sealed
    runner = get_backend("onnx").load(folder, manifest, threads=1)
    batch = {name: torch.ones(2, 5, dtype=torch.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    found = runner(batch)["sentence_embedding"]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    runner.prepare(batch)()
    with pytest.raises(InputError, match="does not take inputs of shape"):
        runner({name: value[0] for name, value in batch.items()})
