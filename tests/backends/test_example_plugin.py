"""The example plug-in, installed as a user installs it, and what an entry point may name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "backend_plugin"
TinyCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example is installed, beside what the tests run with."""
    if not EXAMPLE.exists():
        pytest.skip("the examples are not beside this installation")
    place = tmp_path_factory.mktemp("plugin")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(place / "site"), str(_copied(place))], check=True)
    return {**os.environ, "PYTHONPATH": str(place / "site"), "HF_HUB_OFFLINE": "1"}


def _copied(place: Path) -> Path:
    """The example elsewhere: building it in place would leave its build folder in the tree."""
    source = place / "source"
    source.mkdir()
    for file in EXAMPLE.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    return source


def limbeck(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "limbeck", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_plugin_is_listed_beside_ours(with_plugin: dict[str, str]) -> None:
    listed = json.loads(limbeck(with_plugin, "backends", "--json").stdout)["backends"]
    found = {backend["name"]: backend for backend in listed}
    assert [*found] == ["onnx", "openvino", "tensorrt", "torch", "executorch", "dynamo", "torch-export"]
    assert found["torch-export"]["source"] == "limbeck_torch_export:TorchExportBackend"
    for name in ("torch-export", "dynamo"):
        assert found[name]["availability"]["can_export"] and found[name]["availability"]["can_run"]


@pytest.mark.parametrize(
    ("backend", "family", "task", "checks"),
    [
        ("torch-export", "bert", "sentence-similarity", ["parity", "weight audit"]),
        pytest.param("dynamo", "distilbert", "text-classification", ["parity"], marks=pytest.mark.thorough),
    ],
)
def test_the_plugin_exports(
    backend: str, family: str, task: str, checks: list[str],
    with_plugin: dict[str, str], tiny_checkpoint: TinyCheckpoint, tmp_path: Path,
) -> None:  # fmt: skip
    model, out = str(tiny_checkpoint(family, task=task)), tmp_path / "artifact"
    done = limbeck(with_plugin, "export", model, "--backend", backend, "--out", str(out))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert [check["name"] for check in manifest["checks"]] == checks
    assert all(check["passed"] for check in manifest["checks"])
    assert ("not compared" in (manifest["unverified"] or "")) == (len(checks) == 1)
    assert manifest["outputs"][0]["shape"][0] is None


@pytest.mark.thorough
def test_what_the_plugin_exported_is_timed(
    with_plugin: dict[str, str], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    model, out = str(tiny_checkpoint("bert")), tmp_path / "artifact"
    done = limbeck(with_plugin, "export", model, "--backend", "torch-export", "--out", str(out))
    assert done.returncode == 0, done.stderr
    quick = ["--rounds", "1", "--sequence-length", "8", "--json"]
    timed = limbeck(with_plugin, "bench", str(out), "--against", model, *quick)
    assert timed.returncode == 0, timed.stderr
    assert {candidate["name"] for candidate in json.loads(timed.stdout)["candidates"]} == {Path(model).name, "artifact"}


@pytest.mark.thorough
def test_a_precision_that_a_plugin_lacks_is_refused(
    with_plugin: dict[str, str], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    words = ["--backend", "dynamo", "--precision", "fp16", "--out", str(tmp_path / "artifact")]
    done = limbeck(with_plugin, "export", str(tiny_checkpoint("bert")), *words)
    assert done.returncode == 2
    assert "The backend dynamo has no precision fp16; it has fp32." in done.stderr
