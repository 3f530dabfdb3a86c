"""TensorRT: kits are exported anywhere, engines are built and run on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environment import gpu_facts, installed_version, is_importable
from ..errors import BackendUnavailable
from .base import Availability, Backend, BuildJob, ExportJob, Runner

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..exporters.activation_ranges import ActivationRange
    from ..exporters.artifact import Manifest
    from ..exporters.layer_facts import ProgramFacts
    from ..exporters.options import TensorRTOptions
    from ..exporters.program import ExportedProgram, ProgramWeight

KIT, ENGINE = "tensorrt", "tensorrt-engine"
PLAN_NAME = "model.engine"
_INSTALL_EXPORT = 'pip install "limbeck[onnx]"'
# tensorrt's wheels lie on NVIDIA's own package index; which one is in their guide.
_INSTALL = (
    'pip install tensorrt "limbeck[tensorrt]" (with NVIDIA\'s package index: see the TensorRT installation guide)'
)
_NEEDS_GPU = "Use a machine with an NVIDIA GPU and driver, and there: " + _INSTALL
_FLOAT32_REST = "Keep what is not quantised in float32: --option rest=fp32."


class TensorRTBackend(Backend):
    """`--backend tensorrt`."""

    name = "tensorrt"
    summary = "TensorRT: a build kit anywhere, an engine where a GPU is"
    precisions = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
    default_precision = "fp16"
    formats = (KIT, ENGINE)
    sparsities = ("2:4",)
    built_format = ENGINE

    @classmethod
    def options(cls) -> type[TensorRTOptions]:
        from ..exporters.options import TensorRTOptions

        return TensorRTOptions

    def probe(self) -> Availability:
        missing = [module for module in ("onnx", "onnxscript", "onnxruntime") if not is_importable(module)]
        if missing:
            return Availability(False, False, f"not installed: {', '.join(missing)}", _INSTALL_EXPORT)
        facts = {"tensorrt": installed_version("tensorrt") or "-"}
        lacking = missing_for_engines()
        if lacking:
            reason = f"kits are exported, engines are neither built nor run here: {'; '.join(lacking)}"
            return Availability(True, False, reason, _mend(lacking), facts)
        return Availability(True, True, facts={**facts, "gpu": gpu_facts()[0].get("name", "?")})

    def export(self, job: ExportJob, folder: Path) -> ExportedProgram:
        from ..exporters import onnx, tensorrt
        from ..exporters.build_plan import BuildPlan, profile_shapes
        from ..exporters.float_range import RANGE_OF_FLOAT32, float16_evidence
        from ..exporters.options import OPSET, checked_options
        from ..exporters.program import ExportedProgram
        from ..exporters.settings import CALIBRATED
        from ..exporters.sparsity import prunable_modules, require_pattern, sparsity_evidence

        options = checked_options(self.options(), job.settings.options, self.name)
        shapes = job.settings.shapes.within(job.checkpoint.max_length)
        settings = job.settings.model_copy(update={"shapes": shapes})
        profile_shapes(shapes, options)  # refuses what is out of range before minutes go into the graph
        job.progress("tracing the graph")
        exported = tensorrt.export_graph(job.checkpoint, settings, options.rest, job.calibration)
        exported.save_pretrained(folder)
        sparse_layers = sparsity_evidence(folder / onnx.GRAPH_FILE, prunable_modules(job.checkpoint))
        if settings.sparsity is not None:
            require_pattern(sparse_layers, job.checkpoint.source)
        rest = options.rest if settings.precision in CALIBRATED else settings.precision
        evidence = {}
        if rest == "fp16":
            job.progress("checking float16 ranges")
            hint = _FLOAT32_REST if settings.precision in CALIBRATED else RANGE_OF_FLOAT32
            found = float16_evidence(job.checkpoint, shapes, exported.program, job.calibration, hint)
            evidence["float16 range"] = found
        inputs = onnx.tensor_specs(exported.program.graph.inputs)
        plan = BuildPlan.of(settings, options, [spec.name for spec in inputs], OPSET)
        plan.save(folder)
        return ExportedProgram(
            format=KIT,
            inputs=inputs,
            outputs=onnx.tensor_specs(exported.program.graph.outputs),
            compile_properties={
                "flags": ", ".join(plan.flags),
                "strongly typed": "yes",
                **({"where not quantised": rest} if settings.precision in CALIBRATED else {}),
            },
            sparse_layers=sparse_layers,
            evidence=evidence,
            unverified="never built or run on a GPU",
            is_kit=True,
        )

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        if manifest.format == KIT:
            return KitRunner(folder, manifest.settings.precision, threads)
        lacking = missing_for_engines()
        if lacking:
            raise BackendUnavailable(
                f"{folder} is a TensorRT engine, which cannot run here: {'; '.join(lacking)}.", _mend(lacking)
            )
        from ..exporters.build_plan import BuildPlan
        from .tensorrt_device import here, require_same_device

        plan = BuildPlan.load(folder)
        require_same_device(folder, manifest, plan, here())
        from .tensorrt_engine import EngineRunner

        return EngineRunner(folder / PLAN_NAME, cuda_graphs=plan.cuda_graphs, host_code=plan.version_compatible)

    def runs_machine_code(self, manifest: Manifest) -> bool:
        """Every engine is: its kernels, and in a version-compatible one a runtime and plug-in libraries. NVIDIA calls
        opening one the same as running native code of whoever built it, on the GPU and the host, and what is said of
        TensorRT 10 is that libraries inside run whether or not host code is allowed."""
        return manifest.format == ENGINE

    def build(self, job: BuildJob, folder: Path) -> dict[str, Any]:
        lacking = missing_for_engines()
        if lacking:
            raise BackendUnavailable(
                f"The kit {job.kit} cannot be built into an engine here: {'; '.join(lacking)}.", _mend(lacking)
            )
        from .tensorrt_build import build_engine

        return build_engine(job, folder / PLAN_NAME)

    def built_shapes(self, folder: Path) -> list[tuple[int, int]]:
        from ..exporters.build_plan import BuildPlan

        shapes = []
        for profile in BuildPlan.load(folder).profiles:
            first = next(iter(profile.values()))
            batch, sequence = first.min
            # The kit's graph runs on the CPU: full batches would take it minutes.
            several = min(max(3, batch), first.max[0])
            shapes += [(batch, sequence), (several, first.opt[1]), (batch, first.max[1])]
        return list(dict.fromkeys(shapes))

    def weights(self, folder: Path, manifest: Manifest, module: torch.nn.Module) -> Iterator[ProgramWeight] | None:
        if manifest.format != KIT:
            return None  # an engine shows its weights to nobody
        from ..exporters.onnx import GRAPH_FILE, read_weights

        return read_weights(folder / GRAPH_FILE)

    def intermediates(self, folder: Path, manifest: Manifest, modules: Sequence[str]) -> Runner | None:
        if manifest.format != KIT:
            return None
        from ..exporters.onnx import GRAPH_FILE
        from .onnx import showing_intermediates

        return showing_intermediates(folder / GRAPH_FILE, modules, manifest.settings.precision)

    def activation_ranges(self, folder: Path, manifest: Manifest) -> Iterator[ActivationRange] | None:
        if manifest.format != KIT:
            return None
        from ..exporters.activation_ranges import onnx_ranges
        from ..exporters.onnx import GRAPH_FILE

        return onnx_ranges(folder / GRAPH_FILE)

    def program_facts(self, folder: Path, manifest: Manifest, batch: int, sequence: int) -> ProgramFacts | None:
        if manifest.format != KIT:
            return None  # an engine shows its layers to TensorRT alone
        if not is_importable("onnx"):
            raise BackendUnavailable("Reading a kit's graph needs onnx, which is not installed.", _INSTALL_EXPORT)
        from ..exporters.onnx import GRAPH_FILE
        from ..exporters.onnx_facts import onnx_facts

        return onnx_facts(folder / GRAPH_FILE, batch, sequence)


class KitRunner(Runner):
    """A kit's graph on ONNX Runtime's CPU: for checks of accuracy, never for speed. ONNX Runtime has no bfloat16 on the
    CPU, so a bf16 kit runs as its float32 twin, with the weights that bfloat16 rounded."""

    def __init__(self, folder: Path, precision: str, threads: int | None = None) -> None:
        from ..exporters.onnx import GRAPH_FILE
        from .onnx import OnnxRunner, TwinRunner

        self._runner = (TwinRunner if precision == "bf16" else OnnxRunner)(folder / GRAPH_FILE, threads)
        arithmetic = {
            "bf16": "float32 with bfloat16 weights",
            "fp16": "float16 through float32",
            "tf32": "float32: a GPU rounds what it multiplies to 11 bits",
        }
        self.properties = {
            **self._runner.properties,
            "stands in for": "a TensorRT engine that was not built: the kit's graph, on the CPU",
            "arithmetic": arithmetic.get(precision, precision),
        }

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return self._runner(batch)

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        raise BackendUnavailable(
            "A TensorRT kit is not timed: what its graph takes on this CPU says nothing of its engine.",
            "Build it on the machine with the GPU (limbeck build), and time the engine there.",
        )


def missing_for_engines() -> list[str]:
    """What stands in the way of building and running engines on this machine, in words; empty if nothing does."""
    packages = [module for module in ("tensorrt", "polygraphy") if not is_importable(module)]
    lacking = [f"not installed: {', '.join(packages)}"] if packages else []
    return lacking if gpu_facts() else [*lacking, "there is no NVIDIA GPU (nvidia-smi lists none)"]


def _mend(lacking: list[str]) -> str:
    return _INSTALL if lacking[-1].startswith("not installed") else _NEEDS_GPU
