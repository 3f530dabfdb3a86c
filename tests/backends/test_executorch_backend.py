"""ExecuTorch programs of tiny models: what is right passes the checks and computes as torch, what is wrong is named."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.backends.base import ExportJob
from limbeck.backends.executorch import ExecuTorchBackend
from limbeck.backends.registry import load_runner
from limbeck.errors import BackendUnavailable, InputError, UsageError
from limbeck.exporters.artifact import Manifest
from limbeck.exporters.inputs import probe_batch, probe_batches
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.lineage import Step
from limbeck.models.surgery import Selection, select
from limbeck.prune.costs import counted_flops
from limbeck.recipes.inspection import inspect_artifact
from limbeck.recipes.steps import export
from limbeck.recipes.verifying import verify
from limbeck.validate.proofs.parity import check_parity
from limbeck.validate.proofs.weight_audit import audit_weights

executorch = pytest.importorskip("executorch.runtime", reason="executorch is not installed")

TinyCheckpoint = Callable[..., Path]
SMALL = ShapeRange(max_batch=8, opt_batch=2, max_sequence=64, opt_sequence=16)
PROBES = ["1 x 1", "1 x 7", "3 x 13", "5 x 24, padded", "1 x 64"]
KINDS = ["q", "k", "v", "o", "up", "down"]
CPP = Path(__file__).parents[2] / "docs" / "executorch.md"


def settings_for(precision: str, **given: Any) -> ExportSettings:
    return ExportSettings.model_validate({"backend": "executorch", "precision": precision, "shapes": SMALL, **given})


@dataclasses.dataclass
class Artifact:
    checkpoint: Checkpoint
    folder: Path
    manifest: Manifest

    @property
    def program(self) -> Path:
        return self.folder / "model.pte"

    def audit(self, folder: Path) -> Any:
        weights = ExecuTorchBackend().weights(folder, self.manifest, self.checkpoint.module)
        return audit_weights(self.checkpoint.module, weights)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A BERT whose layers were pruned to 24 and to 40 channels."""
    whole = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    smaller = select(whole.model, Selection(ffn=[torch.arange(24), torch.arange(3, 43)]))
    folder = tmp_path_factory.mktemp("uneven") / "uneven"
    whole.after(smaller, Step(verb="prune", method="by hand")).save(folder)
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def artifact(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_jsonl: Callable[..., Path]
) -> Callable[..., Artifact]:
    """`artifact("int8", activations="static")`: exported and checked, made once; do not write into it."""
    made: dict[tuple[str, ...], Artifact] = {}
    rows = [{"text": text, "label": number % 3} for number, text in enumerate(texts)]
    calibration = write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)

    def make(precision: str, **options: str) -> Artifact:
        key = precision, *options.values()
        if key not in made:
            folder = tmp_path_factory.mktemp("executorch") / "artifact"
            data = checkpoint.read(calibration).head(24) if options.get("activations") == "static" else None
            settings = settings_for(precision, options=options)
            manifest = export(checkpoint, settings, folder, calibration=data, beside_float=False)
            made[key] = Artifact(checkpoint, folder, manifest)
        return made[key]

    return make


@pytest.fixture
def copied(artifact: Callable[..., Artifact], tmp_path: Path) -> Artifact:
    made = artifact("fp32")
    return dataclasses.replace(made, folder=Path(shutil.copytree(made.folder, tmp_path / "copied")))


EVERY = [("fp32", {}), ("int8", {}), ("int8", {"activations": "static"})]
# Finding the static ranges takes a minute.
every_export = pytest.mark.parametrize(
    ("precision", "options"), [*EVERY[:2], pytest.param(*EVERY[2], marks=pytest.mark.thorough)]
)


@every_export
def test_an_export_computes_what_its_checkpoint_computes(
    artifact: Callable[..., Artifact], precision: str, options: dict[str, str]
) -> None:
    made = artifact(precision, **options)
    manifest = made.manifest
    parity, audit = manifest.checks
    assert (parity.name, audit.name) == ("parity", "weight audit")
    assert parity.passed and [row["shape"] for row in parity.rows] == PROBES
    assert audit.passed and manifest.unverified is None and manifest.caveats == []
    assert [spec.name for spec in manifest.inputs] == ["input_ids", "token_type_ids", "attention_mask"]
    assert {(spec.dtype, *spec.shape) for spec in manifest.inputs} == {("int64", None, None)}
    assert [(spec.name, spec.dtype, spec.shape) for spec in manifest.outputs] == [("logits", "float32", [None, 3])]
    runner, _ = load_runner(made.folder, threads=1)
    # the largest call that memory is planned for, and one that is split into such calls
    for rows, tokens in ((8, 64), (8, 1), (20, 9)):
        batch = probe_batch(made.checkpoint, rows, tokens, padded=True)
        found = check_parity(runner, made.checkpoint.run, [(f"{rows} x {tokens}", batch)], manifest.settings.precision)
        assert found.passed, found.detail
    runner.close()


