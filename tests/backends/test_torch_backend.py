"""torch as a backend: programs that are compiled ahead of time, when they are called, or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from limbeck import export, load_checkpoint
from limbeck.backends.registry import backend_for, get_backend, load_runner
from limbeck.backends.torch import TorchBackend, require_cuda
from limbeck.backends.writing import Writer, WritingSettings
from limbeck.cli.main import _run
from limbeck.errors import BackendUnavailable, ExportMismatch, InputError, UsageError
from limbeck.exporters.artifact import open_artifact, read_manifest
from limbeck.exporters.inputs import probe_batch
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.exporters.torch import PACKAGE_FILE, WEIGHTS_FILE
from limbeck.models.checkpoint import Checkpoint
from limbeck.prune.costs import counted_flops
from limbeck.validate.proofs.weight_audit import audit_weights

TinyCheckpoint = Callable[..., Path]
SHAPES = ShapeRange(max_batch=8, opt_batch=2, max_sequence=48, opt_sequence=16)
SEVERAL = ShapeRange(min_batch=2, opt_batch=2, max_batch=8, min_sequence=2, max_sequence=48, opt_sequence=16)
"""No size of one, for each of which torch.compile would compile once more."""
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def settings(compiler: str = "aot", shapes: ShapeRange = SHAPES, **changes: Any) -> ExportSettings:
    options = {"compiler": compiler, **changes.pop("options", {})}
    return ExportSettings.model_validate({"backend": "torch", "shapes": shapes, "options": options, **changes})


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert", task="text-classification"))


@pytest.fixture(scope="module")
def package(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once for all tests of this file: do not write into it."""
    out = tmp_path_factory.mktemp("aot") / "artifact"
    export(checkpoint, settings(), out)
    return out


@pytest.fixture(scope="module")
def eager(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eager") / "artifact"
    export(checkpoint, settings("eager"), out)
    return out


# What is written


def test_a_package_is_code_without_weights(package: Path) -> None:
    manifest = open_artifact(package)
    assert manifest.format == "torch-aot" and manifest.unverified is None
    assert [check.name for check in manifest.checks] == ["parity", "weight audit"]
    assert all(check.passed for check in manifest.checks)
    assert {PACKAGE_FILE, WEIGHTS_FILE} <= set(manifest.program_files)
    with zipfile.ZipFile(package / PACKAGE_FILE) as archive:
        names = archive.namelist()
        source = b"".join(archive.read(name) for name in names if name.endswith(".cpp")).decode()
    assert sum(name.endswith(".so") for name in names) == 1
    assert not any("pickle" in name or name.endswith((".pkl", ".pt")) for name in names)
    assert not re.search(r"num_threads\(\d+\)", source), "the number of threads is not compiled in"
    stored = load_file(package / WEIGHTS_FILE)
    assert stored["module.classifier.bias"].shape == (3,), "short vectors are not written into the code either"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_eager_weights_are_of_the_precision(precision: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    manifest = export(checkpoint, settings("eager", precision=precision), tmp_path / "out")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS_FILE).values()} == {dtype}
    runner, _ = load_runner(tmp_path / "out", threads=1)
    assert runner.properties["dtype"] == str(dtype).removeprefix("torch.") == manifest.outputs[0].dtype
    parity = manifest.checks[0]
    apart = max(float(row["share of the output"]) for row in parity.rows)
    assert parity.passed and (apart == 0) == (precision == "fp32")


def test_what_float16_cannot_hold_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("bert", task="text-classification"))
    with torch.no_grad():
        checkpoint.model.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = 1e6
    with pytest.raises(ExportMismatch, match=r"intermediate\.dense\.weight reaches 1,000,000") as refused:
        export(checkpoint, settings("eager", precision="fp16"), tmp_path / "out")
    assert "bf16" in str(refused.value.hint) and not (tmp_path / "out").exists()


# What runs


def test_a_package_computes_what_its_model_computes(package: Path, checkpoint: Checkpoint) -> None:
    runner, _ = load_runner(package, threads=1)
    assert runner.properties["runtime"] == f"torch {torch.__version__} AOTInductor"
    assert runner.properties["threads"] == "1" and runner.properties["dtype"] == "float32"
    for rows, tokens, padded in ((1, 1, False), (7, 48, True), (8, 3, False)):
        batch = probe_batch(checkpoint, rows, tokens, padded=padded)
        np.testing.assert_allclose(runner(batch)["logits"], checkpoint.run(batch)["logits"], atol=2e-5)
    (prepared,) = runner.prepare(batch)()  # type: ignore[misc]
    np.testing.assert_allclose(prepared.numpy(), checkpoint.run(batch)["logits"], atol=2e-5)


