"""`limbeck backends`: what is ready here, why not, what the machine offers, and one backend in detail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from limbeck.backends.registry import get_backend
from limbeck.environment import available_cpus, cpu_facts, gpu_facts, has_sparse_tensor_cores

Limbeck = Callable[..., Any]

PLUGIN = """
from typing import Literal
from pydantic import Field
from limbeck.backends.base import Availability, Backend
from limbeck.exporters.options import BackendOptions

class Settings(BackendOptions):
    level: int = Field(3, ge=0, description="How hard it tries.")
    target: str | None = Field(None, description="What it compiles for.")
    mode: Literal["fast", "small"] = Field("fast", description="What it aims at.")

class Mine(Backend):
    name, summary, formats = "mine", "a good plug-in", ("mine-format",)
    options = classmethod(lambda cls: Settings)
    probe = lambda self: Availability(False, False, "no compiler", "pip install mine-compiler")
    export = load = None

class NoAnswer(Mine):
    probe = lambda self: None

class BadOptions(Mine):
    options = classmethod(lambda cls: 1 / 0)
"""
ENTRIES = """[limbeck.backends]
mine = my_plugin:Mine
no-answer = my_plugin:NoAnswer
bad-options = my_plugin:BadOptions
leaves = my_exit:Backend
"""


@pytest.fixture(scope="module")
def with_plugins(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`with_plugins("backends", ...)` in a process in which good and broken plug-ins are installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "my_plugin.py").write_text(PLUGIN)
    (site / "my_exit.py").write_text("raise SystemExit(9)")
    info = site / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    places = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "limbeck", *words]
        environment = {**os.environ, "PYTHONPATH": places}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")

    return call


def test_the_device_is_told(limbeck: Limbeck) -> None:
    cpu = json.loads(limbeck("backends", "--json").out)["cpu"]
    assert {name: cpu[name] for name in cpu_facts()} == cpu_facts()
    assert cpu["logical_cpus"] == psutil.cpu_count() and cpu["threads"] == available_cpus()
    assert 0 < cpu["memory_available_bytes"] < cpu["memory_bytes"]
    table = limbeck("backends").out
    assert f"runtimes take {available_cpus()} threads" in table and "GiB available" in table


SMI = """#!/bin/sh
printf 'NVIDIA New, 580.1, 9.0, 81559 MiB\\nNVIDIA Old, 580.1, 7.5, 16384 MiB\\n'
"""


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose `nvidia-smi` lists two."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gpu_facts.cache_clear()
    yield
    gpu_facts.cache_clear()


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_told_with_their_sparse_tensor_cores(limbeck: Limbeck) -> None:
    gpus = json.loads(limbeck("backends", "--json").out)["gpus"]
    assert [(gpu["name"], gpu["sparse_tensor_cores"]) for gpu in gpus] == [("NVIDIA New", True), ("NVIDIA Old", False)]
    said = limbeck("backends").out
    assert "NVIDIA New, driver 580.1, compute capability 9.0, 81559 MiB, with sparse tensor cores" in said
    assert "16384 MiB, without sparse tensor cores" in said


@pytest.mark.parametrize(("capability", "has"), [("8.0", True), ("12.0", True), ("7.5", False), ("[N/A]", False)])
def test_sparse_tensor_cores_came_with_ampere(capability: str, has: bool) -> None:
    assert has_sparse_tensor_cores({"compute_cap": capability}) == has
    assert not has_sparse_tensor_cores({})


@pytest.mark.parametrize("name", ["onnx", "openvino", "tensorrt"])
def test_one_backend_in_detail(name: str, limbeck: Limbeck) -> None:
    backend = get_backend(name)
    details = json.loads(limbeck("backends", name, "--json").out)
    assert (details["name"], details["source"]) == (name, "built in")
    assert details["precisions"] == list(backend.precisions) and details["formats"] == list(backend.formats)
    assert details["default_precision"] == backend.default_precision
    assert details["sparsities"] == list(backend.sparsities)
    fields = backend.options().model_fields
    assert [option["name"] for option in details["options"]] == list(fields)
    for option in details["options"]:
        assert option["default"] == json.loads(json.dumps(fields[option["name"]].default))
        assert option["description"] == fields[option["name"]].description
    shown = " ".join(limbeck("backends", name).out.split())
    assert all(word in shown for word in (*fields, *backend.precisions, *backend.formats))


def test_what_an_option_takes_is_said(limbeck: Limbeck) -> None:
    options = {option["name"]: option for option in json.loads(limbeck("backends", "onnx", "--json").out)["options"]}
    assert options["opset"]["takes"] == "integer, 18 to 23 or null"
    assert options["fusions"]["takes"] == "true or false"
    assert options["group_size"]["takes"] == "16, 32, 64, 128, 256"


def test_an_unknown_backend_suggests_the_near_one(limbeck: Limbeck) -> None:
    shown = limbeck("backends", "openvin")
    assert shown.code == 2 and "There is no backend 'openvin'" in shown.err and "Did you mean 'openvino'?" in shown.err


def test_a_plug_in_is_shown_in_detail_with_what_mends_it(with_plugins: Callable[..., Any]) -> None:
    done = with_plugins("backends", "mine")
    assert done.returncode == 0, done.stderr
    assert "To mend it: pip install mine-compiler" in done.stdout and "my_plugin:Mine" in done.stdout
    takes = {
        option["name"]: option["takes"]
        for option in json.loads(with_plugins("backends", "mine", "--json").stdout)["options"]
    }
    assert takes == {"level": "integer, from 0", "target": "text or null", "mode": "fast, small"}


def test_broken_plug_ins_break_nothing(with_plugins: Callable[..., Any]) -> None:
    listed = json.loads(with_plugins("backends", "--json").stdout)["backends"]
    found = {backend["name"]: backend["availability"] for backend in listed}
    assert found["onnx"]["ready"] == "yes"
    assert found["mine"]["ready"] == found["no-answer"]["ready"] == found["leaves"]["ready"] == "no"
    assert "its probe gives a NoneType" in found["no-answer"]["reason"]
    assert "does not import" in found["leaves"]["reason"]
    for name in ("bad-options", "leaves"):
        done = with_plugins("backends", name)
        assert done.returncode == 3 and "Traceback" not in done.stderr and name in done.stderr