@pytest.mark.thorough
def test_int8_is_smaller_and_nearer_with_ranges_of_its_own_for_each_token(artifact: Callable[..., Artifact]) -> None:
    size = {name: artifact(name).program.stat().st_size for name in ("fp32", "int8")}
    assert size["int8"] < size["fp32"]
    off = [
        max(row["share of the output"] for row in artifact(*each[:1], **each[1]).manifest.checks[0].rows)
        for each in EVERY
    ]
    assert off[0] < off[1] < off[2]


@every_export
def test_the_file_says_who_computes_what(
    artifact: Callable[..., Artifact], precision: str, options: dict[str, str]
) -> None:
    told = artifact(precision, **options).manifest.evidence["XNNPACK"]
    linear, products = told["by XNNPACK"]["FullyConnected"], told["by XNNPACK"]["BatchMatrixMultiply"]
    assert (linear, products) == (14, 4)  # six a layer, pooler and head; two a layer
    assert told["delegated"].partition(", ")[2].startswith("18 of 18 matrix products")
    assert told["by ExecuTorch's own kernels"]["embedding"] == 3
    assert told["planned bytes"] >= 8 * 64 * 32 * 4  # the residual stream of the largest call


def test_its_layers_are_shown_as_the_file_holds_them(artifact: Callable[..., Artifact]) -> None:
    made = artifact("int8")
    found = inspect_artifact(made.folder, made.manifest, (3, 17)).facts
    assert found is not None
    inside = [layer for layer in found.layers if layer.number is not None]
    assert [(layer.number, layer.kind) for layer in inside] == [(row, kind) for row in (0, 1) for kind in KINDS]
    assert [layer.shape for layer in inside if layer.kind == "down"] == [[24, 32], [40, 32]]  # [reduction, output]
    assert {layer.precision for layer in found.layers} == {"int8 weights and activations"}
    assert all(layer.size_bytes == layer.shape[0] * layer.shape[1] for layer in found.layers)
    assert sorted(table.shape for table in found.tables) == [[2, 32], [64, 32], [400, 32]]
    assert {table.precision for table in found.tables} == {"float32"}
    assert found.flops == counted_flops(made.checkpoint, 17, 3)


@pytest.mark.thorough
def test_ranges_are_fixed_by_calibration_alone(artifact: Callable[..., Artifact]) -> None:
    ranges = {}
    for activations in ("dynamic", "static"):
        made = artifact("int8", activations=activations) if activations == "static" else artifact("int8")
        ranges[activations] = list(ExecuTorchBackend().activation_ranges(made.folder, made.manifest) or [])
    assert ranges["dynamic"] == []
    products = {name for name, part in made.checkpoint.module.named_modules() if isinstance(part, torch.nn.Linear)}
    assert {each.module for each in ranges["static"]} == products
    assert all(each.low < 0 < each.high for each in ranges["static"])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_zeroed_head_is_found_and_named(artifact: Callable[..., Artifact], tmp_path: Path, precision: str) -> None:
    made = artifact(precision)
    name = "bert.encoder.layer.1.attention.output.dense.weight"
    backend = ExecuTorchBackend()
    weights = backend.weights(made.folder, made.manifest, made.checkpoint.module)
    (held,) = (weight for weight in weights if weight.name == name)
    scale = 2 * np.median(held.step, axis=1, keepdims=True) if precision == "int8" else None
    stored = held.values if scale is None else np.round(held.values / scale).astype(np.int8)
    folder = Path(shutil.copytree(made.folder, tmp_path / "copy"))
    raw = bytearray(made.program.read_bytes())
    place = bytes(raw).find(stored.tobytes())
    assert place >= 0 and bytes(raw).find(stored.tobytes(), place + 1) < 0
    changed = stored.copy()
    changed[:, 8:16] = 0  # the second of four heads
    raw[place : place + stored.nbytes] = changed.tobytes()
    (folder / "model.pte").write_bytes(bytes(raw))
    assert made.audit(made.folder).passed
    audit = made.audit(folder)
    assert not audit.passed
    assert audit.detail.startswith(name) and "(1 weights are wrong)" in audit.detail


