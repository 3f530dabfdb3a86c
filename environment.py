"""Facts about the machine and the installed versions, recorded in every manifest and report."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES_OF_RECORD = (
    "limbeck",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-extensions",
    "openvino",
    "openvino-tokenizers",
    "nncf",
    "tensorrt",
    "executorch",
    "torchao",
    "numpy",
)
_INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "sve",
)


def installed_version(package: str) -> str | None:
    """The installed version of a pip package, or `None`; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    """Whether `import module` would find something; imports nothing."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def versions() -> dict[str, str]:
    """Installed versions of what shapes an artifact, and Python's own."""
    found = {package: version for package in PACKAGES_OF_RECORD if (version := installed_version(package))}
    return {"python": platform.python_version(), **found}


def available_cpus() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cpus_to_pin(threads: int) -> list[int]:
    """The logical CPUs, of those that this process may use, that a process of so many threads is best pinned to: one a
    core as far as there are cores, the low numbers first (where cores differ, the fast ones come first). Empty where
    the system pins no processes."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    taken: dict[str, int] = {}
    ranked = []
    for cpu in sorted(os.sched_getaffinity(0)):
        core = _core_of(cpu)
        ranked.append((taken.get(core, 0), cpu))
        taken[core] = taken.get(core, 0) + 1
    return sorted(cpu for _, cpu in sorted(ranked)[:threads])


def available_cores() -> int:
    """Cores behind the logical CPUs that this process may use: fewer where two CPUs share one."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})


def _core_of(cpu: int) -> str:
    """The CPUs that share its core, as Linux lists them."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


@functools.cache
def cpu_facts() -> dict[str, Any]:
    """Model name, logical CPUs available, memory in bytes, and the instruction sets that decide speed
    (VNNI for int8, bf16 and AMX for matrix products)."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    name = value.strip()
                elif key.strip() in ("flags", "Features"):
                    flags = set(value.split())
                    break
    except OSError:
        pass  # not Linux: the name from `platform` has to do
    return {
        "name": name,
        "machine": platform.machine(),
        "cpus": available_cpus(),
        "memory_bytes": _memory_bytes(),
        "instruction_sets": [flag for flag in _INSTRUCTION_SETS if flag in flags],
    }


def multiplies_bf16() -> bool:
    """Whether the CPU has bfloat16 matrix instructions; without them it is dozens of times slower than float32."""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu_facts()["instruction_sets"]))


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


@functools.cache
def gpu_facts() -> list[dict[str, str]]:
    """NVIDIA GPUs as `nvidia-smi` reports them (name, driver, compute capability, memory); empty without one."""
    fields = ("name", "driver_version", "compute_cap", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(fields, (cell.strip() for cell in line.split(",")), strict=False)) for line in output.splitlines()]


def has_sparse_tensor_cores(gpu: Mapping[str, str]) -> bool:
    """Whether a GPU of `gpu_facts` has tensor cores that skip the zeros of 2:4 sparse matrices: NVIDIA's have them from
    Ampere on (compute capability 8.0)."""
    major = gpu.get("compute_cap", "").partition(".")[0]
    return major.isdecimal() and int(major) >= 8


def device_facts() -> dict[str, Any]:
    """What this machine offers now: the CPU with the threads that runtimes take and the memory that is free (bytes),
    and the GPUs. For people: manifests keep `cpu_facts` and `gpu_facts`, which do not change from call to call."""
    import psutil

    cpu = {
        **cpu_facts(),
        "logical_cpus": os.cpu_count(),
        "threads": available_cpus(),
        "memory_available_bytes": psutil.virtual_memory().available,
    }
    return {"cpu": cpu, "gpus": [{**gpu, "sparse_tensor_cores": has_sparse_tensor_cores(gpu)} for gpu in gpu_facts()]}


def facts() -> dict[str, Any]:
    """Everything above in one JSON-ready value."""
    return {"cpu": cpu_facts(), "gpus": gpu_facts(), "platform": platform.platform(), "versions": versions()}


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: the folder that `LIMBECK_CACHE` names, else limbeck's in the
    user's cache."""
    if own := os.environ.get("LIMBECK_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck"
