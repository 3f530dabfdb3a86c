"""Kit -> engine, through Polygraphy's Python API; needs TensorRT and a GPU.

Written against TensorRT 11.4 and Polygraphy 0.53.6 (`tests/backends/test_tensorrt_contract.py` holds it to them). A
plan with 2:4 sparsity is built twice, with and without sparse kernels, and both are timed: its gain is measured.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailable, InputError
from ..exporters.build_plan import PLAN_FILE, BuildPlan, Profile
from .base import BuildJob
from .tensorrt_device import BUILT_ON, here, require_precision
from .tensorrt_log import captured_log, first_error, layer_evidence, sparsity_of

LOG_FILE = "build.log"
LAYERS_FILE = "layers.json"
_SHOWN_DEPTH = 2
"""Phases of the builder that are told of: its outermost, and those just below."""
ROUNDS, CALLS = 20, 10
"""Turns that each of two engines has, and timed calls in a turn, after one that is not."""


def build_engine(job: BuildJob, engine_file: Path) -> dict[str, Any]:
    """Build the kit's graph; writes the engine, `layers.json` (the inspector's list), `build.log` and the plan.

    Returns:
        Evidence for the manifest: the device it was built on, what the log says of sparsity, the layers' precisions and
        kernels, warnings, and the latency of the dense twin where the plan asks for sparsity.

    Raises:
        InputError: TensorRT cannot build the graph; its last error is in the message.
        BackendUnavailable: a precision that this GPU does not have.
    """
    folder, lines = engine_file.parent, list[str]()
    plan, device = BuildPlan.load(job.kit), here()
    require_precision(plan, device)
    job.progress("building the engine (this can take minutes)")
    try:
        with captured_log(lines):
            layers = _compile(job, plan, engine_file, lines)
    finally:
        (folder / LOG_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / LAYERS_FILE).write_text(json.dumps(layers, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(job.kit / PLAN_FILE, folder / PLAN_FILE)
    sparse = "SPARSE_WEIGHTS" in plan.flags
    return {
        BUILT_ON: device.model_dump(),
        **layer_evidence(layers),
        "sparsity": sparsity_of(lines),
        "warnings": [line.strip() for line in lines if line.lstrip().startswith("[W]")],
        **({"dense twin": _dense_twin(job, plan, engine_file)} if sparse else {}),
    }


def _compile(job: BuildJob, plan: BuildPlan, engine_file: Path, lines: list[str]) -> Any:
    """Write the engine; returns the inspector's list of its layers."""
    import tensorrt as trt
    from polygraphy.backend.trt import engine_bytes_from_network, engine_from_bytes, network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    cache = str(job.timing_cache) if job.timing_cache is not None else None
    monitor = progress_monitor(job)
    try:
        network = network_from_onnx_path(str(job.kit / plan.graph))
        config = builder_config(plan, monitor, cache)
        built = engine_bytes_from_network(network, config=config, save_timing_cache=cache)
        engine_file.write_bytes(built)
        engine = engine_from_bytes(engine_file.read_bytes())
        inspector = engine.create_engine_inspector()
        return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except PolygraphyException as error:
        if monitor.interrupted:
            raise KeyboardInterrupt from error
        cause = first_error(lines) or str(error)
        raise InputError(f"TensorRT {trt.__version__} could not build {job.kit}: {cause.strip()}") from error


def builder_config(plan: BuildPlan, monitor: Any = None, timing_cache: str | None = None) -> Any:
    """Polygraphy's `CreateConfig` for a plan: a callable that makes the `IBuilderConfig` of a network."""
    import tensorrt as trt
    from polygraphy.backend.trt import CreateConfig

    workspace = {trt.MemoryPoolType.WORKSPACE: plan.workspace_bytes} if plan.workspace_bytes is not None else None
    return CreateConfig(
        profiles=[_polygraphy_profile(profile) for profile in plan.profiles],
        sparse_weights="SPARSE_WEIGHTS" in plan.flags,
        tf32="TF32" in plan.flags,
        memory_pool_limits=workspace,
        builder_optimization_level=plan.builder_optimization_level,
        version_compatible=plan.version_compatible,
        hardware_compatibility_level=getattr(trt.HardwareCompatibilityLevel, plan.hardware_compatibility),
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        progress_monitor=monitor,
        load_timing_cache=timing_cache,
    )