def test_what_the_files_prove_is_verified(artifact: Callable[..., Artifact]) -> None:
    made = artifact("int8")
    found = verify(made.folder)
    assert found.passed
    said = {check.name: check.detail for check in found.checks}
    assert said["stored precision"] == "int8: 14 x int8 weights and activations"


def test_the_prepared_call_computes_the_batch_that_it_was_given(artifact: Callable[..., Artifact]) -> None:
    made = artifact("fp32")
    runner = ExecuTorchBackend().load(made.folder, made.manifest, threads=1)
    batch = probe_batch(made.checkpoint, 2, 7)
    call = runner.prepare(batch)
    runner(probe_batch(made.checkpoint, 3, 5))
    for _ in range(2):  # planned memory is used again
        (found,) = call()  # type: ignore[misc]
        np.testing.assert_allclose(found.numpy(), made.checkpoint.run(batch)["logits"], atol=1e-4)
    runner.close()


def test_the_pool_of_threads_is_the_process_s(artifact: Callable[..., Artifact]) -> None:
    made = artifact("fp32")
    first = ExecuTorchBackend().load(made.folder, made.manifest, threads=1)
    assert first.properties["threads"] == "1"
    second = ExecuTorchBackend().load(made.folder, made.manifest, threads=2)
    assert second.properties["threads"] == "1"  # the first one holds it
    first.close()
    second.close()
    third = ExecuTorchBackend().load(made.folder, made.manifest, threads=2)
    assert third.properties["threads"] == "2" and third.properties["runtime"].startswith("executorch 1.")
    third.close()


def test_inputs_that_were_not_planned_for_are_refused(artifact: Callable[..., Artifact], capfd: Any) -> None:
    made = artifact("fp32")
    runner = ExecuTorchBackend().load(made.folder, made.manifest, threads=1)
    for shape in ((9, 16), (16, 32), (1, 65)):  # the second is no more numbers than what was planned for
        with pytest.raises(
            InputError, match=rf"does not take inputs of shape \({shape[0]}, {shape[1]}\): it takes up to"
        ):
            runner({name: torch.ones(shape, dtype=torch.int64) for name in made.checkpoint.input_names})
    batch = probe_batch(made.checkpoint, 1, 5)
    with pytest.raises(InputError, match="takes token_type_ids, which the batch does not have"):
        runner({name: value for name, value in batch.items() if name != "token_type_ids"})
    assert capfd.readouterr().err == ""  # nor does the runtime talk to the user
    runner.close()


