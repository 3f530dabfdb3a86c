"""Kit -> engine, through Polygraphy's Python API; needs TensorRT and a GPU.

Written against TensorRT 11.4 and Polygraphy 0.53.6 (`tests/backends/test_tensorrt_contract.py` holds it to them). The
engine is built once, with the flags of the plan: what 2:4 gains over the dense twin is measured by `limbeck bench` on
two engines, one of a kit exported with `--sparsity 2:4` and one without.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..exporters.build_plan import PLAN_FILE, BuildPlan
from .base import Progress

LOG_FILE = "build.log"
LAYERS_FILE = "layers.json"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_SPARSITY = {
    "eligible": re.compile(r"layers? eligible for sparse math", re.IGNORECASE),
    "picked": re.compile(r"picked sparse implementation", re.IGNORECASE),
}


def build_engine(kit: Path, plan: BuildPlan, engine_file: Path, progress: Progress) -> dict[str, Any]:
    """Build the kit's graph; writes the engine, `layers.json` (the inspector's list), `build.log` and the plan.

    Returns:
        Evidence for the manifest: what the log says of sparsity, the layers' kernels, warnings.

    Raises:
        InputError: TensorRT cannot build the graph; its last error is in the message.
    """
    import tensorrt as trt
    from polygraphy.backend.trt import engine_bytes_from_network, engine_from_bytes, network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    folder = engine_file.parent
    lines: list[str] = []
    progress("building the engine (this can take minutes)")
    try:
        with captured_log(lines):
            network = network_from_onnx_path(str(kit / plan.graph))
            engine_file.write_bytes(engine_bytes_from_network(network, config=builder_config(plan)))
            progress("inspecting the engine")
            engine = engine_from_bytes(engine_file.read_bytes())
            inspector = engine.create_engine_inspector()
            layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except PolygraphyException as error:
        cause = next((line for line in reversed(lines) if "error" in line.lower()), str(error))
        raise InputError(f"TensorRT {trt.__version__} could not build {kit}: {cause.strip()}") from error
    finally:
        (folder / LOG_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / LAYERS_FILE).write_text(json.dumps(layers, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(kit / PLAN_FILE, folder / PLAN_FILE)
    names = [_name_of(layer) for layer in layers.get("Layers", [])]
    return {
        "tensorrt": str(trt.__version__),
        "layers": len(names),
        "sparsity": sparsity_lines(lines),
        "sparse kernels": [name for name in names if "sparse" in name.lower()],
        "warnings": [line for line in lines if line.lstrip().startswith("[W]")],
        "dense twin": "not timed in this build",
    }


def builder_config(plan: BuildPlan) -> Any:
    """Polygraphy's `CreateConfig` for a plan: a callable that makes the `IBuilderConfig` of a network."""
    import tensorrt as trt
    from polygraphy.backend.trt import CreateConfig, Profile

    profile = Profile()
    for name, shapes in plan.profiles.items():
        profile.add(name, min=tuple(shapes.min), opt=tuple(shapes.opt), max=tuple(shapes.max))
    workspace = {trt.MemoryPoolType.WORKSPACE: plan.workspace_bytes} if plan.workspace_bytes is not None else None
    return CreateConfig(
        profiles=[profile],
        sparse_weights="SPARSE_WEIGHTS" in plan.flags,
        tf32="TF32" in plan.flags,
        memory_pool_limits=workspace,
        builder_optimization_level=plan.builder_optimization_level,
        version_compatible=plan.version_compatible,
        hardware_compatibility_level=getattr(trt.HardwareCompatibilityLevel, plan.hardware_compatibility),
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
    )


@contextmanager
def captured_log(lines: list[str]) -> Iterator[None]:
    """Collect what TensorRT and Polygraphy log, verbose lines included, instead of printing it."""
    from polygraphy.logger import G_LOGGER

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.extend(_COLOURS.sub("", record.getMessage()).splitlines())

    logger = logging.getLogger("Polygraphy")  # where Polygraphy sends its lines when told to use `logging`
    collector = Collector(level=0)
    before = (G_LOGGER.use_python_logging_system, G_LOGGER.module_severity, logger.level, logger.propagate)
    G_LOGGER.use_python_logging_system = True
    G_LOGGER.module_severity = {"": G_LOGGER.EXTRA_VERBOSE}  # TensorRT's own verbose lines
    logger.setLevel(1)
    logger.propagate = False
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)
        logger.setLevel(before[2])
        logger.propagate = before[3]
        G_LOGGER.module_severity = before[1]
        G_LOGGER.use_python_logging_system = before[0]


def sparsity_lines(lines: Sequence[str]) -> dict[str, list[str]]:
    """The log's lines on which layers are eligible for sparse math and for which sparse kernels were picked."""
    return {what: [line.strip() for line in lines if wanted.search(line)] for what, wanted in _SPARSITY.items()}


def _name_of(layer: Any) -> str:
    """A layer of the inspector's list: a name, or a table with its tactic where the engine was built verbosely."""
    return f"{layer.get('Name', '')} {layer.get('TacticName', '')}".strip() if isinstance(layer, dict) else str(layer)
