"""Our TensorRT code against NVIDIA's real Python bindings, on a machine without TensorRT or GPU.

The bindings (`tensorrt_cu13_bindings`) load when three empty libraries stand in for libnvinfer. No builder can be made
then, but every class, member and signature is NVIDIA's: a name that TensorRT drops or renames fails here.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import limbeck

BACKENDS = Path(limbeck.__file__).parent / "backends"
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
    "getInferLibVersion",
)
# What our variables of these names hold.
CLASSES = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "inspector": "EngineInspector",
}
# What Polygraphy 0.53.6 calls on the way from `network_from_onnx_path` to the engine's bytes and back.
POLYGRAPHY = {
    "Builder": (
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
    ),
    "IBuilderConfig": (
        "add_optimization_profile",
        "set_flag",
        "clear_flag",
        "get_flag",
        "set_memory_pool_limit",
        "get_memory_pool_limit",
        "create_timing_cache",
        "set_timing_cache",
        "profiling_verbosity",
        "builder_optimization_level",
        "hardware_compatibility_level",
        "default_device_type",
        "DLA_core",
        "engine_capability",
        "num_optimization_profiles",
    ),
    "INetworkDefinition": ("num_inputs", "get_input"),
    "ITensor": ("name", "shape", "dtype", "is_shape_tensor"),
    "IOptimizationProfile": ("set_shape", "set_shape_input"),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "BuilderFlag": ("SPARSE_WEIGHTS", "TF32", "VERSION_COMPATIBLE"),
    "HardwareCompatibilityLevel": ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"),
    "MemoryPoolType": ("WORKSPACE",),
    "DeviceType": ("DLA",),
    "Logger": ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"),
    "ILogger": ("log",),
}
SIGNATURES = {
    "Builder.create_network": "flags: typing.SupportsInt",
    "Builder.build_serialized_network": "network: tensorrt_bindings.tensorrt.INetworkDefinition, config:",
    "OnnxParser.parse_from_file": "model: str",
    "Runtime.deserialize_cuda_engine": "serialized_engine: typing_extensions.Buffer",
    "IExecutionContext.set_input_shape": "name: str, shape: tuple) -> bool",
    "IExecutionContext.set_tensor_address": "name: str, memory: typing.SupportsInt",
    "IExecutionContext.execute_async_v3": "stream_handle: typing.SupportsInt) -> bool",
    "IExecutionContext.get_tensor_shape": "name: str",
    "ICudaEngine.get_tensor_profile_shape": "name: str, profile_index: typing.SupportsInt) -> list",
    "EngineInspector.get_engine_information": "LayerInformationFormat) -> str",
    "IOptimizationProfile.set_shape": "input: str, min: tensorrt_bindings.tensorrt.Dims, opt:",
}

PRELUDE = """
import json, sys
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt  # the package `tensorrt` is these bindings plus the libraries
"""


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the bindings load."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("NVIDIA's bindings are not installed: pip install --no-deps tensorrt_cu13_bindings==11.4.0.106")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make the stand-in libraries with")
    folder = tmp_path_factory.mktemp("libraries")
    source = folder / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in LIBRARIES:
        target = str(folder / library)
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", target, source], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def run(bindings: dict[str, str], code: str) -> object:
    """What the code prints last, as JSON, from a process in which the bindings are loaded."""
    command = [sys.executable, "-c", PRELUDE + code]
    done = subprocess.run(command, env=bindings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2_000:]
    return json.loads(done.stdout.splitlines()[-1])


def absent(bindings: dict[str, str], names: list[str]) -> object:
    """Which of the dotted names the bindings do not have."""
    code = """
import functools
def missing(name):
    try:
        functools.reduce(getattr, name.split("."), trt)
    except AttributeError:
        return True
    return False