@pytest.mark.parametrize(
    ("what", "content", "said"),
    [
        ("empty", lambda raw: b"", "model.pte is no program that this ExecuTorch reads"),
        ("no program", lambda raw: b"PK\x03\x04 an archive of something else" * 100, "no program that this ExecuTorch"),
        ("cut short", lambda raw: raw[: len(raw) // 2], "model.pte"),
        ("damaged", lambda raw: raw[:64] + bytes(len(raw) // 8) + raw[64 + len(raw) // 8 :], "model.pte"),
    ],
)
def test_a_malformed_program_is_named(
    copied: Artifact, what: str, content: Callable[[bytes], bytes], said: str
) -> None:
    copied.program.write_bytes(content(copied.program.read_bytes()))
    backend = ExecuTorchBackend()
    with pytest.raises((InputError, BackendUnavailable), match=said):
        backend.load(copied.folder, copied.manifest)
    with pytest.raises(InputError, match=r"model\.pte cannot be read as an ExecuTorch program"):
        backend.program_facts(copied.folder, copied.manifest, 1, 16)


def test_a_program_for_another_delegate_is_refused(copied: Artifact) -> None:
    copied.program.write_bytes(copied.program.read_bytes().replace(b"XnnpackBackend", b"CoreMLoBackend"))
    with pytest.raises(BackendUnavailable, match=r"ExecuTorch cannot run .*CoreMLoBackend is not registered"):
        ExecuTorchBackend().load(copied.folder, copied.manifest)
    with pytest.raises(InputError, match="is a program for CoreMLoBackend; limbeck reads those for XnnpackBackend"):
        ExecuTorchBackend().program_facts(copied.folder, copied.manifest, 1, 16)


def test_an_operator_that_the_runtime_lacks_is_named(copied: Artifact) -> None:
    copied.program.write_bytes(
        copied.program.read_bytes().replace(b"aten::native_layer_norm", b"aten::native_layer_nerm")
    )
    with pytest.raises(BackendUnavailable, match=r"ExecuTorch cannot run .*Missing operator: .*native_layer_nerm"):
        ExecuTorchBackend().load(copied.folder, copied.manifest)


def test_a_program_that_is_not_the_manifests_is_refused(artifact: Callable[..., Artifact]) -> None:
    made = artifact("fp32")
    fewer = made.manifest.model_copy(update={"inputs": made.manifest.inputs[:2]})
    with pytest.raises(InputError, match="is not the program that its manifest describes: it takes 3 tensors"):
        ExecuTorchBackend().load(made.folder, fewer)
    asking = made.manifest.model_copy(update={"compile_properties": {"log": "/etc/passwd"}})
    with pytest.raises(InputError, match="sets the compile property 'log', which executorch does not take"):
        ExecuTorchBackend().load(made.folder, asking)


def test_static_ranges_need_real_inputs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="int8 export needs real inputs to calibrate on"):
        export(checkpoint, settings_for("int8", options={"activations": "static"}), tmp_path / "out")
    with pytest.raises(UsageError, match="executorch has no precision bf16; it has fp32, int8"):
        export(checkpoint, settings_for("bf16"), tmp_path / "out")
    with pytest.raises(UsageError, match=r"has no option 'activation'; it has activations\. Did you mean"):
        export(checkpoint, settings_for("int8", options={"activation": "static"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_says_how_it_is_installed(
    artifact: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact("fp32")
    monkeypatch.setattr("limbeck.backends.executorch.is_importable", lambda module: False)
    available = ExecuTorchBackend().probe()
    assert not available.can_export and not available.can_run and available.reason == "not installed: executorch"
    for refused in (
        lambda: export(made.checkpoint, settings_for("fp32"), tmp_path / "out"),
        lambda: load_runner(made.folder),
        lambda: ExecuTorchBackend().program_facts(made.folder, made.manifest, 1, 16),
    ):
        with pytest.raises(BackendUnavailable) as caught:
            refused()
        assert caught.value.hint == 'pip install "limbeck[executorch]"'


@pytest.mark.thorough
def test_a_decoder_with_split_projections_and_a_tied_head(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """GPT-2: three projections in one matrix that lies [in, out], split at run time, and the table of words as head."""
    checkpoint = load_checkpoint(tiny_checkpoint("gpt2", task="text-generation"), "text-generation")
    settings = settings_for("int8", kv_cache=False)
    backend = ExecuTorchBackend()
    manifest = backend.export(ExportJob(checkpoint, settings), tmp_path).manifest(checkpoint, settings)
    runner = backend.load(tmp_path, manifest, threads=1)
    parity = check_parity(runner, checkpoint.run, probe_batches(checkpoint, SMALL), "int8")
    assert parity.passed, parity.detail
    runner.close()
    assert audit_weights(checkpoint.module, backend.weights(tmp_path, manifest, checkpoint.module)).passed
    facts = backend.program_facts(tmp_path, manifest, 1, 16)
    shapes = {layer.kind: layer.shape for layer in facts.layers if layer.number == 0}
    assert shapes == {"qkv": [32, 96], "o": [32, 32], "up": [32, 64], "down": [64, 32]}
    assert [layer.layer for layer in facts.layers if layer.number is None] == ["lm_head"]
    assert {layer.precision for layer in facts.layers} == {"int8 weights and activations"}
    assert "transformer.wte" in {table.layer for table in facts.tables}


def test_the_page_s_program_in_cpp_prints_what_python_computes(
    artifact: Callable[..., Artifact], tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    made = artifact("int8")
    (source,) = re.findall(r"^```cpp\n(.*?)^```$", CPP.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "embed.cpp").write_text(source)
    package = Path(executorch.__file__).parents[1]
    libraries = ["executorch", "executorch_kernels_optimized", "executorch_backend_xnnpack", "executorch_threadpool"]
    subprocess.run(
        ["g++", "-std=c++17", "-DC10_USING_CUSTOM_GENERATED_MACROS", "embed.cpp", "-o", "embed",
         f"-I{package / 'include'}", f"-I{package / 'include/executorch/runtime/core/portable_type/c10'}",
         f"-L{package / 'lib'}", f"-Wl,-rpath,{package / 'lib'}", "-Wl,--no-as-needed",
         *(f"-l{name}" for name in libraries)],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    ids = made.checkpoint.tokenizer("Cats sleep where the sun is.")["input_ids"]
    done = subprocess.run(
        ["./embed", str(made.program), *map(str, ids)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    runner, _ = load_runner(made.folder, threads=1)
    row = torch.tensor([ids])
    batch = {"input_ids": row, "token_type_ids": torch.zeros_like(row), "attention_mask": torch.ones_like(row)}
    np.testing.assert_allclose([float(line) for line in done.stdout.split()], runner(batch)["logits"][0], rtol=1e-5)
    runner.close()