def test_inputs_that_lie_otherwise_in_memory_are_the_same(package: Path, checkpoint: Checkpoint) -> None:
    """Compiled code trusts the strides of the trace."""
    runner, _ = load_runner(package, threads=1)
    batch = probe_batch(checkpoint, 4, 9, padded=True)
    turned = {name: value.t().contiguous().t() for name, value in batch.items()}
    assert not turned["input_ids"].is_contiguous()
    np.testing.assert_array_equal(runner(turned)["logits"], runner(batch)["logits"])
    np.testing.assert_array_equal(runner.prepare(turned)()[0].numpy(), runner(batch)["logits"])  # type: ignore[index]


@pytest.mark.parametrize("kind", ["package", "eager"])
@pytest.mark.parametrize(("rows", "tokens"), [(9, 16), (2, 49)])
def test_sizes_that_a_program_was_not_made_for_are_refused(
    kind: str, rows: int, tokens: int, checkpoint: Checkpoint, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    runner = get_backend("torch").load(folder, read_manifest(folder), 1)
    batch = probe_batch(checkpoint, rows, tokens)
    for call in (runner, runner.prepare):
        with pytest.raises(InputError, match=rf"shape \({rows}, {tokens}\): it takes batches of 1 to 8 and 1 to 48"):
            call(batch)
    del batch["attention_mask"]
    with pytest.raises(InputError, match="takes attention_mask, which the batch does not have"):
        runner({name: value[:2, :5] for name, value in batch.items()})


@pytest.mark.thorough
def test_what_is_compiled_when_called_computes_what_its_model_computes(
    checkpoint: Checkpoint, eager: Path, tmp_path: Path
) -> None:
    manifest = export(checkpoint, settings("inductor", SEVERAL), tmp_path / "out")
    assert manifest.format == "torch-inductor"
    parity = manifest.checks[0]
    assert parity.passed and any(float(row["share of the output"]) > 0 for row in parity.rows), "it was compiled"
    assert {name: manifest.files[name] for name in (WEIGHTS_FILE, "config.json")} == {
        name: read_manifest(eager).files[name] for name in (WEIGHTS_FILE, "config.json")
    }
    runner, _ = load_runner(tmp_path / "out", threads=1)
    assert "inductor" in runner.properties["runtime"]


# Weights and layers


@pytest.mark.parametrize("kind", ["package", "eager"])
def test_a_changed_weight_is_found_and_named(
    kind: str, checkpoint: Checkpoint, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy"))
    backend, manifest = get_backend("torch"), read_manifest(folder)
    found = backend.weights(folder, manifest, checkpoint.module)
    assert found is not None and audit_weights(checkpoint.module, found).passed
    stored = load_file(folder / WEIGHTS_FILE)
    name = next(name for name in stored if name.endswith("layer.1.attention.output.dense.weight"))
    stored[name][8:16] = 0
    save_file(stored, folder / WEIGHTS_FILE)
    changed = backend.weights(folder, manifest, checkpoint.module)
    assert changed is not None
    audit = audit_weights(checkpoint.module, changed)
    assert not audit.passed
    assert audit.detail.startswith("bert.encoder.layer.1.attention.output.dense.weight: differs")


@pytest.mark.parametrize("kind", ["package", "eager"])
def test_layers_and_flops_are_told_without_running(
    kind: str, checkpoint: Checkpoint, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    facts = get_backend("torch").program_facts(folder, read_manifest(folder), 2, 16)
    assert facts is not None
    products = [name for name, part in checkpoint.module.named_modules() if isinstance(part, torch.nn.Linear)]
    assert [layer.layer for layer in facts.layers] == products
    assert len(facts.tables) == 3 and {layer.precision for layer in facts.layers} == {"float32"}
    assert facts.flops == counted_flops(checkpoint, 16, 2)
    assert not any(layer.eligible for layer in facts.layers)
    assert "on CUDA alone" in facts.layers[0].reason


@pytest.mark.parametrize(
    ("family", "task"),
    [("gpt2", "text-generation"), ("qwen3", "text-generation"), ("mpnet", "sentence-similarity"),
     ("modernbert", "token-classification"), ("deberta-v2", "fill-mask")],
)  # fmt: skip
def test_every_kind_of_model_tells_its_flops(
    family: str, task: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(family, task=task), task)
    manifest = export(checkpoint, settings("eager", precision="bf16"), tmp_path / "out")
    assert {"parity", "weight audit"} <= {check.name for check in manifest.checks if check.passed}
    facts = get_backend("torch").program_facts(tmp_path / "out", manifest, 1, 12)
    assert facts is not None and facts.flops == counted_flops(checkpoint, 12)
    assert {layer.stored for layer in facts.layers} == {"bfloat16"}


def test_an_eager_program_shows_its_inside(eager: Path, package: Path, checkpoint: Checkpoint) -> None:
    backend, modules = get_backend("torch"), ["bert.encoder.layer.0.output.LayerNorm", "no.such.module"]
    runner = backend.intermediates(eager, read_manifest(eager), modules)
    assert runner is not None
    batch = probe_batch(checkpoint, 2, 7)
    found = runner(batch)
    assert set(found) == {"logits", modules[0]} and found[modules[0]].shape == (2, 7, 32)
    np.testing.assert_allclose(found["logits"], checkpoint.run(batch)["logits"], atol=1e-6)
    assert backend.intermediates(package, read_manifest(package), modules) is None


# Text


@pytest.mark.parametrize(
    ("family", "compiler"),
    [pytest.param("llama", "inductor", marks=pytest.mark.thorough), ("gpt2", "eager"), ("mistral", "eager")],
)
def test_a_program_writes_what_its_model_writes(
    family: str, compiler: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Packages are held to this in test_writing.py, with the programs of the other backends."""
    checkpoint = load_checkpoint(tiny_checkpoint(family, task="text-generation"))
    manifest = export(checkpoint, settings("eager"), tmp_path / "out")
    assert manifest.cache is not None and manifest.cache.precision == "f32"
    # The files of the two are the same, and as such it is compiled once and not for each check of its export.
    runner = TorchBackend().load(tmp_path / "out", manifest.model_copy(update={"format": f"torch-{compiler}"}), 1)
    writer = Writer(runner.decoder(), checkpoint.tokenizer, manifest.max_length)
    prompts = [list(checkpoint.tokenizer(text)["input_ids"]) for text in ("Rain fell on", "Two foxes crossed the")]
    told = WritingSettings(max_new_tokens=8)
    for _ in range(2):  # what was read is forgotten
        rows = list(zip(*writer.write(prompts, told), strict=True))
        for prompt, row in zip(prompts, rows, strict=True):
            ids = torch.tensor([prompt])
            flags = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            expected = checkpoint.model.generate(ids, attention_mask=torch.ones_like(ids), **flags)[0, len(prompt) :]
            assert [token for token in row if token is not None] == expected.tolist()


def test_a_program_that_only_scores_writes_nothing(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint("llama", task="text-generation"))
    manifest = export(checkpoint, settings("eager", kv_cache=False), tmp_path / "out")
    runner, _ = load_runner(tmp_path / "out", threads=1)
    assert manifest.cache is None
    with pytest.raises(UsageError, match="writes no text"):
        runner.decoder()


# What is not here


def test_the_probe_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from limbeck.backends.torch import TorchBackend\n"
        "TorchBackend().probe()\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("compiler", ["aot", "inductor"])
def test_a_missing_compiler_is_named(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-g++")}):
        with pytest.raises(BackendUnavailable, match=r"no-such-g\+\+ is not installed") as refused:
            backend_for(settings(compiler))
        assert "compiler=eager" in str(refused.value.hint)
        assert backend_for(settings("eager")).name == "torch"
    monkeypatch.setenv("CXX", "no-such-g++")
    available = TorchBackend().probe()
    assert available.can_export and "no-such-g++ is not installed" in available.reason


@pytest.mark.thorough
def test_a_compiler_that_fails_is_quoted(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text(
        "#!/bin/sh\ncase $* in *--version*) echo g++ 12.2.0; exit 0;; esac\necho 'no headers here' >&2\nexit 1"
    )
    broken.chmod(0o755)
    model, out = str(tiny_checkpoint("bert", task="text-classification")), tmp_path / "out"
    words = ["export", model, "--backend", "torch", "--out", str(out)]
    environment = {**os.environ, "CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "limbeck", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 3, done.stderr
    assert f"The C++ compiler {broken} cannot compile what torch has written for it: no headers here" in done.stderr
    assert "Traceback" not in done.stderr and not out.exists()


def test_code_for_another_cpu_is_refused_before_it_is_opened(package: Path) -> None:
    manifest = read_manifest(package)
    other = {**manifest.cpu, "name": "Tomorrow", "instruction_sets": ["avx2048", *manifest.cpu["instruction_sets"]]}
    changed = manifest.model_copy(update={"cpu": other})
    with pytest.raises(BackendUnavailable, match=r"compiled for Tomorrow .* this CPU lacks avx2048"):
        TorchBackend().load(package, changed)
    changed = manifest.model_copy(update={"cpu": {**manifest.cpu, "machine": "aarch64"}})
    with pytest.raises(BackendUnavailable, match=r"compiled for .*aarch64\), and this CPU is a"):
        TorchBackend().load(package, changed)


def test_a_package_that_does_not_open_says_so(package: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(package, tmp_path / "copy"))
    (folder / PACKAGE_FILE).write_bytes(b"no archive")
    with pytest.raises(BackendUnavailable, match=r"cannot open .*model\.pt2"):
        TorchBackend().load(folder, read_manifest(package))
    shutil.copyfile(package / PACKAGE_FILE, folder / PACKAGE_FILE)
    stored = load_file(folder / WEIGHTS_FILE)
    del stored["module.classifier.bias"]
    save_file(stored, folder / WEIGHTS_FILE)
    with pytest.raises(BackendUnavailable, match=r"cannot open .*model\.pt2"):
        TorchBackend().load(folder, read_manifest(package))


def test_a_precision_that_no_torch_program_has_is_refused(eager: Path) -> None:
    manifest = read_manifest(eager)
    changed = manifest.model_copy(update={"settings": manifest.settings.model_copy(update={"precision": "int8"})})
    with pytest.raises(InputError, match="manifest says int8, and a program of torch is fp32, bf16, fp16"):
        TorchBackend().load(eager, changed)


@without_cuda
def test_cuda_where_there_is_none_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BackendUnavailable, match="CUDA was asked for where there is none"):
        require_cuda()
    words = ["--backend", "torch", "--option", "device=cuda", "--out", str(tmp_path / "out")]
    assert _run(["export", str(tmp_path / "no-such-model"), *words]) == 3
    said = capsys.readouterr().err
    assert "CUDA was asked for where there is none" in said and "--option device=cpu" in said


@without_cuda
def test_an_artifact_for_cuda_is_refused_where_there_is_none(eager: Path) -> None:
    manifest = read_manifest(eager)
    there = manifest.settings.model_copy(update={"options": {"compiler": "eager", "device": "cuda"}})
    with pytest.raises(BackendUnavailable, match="CUDA was asked for where there is none"):
        TorchBackend().load(eager, manifest.model_copy(update={"settings": there}))


# On the command line


def test_every_verb_takes_an_eager_program(
    tiny_checkpoint: TinyCheckpoint, texts: list[str], write_jsonl: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, out = tiny_checkpoint("distilbert", task="text-classification"), tmp_path / "artifact"
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": text, "label": i % 3} for i, text in enumerate(texts[:24])])
    words = ["--backend", "torch", "--option", "compiler=eager", "--out", out]
    assert limbeck("export", model, *words) == 0, capsys.readouterr().err
    assert limbeck("verify", out) == 0
    assert limbeck("inspect", out) == 0
    assert limbeck("bisect", out, "--data", data, "--samples", 2) == 0
    said = capsys.readouterr().out
    assert "every module is within what fp32 explains" in said
    assert (
        limbeck("validate", out, "--teacher", model, "--data", data, "--no-latency", "--out", tmp_path / "report") == 0
    )
    assert "torch-eager fp32" in capsys.readouterr().out


def limbeck(*words: object) -> int:
    return _run([str(word) for word in words])


def test_a_package_is_timed_in_a_process_of_its_own(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert limbeck("bench", package, "--rounds", 1, "--sequence-length", 16, "--batch-size", 2, "--json") == 0
    (candidate,) = json.loads(capsys.readouterr().out)["candidates"]
    assert "AOTInductor" in str(candidate)


def test_the_reference_of_a_package_is_eager(package: Path, checkpoint: Checkpoint) -> None:
    """It is made in a moment, shows its inside, and is no code."""
    from limbeck.validate.attribution.reference import reference_graph

    with reference_graph(dataclasses.replace(checkpoint), read_manifest(package)) as reference:
        assert reference.manifest.format == "torch-eager"
        assert reference.backend.intermediates(reference.folder, reference.manifest, []) is not None
