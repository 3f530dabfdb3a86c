"""Facts about the machine, against what the system itself says."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import limbeck
from limbeck.environment import (
    PACKAGES_OF_RECORD,
    available_cpus,
    cpu_facts,
    facts,
    gpu_facts,
    installed_version,
    is_importable,
    versions,
)


def test_versions_are_those_that_are_installed() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert installed_version("limbeck") == limbeck.__version__
    assert set(found) <= {"python", *PACKAGES_OF_RECORD}
    assert installed_version("no-such-package") is None


def test_looking_for_a_module_imports_nothing() -> None:
    code = "import sys; from limbeck.environment import *; print(is_importable('onnx'), 'onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"
    assert not is_importable("no_such_module")
    assert not is_importable("no_such_package.module")


def test_cpus_are_those_that_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    assert available_cpus() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_the_cpu_is_the_one_that_the_system_names() -> None:
    found = cpu_facts()
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert found["machine"] == platform.machine()
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = set(info.split())
    assert set(found["instruction_sets"]) <= flags
    assert ("avx2" in found["instruction_sets"]) == ("avx2" in flags)
    assert found["name"] in info or "model name" not in info


SMI = """#!/bin/sh
echo "$@" > {folder}/asked
printf 'NVIDIA Thing, 1.2.3, 9.0, 81559 MiB\\nNVIDIA Other, 1.2.3, 8.6, 24564 MiB\\n'
exit {code}
"""


@pytest.mark.parametrize("code", [0, 9])
def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI.format(folder=tmp_path, code=code))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gpu_facts.cache_clear()
    try:
        found = gpu_facts()
    finally:
        gpu_facts.cache_clear()
    assert "name,driver_version,compute_cap,memory.total" in (tmp_path / "asked").read_text()
    thing = {"name": "NVIDIA Thing", "driver_version": "1.2.3", "compute_cap": "9.0", "memory.total": "81559 MiB"}
    assert (
        found
        == ([thing, {**thing, "name": "NVIDIA Other", "compute_cap": "8.6", "memory.total": "24564 MiB"}], [])[code > 0]
    )


def test_without_the_tool_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu_facts.cache_clear()
    try:
        assert gpu_facts() == []
    finally:
        gpu_facts.cache_clear()


def test_all_facts_go_through_json() -> None:
    assert json.loads(json.dumps(facts())) == facts()
    assert set(facts()) == {"cpu", "gpus", "platform", "versions"}
