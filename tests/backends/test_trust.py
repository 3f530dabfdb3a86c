"""Machine code of others does not run: neither when an artifact is opened, nor looked into, nor verified."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch._inductor.package import package_aoti

from limbeck import export, load_checkpoint
from limbeck.backends.registry import backend_of_format, backend_to_run, load_runner
from limbeck.backends.tensorrt import ENGINE, KIT
from limbeck.backends.torch import TorchBackend
from limbeck.backends.trust import TRUST_VARIABLE, require_trusted, seal_here
from limbeck.cli.main import _run
from limbeck.errors import BackendUnavailable, InputError, IntegrityError
from limbeck.exporters.artifact import Manifest, open_artifact, payload_hash, read_manifest, seal
from limbeck.exporters.settings import ExportSettings
from limbeck.exporters.torch import PACKAGE_FILE

TinyCheckpoint = Callable[..., Path]
SIGN = """
#include <fstream>
__attribute__((constructor)) static void run() { std::ofstream("%s") << "I was here"; }
"""


@pytest.fixture(scope="module")
def harmless(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact without code; do not write into it."""
    out = tmp_path_factory.mktemp("trust") / "artifact"
    settings = ExportSettings(backend="torch", options={"compiler": "eager"})
    export(load_checkpoint(tiny_checkpoint("bert", task="text-classification")), settings, out)
    return out


@pytest.fixture
def sign(tmp_path: Path) -> Path:
    """What the code in `foreign` writes when it runs."""
    return tmp_path / "sign"


@pytest.fixture
def foreign(harmless: Path, sign: Path, tmp_path: Path) -> Path:
    """An artifact of somebody else: its manifest is in order, and its package runs code as soon as it is opened."""
    source, library = tmp_path / "x.wrapper.cpp", tmp_path / "x.wrapper.so"
    source.write_text(SIGN % sign)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    metadata = tmp_path / "x.wrapper_metadata.json"
    metadata.write_text('{"AOTI_DEVICE_KEY": "cpu"}')
    folder = Path(shutil.copytree(harmless, tmp_path / "foreign"))
    package_aoti(str(folder / PACKAGE_FILE), {"model": [str(path) for path in (source, library, metadata)]})
    seal(read_manifest(folder).model_copy(update={"format": "torch-aot"}), folder)
    return folder


def test_code_of_others_does_not_run(foreign: Path, sign: Path) -> None:
    known = open_artifact(foreign).artifact_id
    with pytest.raises(InputError, match=rf"artifact {known} in .* is machine code \(torch-aot\)") as refused:
        load_runner(foreign)
    assert "not made on this machine" in refused.value.message
    assert f"{TRUST_VARIABLE}={known}" in str(refused.value.hint) and "limbeck export" in str(refused.value.hint)
    assert not sign.exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [(["bench", "--rounds", "1"], 4), (["validate", "--teacher", "{model}", "--data", "{data}", "--out", "{out}"], 4),
     (["bisect", "--data", "{data}"], 4), (["verify"], 0), (["inspect"], 0)],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_no_verb_runs_it(
    words: list[str], code: int, foreign: Path, sign: Path, tiny_checkpoint: TinyCheckpoint, texts: list[str],
    write_jsonl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": text, "label": 0} for text in texts[:4]])
    named = {"model": tiny_checkpoint("bert", task="text-classification"), "data": data, "out": tmp_path / "out"}
    verb, *options = [word.format(**named) for word in words]
    assert _run([verb, str(foreign), *options]) == code
    assert not sign.exists()
    said = capsys.readouterr()
    if code == 4:
        assert TRUST_VARIABLE in said.err
    if verb == "verify":
        assert "its machine code was not looked into" in " ".join((said.out + said.err).split())


def test_who_trusts_it_runs_it(foreign: Path, sign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what is refused above is what would have run."""
    known = open_artifact(foreign).artifact_id
    monkeypatch.setenv(TRUST_VARIABLE, f"0123456789abcdef, {known}")
    with pytest.raises(BackendUnavailable, match="cannot open"):  # there is nothing in it but the sign
        load_runner(foreign)
    assert sign.read_text() == "I was here"


def test_trust_is_in_the_files_that_were_looked_at(foreign: Path, sign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = open_artifact(foreign).artifact_id
    monkeypatch.setenv(TRUST_VARIABLE, known)
    (foreign / PACKAGE_FILE).write_bytes((foreign / PACKAGE_FILE).read_bytes() + b"and more")
    with pytest.raises(IntegrityError):
        load_runner(foreign)
    sealed = seal(read_manifest(foreign), foreign)
    assert sealed.artifact_id != known
    with pytest.raises(InputError, match=sealed.artifact_id):
        load_runner(foreign)
    assert not sign.exists()


def test_what_is_sealed_here_is_known_here(
    foreign: Path, harmless: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = TorchBackend()
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    sealed = seal_here(read_manifest(foreign), foreign, backend)
    require_trusted(foreign, sealed, backend)
    assert backend_to_run(foreign, sealed).name == "torch"
    (noted,) = (tmp_path / "cache" / "made-here").iterdir()
    assert noted.name == payload_hash(sealed.files) and len(noted.name) == 64
    same_id = sealed.model_copy(update={"files": {**sealed.files, "another": "0" * 64}})
    with pytest.raises(InputError):  # what is noted is the whole hash, not the id that is its beginning
        require_trusted(foreign, same_id, backend)
    seal_here(read_manifest(harmless), Path(shutil.copytree(harmless, tmp_path / "copy")), backend)
    assert len(list((tmp_path / "cache" / "made-here").iterdir())) == 1, "what is no code is not noted"
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "another"))
    with pytest.raises(InputError):
        require_trusted(foreign, sealed, backend)


def test_a_cache_that_cannot_be_written_stops_no_export(
    harmless: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(harmless, tmp_path / "copy"))
    code = read_manifest(folder).model_copy(update={"format": "torch-aot"})
    sealed = seal_here(code, folder, TorchBackend())
    with pytest.raises(InputError, match="not made on this machine"):
        require_trusted(folder, sealed, TorchBackend())


@pytest.mark.parametrize(
    ("artifact_format", "code"),
    [("torch-aot", True), ("torch-inductor", False), ("torch-eager", False), ("onnx", False), ("openvino", False),
     (KIT, False), (ENGINE, True)],
)  # fmt: skip
def test_formats_that_are_code(artifact_format: str, code: bool, harmless: Path) -> None:
    """TensorRT's engines are: NVIDIA's own security page says that opening one is running native code."""
    manifest: Manifest = read_manifest(harmless).model_copy(update={"format": artifact_format})
    backend = backend_of_format(artifact_format)
    assert backend.runs_machine_code(manifest) == code
    if code:
        with pytest.raises(InputError, match="is machine code"):
            require_trusted(harmless, manifest, backend)
    else:
        require_trusted(harmless, manifest, backend)
