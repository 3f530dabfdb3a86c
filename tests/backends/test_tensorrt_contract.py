"""Our TensorRT code against NVIDIA's real Python bindings, on a machine without TensorRT or GPU.

The bindings (`tensorrt_cu13_bindings`) load when three empty libraries stand in for libnvinfer. No builder can be made
then, but every class, member and signature is NVIDIA's: a name that TensorRT drops or renames fails here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
# What our variables and attributes of these names hold, a leading underscore aside.
CLASSES = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
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
        "get_timing_cache",
        "progress_monitor",
        "profiling_verbosity",
        "builder_optimization_level",
        "hardware_compatibility_level",
        "default_device_type",
        "DLA_core",
        "engine_capability",
        "num_optimization_profiles",
    ),
    "ITimingCache": ("combine", "serialize"),
    "IHostMemory": ("__enter__", "__exit__"),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
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
    "IExecutionContext.set_optimization_profile_async": (
        "profile_index: typing.SupportsInt, stream_handle: typing.SupportsInt) -> bool"
    ),
    "ICudaEngine.create_execution_context": "create_execution_context(self: tensorrt_bindings.tensorrt.ICudaEngine",
    "ICudaEngine.get_tensor_dtype": "name: str) -> tensorrt_bindings.tensorrt.DataType",
    "ICudaEngine.get_tensor_mode": "name: str) -> tensorrt_bindings.tensorrt.TensorIOMode",
    "ICudaEngine.get_tensor_name": "index: typing.SupportsInt) -> str",
    "IProgressMonitor.phase_start": "phase_name: str, parent_phase: str, num_steps: typing.SupportsInt) -> None",
    "IProgressMonitor.step_complete": "phase_name: str, step: typing.SupportsInt) -> bool",
    "IProgressMonitor.phase_finish": "phase_name: str) -> None",
    "IBuilderConfig.create_timing_cache": "serialized_timing_cache: typing_extensions.Buffer",
    "ITimingCache.combine": "input_cache: tensorrt_bindings.tensorrt.ITimingCache, ignore_mismatch: bool) -> bool",
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


def our_files() -> list[Path]:
    """Every file of ours that may import tensorrt, found by its name."""
    return sorted(BACKENDS.glob("tensorrt*.py"))


def attributes(file: Path) -> list[list[str]]:
    """Every attribute that a file looks up, as the dotted parts of its expression."""
    parsed = ast.parse(file.read_text(encoding="utf-8"))
    return [ast.unparse(node).split(".") for node in ast.walk(parsed) if isinstance(node, ast.Attribute)]


def used_by_us() -> set[str]:
    """Every dotted name below `trt` in our files, and every member of an object of TensorRT's."""
    names: set[str] = set()
    for file in our_files():
        for parts in attributes(file):
            if parts[0] == "trt":
                names.add(".".join(parts[1:]))
            elif parts[-2].removeprefix("_") in CLASSES and not parts[-1].startswith("__"):
                names.add(f"{CLASSES[parts[-2].removeprefix('_')]}.{parts[-1]}")
    return names


def test_every_name_that_we_use_is_tensorrts(bindings: dict[str, str]) -> None:
    names = used_by_us()
    assert {"Runtime.deserialize_cuda_engine", "LayerInformationFormat.JSON", "DataType.HALF"} <= names
    assert {"IExecutionContext.execute_async_v3", "EngineInspector.get_engine_information"} <= names
    assert {"IExecutionContext.set_optimization_profile_async", "ICudaEngine.num_optimization_profiles"} <= names
    assert {"IProgressMonitor", "ICudaEngine.create_execution_context"} <= names
    assert len(names) > 30
    assert absent(bindings, sorted(names)) == []


def test_tensorrt_goes_by_one_name_in_our_files_so_that_nothing_escapes_the_check() -> None:
    root = BACKENDS.parent
    others = [path for path in root.rglob("*.py") if "tests" not in path.parts and ".venv" not in path.parts]
    importing = {path.name for path in others if "import tensorrt as trt" in path.read_text(encoding="utf-8")}
    assert importing <= {file.name for file in our_files()} and len(importing) >= 3
    for file in our_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert all(name.asname == "trt" for name in node.names if name.name.startswith("tensorrt")), file
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not str(node.module).startswith("tensorrt"), file


def test_every_function_of_polygraphy_that_we_import_is_there_with_the_arguments_that_we_give(
    bindings: dict[str, str],
) -> None:
    imported = {
        (str(node.module), name.name)
        for file in our_files()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("polygraphy")
        for name in node.names
    }
    assert ("polygraphy.backend.trt", "CreateConfig") in imported and len(imported) >= 5
    code = f"""
import importlib, inspect
lost = [f"{{module}}.{{name}}" for module, name in {sorted(imported)!r}
        if not hasattr(importlib.import_module(module), name)]
from polygraphy.backend.trt import EngineBytesFromNetwork, PostprocessConfig
from polygraphy.backend.trt.config import _CreateConfigCommon
print(json.dumps([lost, list(inspect.signature(_CreateConfigCommon.__init__).parameters),
                  list(inspect.signature(EngineBytesFromNetwork.__init__).parameters)]))
"""
    lost, config, engine = run(bindings, code)  # type: ignore[misc]
    assert lost == []
    assert {"profiles", "progress_monitor", "load_timing_cache", "hardware_compatibility_level"} <= set(config)
    assert {"network", "config", "save_timing_cache"} <= set(engine)