def _polygraphy_profile(shapes: Mapping[str, Profile]) -> Any:
    from polygraphy.backend.trt import Profile as PolygraphyProfile

    profile = PolygraphyProfile()
    for name, of_input in shapes.items():
        profile.add(name, min=tuple(of_input.min), opt=tuple(of_input.opt), max=tuple(of_input.max))
    return profile


def progress_monitor(job: BuildJob) -> Any:
    """A `tensorrt.IProgressMonitor` that passes the builder's phases and steps on; an interrupt stops the build."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # pybind11 wants its own constructor called by name
            self.interrupted = False
            self._open: dict[str, int] = {}
            self._depth: dict[str, int] = {}
            self._told: set[str] = set()
            self._last = ""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._open[phase_name] = num_steps
            self._depth[phase_name] = self._depth.get(parent_phase or "", 0) + 1
            if self._depth[phase_name] <= _SHOWN_DEPTH and phase_name not in self._told:
                self._told.add(phase_name)
                self._last = phase_name
                job.progress(f"TensorRT: {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name == self._last:
                    job.advance(step + 1, self._open[phase_name])
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._open.pop(phase_name, None)

    return Monitor()


def _dense_twin(job: BuildJob, plan: BuildPlan, engine_file: Path) -> dict[str, Any]:
    """Build the same graph without sparse kernels and time it against the engine, in turn on this GPU."""
    from .tensorrt_engine import EngineRunner

    job.progress("building the dense twin")
    dense = plan.model_copy(update={"flags": [flag for flag in plan.flags if flag != "SPARSE_WEIGHTS"]})
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        twin = Path(scratch) / engine_file.name
        with captured_log(lines):
            _compile(job, dense, twin, lines)
        job.progress("timing the engine and its dense twin in turn")
        try:
            runners = {
                name: EngineRunner(path, cuda_graphs=plan.cuda_graphs)
                for name, path in (("sparse", engine_file), ("dense", twin))
            }
        except BackendUnavailable as error:
            return {"not timed": error.message}
        rows = []
        for profile in plan.profiles:
            batch = batch_of(profile)
            rows.append({"shape": _shape_text(profile), **in_turn({n: r.stopwatch(batch) for n, r in runners.items()})})
        for runner in runners.values():
            runner.close()
    return {"rounds": ROUNDS, "calls a round": CALLS, "shapes": rows}


def in_turn(stopwatches: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Medians in milliseconds of `sparse` and `dense`, whose turns alternate, and how many times faster sparse is."""
    times: dict[str, list[float]] = {name: [] for name in stopwatches}
    for _ in range(ROUNDS):
        for name, stopwatch in stopwatches.items():
            stopwatch()  # the other's turn emptied the caches
            times[name] += [stopwatch() for _ in range(CALLS)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "sparse ms": medians["sparse"],
        "dense ms": medians["dense"],
        "ratio": medians["dense"] / medians["sparse"],
    }


def batch_of(profile: Mapping[str, Profile]) -> dict[str, Any]:
    """A full batch of the shape that a profile is tuned for, int64; token 0 is in every vocabulary, and what the
    tokens are does not change the time."""
    import torch

    fill = {"attention_mask": torch.ones}
    return {name: fill.get(name, torch.zeros)(tuple(shapes.opt), dtype=torch.int64) for name, shapes in profile.items()}


def _shape_text(profile: Mapping[str, Profile]) -> str:
    return " x ".join(str(size) for size in next(iter(profile.values())).opt)