print(json.dumps([name for name in %r if missing(name)]))
"""
    return run(bindings, code % (names,))


def used_by_us() -> set[str]:
    """Every dotted name below `trt` in our files, and every method called on an object of TensorRT's."""
    names: set[str] = set()
    for file in ("tensorrt_build.py", "tensorrt_engine.py"):
        for node in ast.walk(ast.parse((BACKENDS / file).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner, _, rest = ast.unparse(node).removeprefix("self.").partition(".")
            if owner == "trt":
                names.add(rest)
            elif owner in CLASSES and rest and "." not in rest:
                names.add(f"{CLASSES[owner]}.{rest}")
    return names


def test_every_name_that_we_use_is_tensorrts(bindings: dict[str, str]) -> None:
    names = used_by_us()
    assert {"Runtime.deserialize_cuda_engine", "LayerInformationFormat.JSON", "DataType.HALF"} <= names
    assert {"IExecutionContext.execute_async_v3", "EngineInspector.get_engine_information"} <= names
    assert len(names) > 25
    assert absent(bindings, sorted(names)) == []


def test_every_name_that_polygraphy_uses_for_us_is_tensorrts(bindings: dict[str, str]) -> None:
    names = [f"{owner}.{name}" for owner, members in POLYGRAPHY.items() for name in members]
    assert absent(bindings, [*names, "init_libnvinfer_plugins"]) == []


def test_a_renamed_member_would_be_noticed(bindings: dict[str, str]) -> None:
    # Precision flags are gone since TensorRT 11: the check has to see that.
    assert absent(bindings, ["BuilderFlag.FP16", "BuilderFlag.TF32"]) == ["BuilderFlag.FP16"]


def test_calls_have_the_signatures_that_we_call_them_with(bindings: dict[str, str]) -> None:
    code = "print(json.dumps({name: getattr(getattr(trt, name.split('.')[0]), name.split('.')[1]).__doc__ for name in "
    documented = run(bindings, code + f"{list(SIGNATURES)!r}}}))")
    assert isinstance(documented, dict)
    assert [name for name, signature in SIGNATURES.items() if signature not in documented[name]] == []


def test_the_plan_becomes_polygraphys_configuration(bindings: dict[str, str]) -> None:
    code = """
from limbeck.backends.tensorrt_build import builder_config
from limbeck.exporters.build_plan import BuildPlan
from limbeck.exporters.settings import ExportSettings
plan = BuildPlan.of(ExportSettings(backend="tensorrt", precision="fp16", sparsity="2:4"), ["input_ids"], 20)
plan = plan.model_copy(update={"workspace_bytes": 1 << 30, "hardware_compatibility": "AMPERE_PLUS"})
config = builder_config(plan)
found = config.profiles[0]["input_ids"]
print(json.dumps({
    "sparse": config.sparse_weights, "tf32": config.tf32, "fp16": config.fp16,
    "profile": [list(found.min), list(found.opt), list(found.max)],
    "workspace": config.memory_pool_limits[trt.MemoryPoolType.WORKSPACE],
    "level": config.builder_optimization_level,
    "hardware": config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS,
}))
"""
    assert run(bindings, code) == {
        "sparse": True,
        "tf32": False,
        "fp16": False,
        "profile": [[1, 1], [8, 128], [64, 512]],
        "workspace": 1 << 30,
        "level": 3,
        "hardware": True,
    }


def test_tensorrts_log_is_captured_through_polygraphy(bindings: dict[str, str]) -> None:
    code = """
from polygraphy.backend.trt import get_trt_logger
from limbeck.backends.tensorrt_build import captured_log, sparsity_lines
lines = []
with captured_log(lines):
    get_trt_logger().log(trt.Logger.VERBOSE, "(Sparsity) Layers eligible for sparse math: query, key")
    get_trt_logger().log(trt.Logger.INFO, "(Sparsity) TRT inference plan picked sparse implementation for layers: key")
    get_trt_logger().log(trt.Logger.WARNING, "a warning")
get_trt_logger().log(trt.Logger.VERBOSE, "not ours")
print(json.dumps([sparsity_lines(lines), [line for line in lines if "warning" in line], lines]))
"""
    found = run(bindings, code)
    assert isinstance(found, list)
    sparsity, warnings, captured = found
    assert "query, key" in sparsity["eligible"][0] and "layers: key" in sparsity["picked"][0]
    assert warnings[0].lstrip().startswith("[W]")
    assert not any("not ours" in line for line in captured)


def test_engine_types_have_torch_types(bindings: dict[str, str]) -> None:
    code = """
import torch
from limbeck.backends.tensorrt_engine import torch_dtypes
print(json.dumps({kind.name: str(dtype) for kind, dtype in torch_dtypes(trt, torch).items()}))
"""
    types = run(bindings, code)
    assert isinstance(types, dict)
    assert types["INT64"] == "torch.int64" and types["HALF"] == "torch.float16" and types["BF16"] == "torch.bfloat16"