def test_torchs_cuda_has_what_the_runner_calls() -> None:
    cuda = [parts for parts in attributes(BACKENDS / "tensorrt_engine.py") if parts[:2] == ["torch", "cuda"]]
    names = {parts[2].partition("(")[0] for parts in cuda if len(parts) > 2}
    assert {"CUDAGraph", "graph", "Event", "Stream", "current_stream"} <= names
    assert [name for name in names if not hasattr(torch.cuda, name)] == []
    assert "stream" in inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"record", "synchronize", "elapsed_time"} <= set(dir(torch.cuda.Event))
    assert "synchronize" in dir(torch.cuda.Stream)  # `cuda_stream` is there in a torch with CUDA alone


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
from limbeck.exporters.options import TensorRTOptions
from limbeck.exporters.settings import ExportSettings
options = TensorRTOptions(
    profiles=[{"max_batch": 1}, {"min_batch": 8, "opt_batch": 32}], workspace_mb=1024, optimization_level=5,
    hardware_compatibility="ampere-plus", version_compatible=True,
)
settings = ExportSettings(backend="tensorrt", precision="fp16", sparsity="2:4")
config = builder_config(BuildPlan.of(settings, options, ["input_ids"], 20), monitor="a monitor", timing_cache="times")
print(json.dumps({
    "sparse": config.sparse_weights, "tf32": config.tf32, "fp16": config.fp16,
    "profiles": [[list(part) for part in (found["input_ids"].min, found["input_ids"].opt, found["input_ids"].max)]
                 for found in config.profiles],
    "workspace": config.memory_pool_limits[trt.MemoryPoolType.WORKSPACE],
    "level": config.builder_optimization_level,
    "hardware": config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    "versions": config.version_compatible,
    "monitor": config.progress_monitor, "cache": config.timing_cache_path,
}))
"""
    assert run(bindings, code) == {
        "sparse": True,
        "tf32": False,
        "fp16": False,
        "profiles": [[[1, 1], [1, 128], [1, 512]], [[8, 1], [32, 128], [64, 512]]],
        "workspace": 1 << 30,
        "level": 5,
        "hardware": True,
        "versions": True,
        "monitor": "a monitor",
        "cache": "times",
    }


def test_the_builders_phases_are_told(bindings: dict[str, str]) -> None:
    code = """
from pathlib import Path
from limbeck.backends.base import BuildJob
from limbeck.backends.tensorrt_build import progress_monitor
told = []
job = BuildJob(Path("kit"), None, progress=told.append, advance=lambda done, total: told.append([done, total]))
monitor = progress_monitor(job)
assert isinstance(monitor, trt.IProgressMonitor)
monitor.phase_start("Building an engine", None, 2)
monitor.phase_start("Timing graph nodes", "Building an engine", 3)
going_on = [monitor.step_complete("Timing graph nodes", step) for step in range(2)]
monitor.phase_start("Timing one node", "Timing graph nodes", 1)
monitor.step_complete("Timing one node", 0)
monitor.phase_finish("Timing one node")
monitor.phase_finish("Timing graph nodes")

def interrupt(done, total):
    raise KeyboardInterrupt
stopped = progress_monitor(BuildJob(Path("kit"), None, advance=interrupt))
stopped.phase_start("Building an engine", None, 2)
print(json.dumps([told, going_on, stopped.step_complete("Building an engine", 0), stopped.interrupted]))
"""
    told, going_on, stopped, interrupted = run(bindings, code)  # type: ignore[misc]
    assert told == ["TensorRT: Building an engine", "TensorRT: Timing graph nodes", [1, 3], [2, 3]]
    assert going_on == [True, True]
    assert stopped is False and interrupted is True


def test_tensorrts_log_is_captured_through_polygraphy(bindings: dict[str, str]) -> None:
    code = """
from polygraphy.backend.trt import get_trt_logger
from limbeck.backends.tensorrt_log import captured_log, first_error, sparsity_of
lines = []
with captured_log(lines):
    get_trt_logger().log(trt.Logger.VERBOSE, "(Sparsity) Layers eligible for sparse math: query, key + Add_4")
    get_trt_logger().log(trt.Logger.INFO, "(Sparsity) TRT inference plan picked sparse implementation for layers: key")
    get_trt_logger().log(trt.Logger.WARNING, "a warning")
    get_trt_logger().log(trt.Logger.ERROR, "what went wrong")
get_trt_logger().log(trt.Logger.VERBOSE, "not ours")
print(json.dumps([sparsity_of(lines), [line for line in lines if "warning" in line], first_error(lines), lines]))
"""
    found = run(bindings, code)
    assert isinstance(found, list)
    sparsity, warnings, error, captured = found
    assert sparsity == {"eligible": ["query", "key + Add_4"], "picked": ["key"]}
    assert warnings[0].lstrip().startswith("[W]")
    assert error is not None and "what went wrong" in error
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
