"""torch: eager, compiled when it is first called, or compiled ahead of time into a package; on the CPU and on CUDA."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..environment import cpu_facts, gpu_facts, installed_version
from ..errors import BackendUnavailable, UsageError
from .base import Availability, Backend, ExportJob, Runner

if TYPE_CHECKING:
    import torch

    from ..exporters.artifact import Manifest
    from ..exporters.layer_facts import ProgramFacts
    from ..exporters.options import TorchOptions
    from ..exporters.program import ExportedProgram, ProgramWeight
    from ..exporters.settings import ExportSettings
    from ..models.checkpoint import Checkpoint
    from .torch_runner import ModuleRunner, Place

FORMATS = {"aot": "torch-aot", "inductor": "torch-inductor", "eager": "torch-eager"}
"""A format a compiler: the first is machine code, the others are weights that transformers loads."""
SPARSITY = "2:4"
_NO_KERNELS = "torch has kernels for sparse weights on CUDA alone"


class TorchBackend(Backend):
    """`--backend torch`."""

    name = "torch"
    summary = "torch itself: AOTInductor package, torch.compile or eager, on CPU and CUDA"
    precisions = ("fp32", "bf16", "fp16")
    formats = tuple(FORMATS.values())
    sparsities = (SPARSITY,)
    writes_text = True
    reference_options: ClassVar[dict[str, Any]] = {"compiler": "eager"}

    @classmethod
    def options(cls) -> type[TorchOptions]:
        from ..exporters.options import TorchOptions

        return TorchOptions

    def probe(self) -> Availability:
        compiler = os.environ.get("CXX", "g++")
        gpus = gpu_facts()
        facts = {"torch": installed_version("torch") or "?", "gpu": gpus[0].get("name", "?") if gpus else "-"}
        if shutil.which(compiler) is None:
            reason = f"compiler=aot and compiler=inductor need a C++ compiler, and {compiler} is not installed"
            return Availability(True, True, reason, "apt-get install g++", facts)
        return Availability(True, True, facts={**facts, "C++ compiler": compiler})

    def check_settings(self, settings: ExportSettings) -> None:
        from ..exporters.options import checked_options
        from ..exporters.torch import require_compiler

        options = checked_options(self.options(), settings.options, self.name)
        if settings.sparsity is not None:
            _refuse_dense_kernels(settings, options)
        if options.device == "cuda":
            require_cuda()
        if options.compiler != "eager":
            require_compiler()

    def export(self, job: ExportJob, folder: Path) -> ExportedProgram:
        from ..exporters import torch as exporter
        from ..exporters.kv_cache import CachedTrace, keeps_cache
        from ..exporters.options import checked_options
        from ..exporters.program import ExportedProgram

        settings = job.settings
        self.check_settings(settings)
        options = checked_options(self.options(), settings.options, self.name)
        sparse_layers = exporter.sparse_layers(job.checkpoint) if options.device == "cuda" else []
        if settings.sparsity is not None:
            from ..exporters.sparsity import require_pattern

            require_pattern(sparse_layers, job.checkpoint.source)
        checkpoint = exporter.in_precision(job.checkpoint, settings.precision, options.device)
        cached = CachedTrace.of(checkpoint) if keeps_cache(checkpoint, settings) else None
        if options.compiler == "aot":
            job.progress("tracing the graph")
            traced = exporter.trace(checkpoint, settings, cached)
            job.progress("compiling it")
            exporter.compile_package(traced, folder)
        else:
            exporter.save_model(checkpoint, folder)
        inputs, outputs = exporter.tensor_specs(checkpoint, settings)
        program = ExportedProgram(
            format=FORMATS[options.compiler],
            inputs=inputs,
            outputs=outputs,
            sparse_layers=sparse_layers,
            cache=cached.facts(exporter.KEPT_IN[settings.precision]) if cached else None,
        )
        if settings.sparsity is None:
            return program
        return _timed_sparse(job, checkpoint, folder, program)

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        place = _place(manifest, threads)
        if manifest.format == FORMATS["aot"]:
            from .torch_runner import PackageRunner

            _require_same_device(folder, manifest, place)
            return PackageRunner(folder, manifest, place)
        return _module_runner(folder, manifest, place, sparse=manifest.settings.sparsity is not None)

    def runs_machine_code(self, manifest: Manifest) -> bool:
        return manifest.format == FORMATS["aot"]

    def weights(self, folder: Path, manifest: Manifest, module: torch.nn.Module) -> Iterator[ProgramWeight]:
        from ..exporters import torch as exporter

        if manifest.format == FORMATS["aot"]:
            return exporter.read_constants(folder / exporter.WEIGHTS_FILE)
        return exporter.read_model(folder, manifest)

    def intermediates(self, folder: Path, manifest: Manifest, modules: Sequence[str]) -> Runner | None:
        if manifest.format != FORMATS["eager"]:
            return None  # what is compiled has no modules any more
        from .torch_runner import InsideRunner

        return InsideRunner(folder, manifest, _place(manifest, None), modules)

    def program_facts(self, folder: Path, manifest: Manifest, batch: int, sequence: int) -> ProgramFacts:
        from ..exporters.torch_facts import model_facts, package_facts

        why = "" if manifest.settings.sparsity is not None else _NO_KERNELS
        if manifest.format == FORMATS["aot"]:
            return package_facts(folder, manifest, (batch, sequence), why)
        return model_facts(folder, manifest, (batch, sequence), why)


def require_cuda() -> None:
    """Refuse what is for CUDA where there is none.

    Raises:
        BackendUnavailable: torch sees no GPU.
    """
    import torch

    if torch.cuda.is_available():
        return
    why = "there is no NVIDIA GPU (nvidia-smi lists none)"
    if gpu_facts():
        why = f"torch {torch.__version__} does not see the GPU that nvidia-smi lists: it was built without CUDA for it"
    raise BackendUnavailable(
        f"CUDA was asked for where there is none: {why}.",
        "Use a machine with an NVIDIA GPU and a torch built for CUDA, or --option device=cpu.",
    )


def _refuse_dense_kernels(settings: ExportSettings, options: TorchOptions) -> None:
    """Where torch has no sparse kernels.

    Raises:
        UsageError: another device, compiler or precision than theirs.
    """
    if options.device != "cuda":
        raise UsageError(
            f"{_NO_KERNELS}, and device is {options.device}.",
            "Add --option device=cuda, or leave --sparsity out: the zeros stay in the weights all the same.",
        )
    if options.compiler == "aot":
        raise UsageError(
            "torch's sparse kernels are called from Python, which a package of AOTInductor does without.",
            "Add --option compiler=inductor, or eager.",
        )
    if settings.precision == "fp32":
        raise UsageError("torch's sparse kernels take half precision, not fp32.", "Add --precision bf16, or fp16.")


def _place(manifest: Manifest, threads: int | None) -> Place:
    """Where an artifact runs.

    Raises:
        BackendUnavailable: it is for CUDA, and there is none.
    """
    from .torch_runner import Place

    device = "cuda" if manifest.settings.options.get("device") == "cuda" else "cpu"
    if device == "cuda":
        require_cuda()
    return Place(device, threads)


def _require_same_device(folder: Path, manifest: Manifest, place: Place) -> None:
    """Refuse machine code for another device: instructions that the CPU does not have would end the process.

    Raises:
        BackendUnavailable: another machine, a CPU without some of its instructions, or a GPU of another kind.
    """
    if place.device == "cuda":
        built, now = ([gpu.get("compute_cap") for gpu in gpus[:1]] for gpus in (manifest.gpus, gpu_facts()))
        if built != now:
            raise BackendUnavailable(
                f"{folder} was compiled for a GPU of compute capability {built[0] if built else '?'}; here is one of "
                f"{now[0] if now else '?'}.",
                "Export it again here.",
            )
    here, there = cpu_facts(), manifest.cpu
    lacking = sorted(set(there.get("instruction_sets", [])) - set(here["instruction_sets"]))
    if there.get("machine") != here["machine"] or lacking:
        what = f"lacks {', '.join(lacking)}" if lacking else f"is a {here['machine']}"
        raise BackendUnavailable(
            f"{folder} was compiled for {there.get('name')} ({there.get('machine')}), and this CPU {what}.",
            "Export it again on a CPU of the kind that is to run it, or with "
            "--option compiler=inductor, which compiles where it runs.",
        )


def _module_runner(folder: Path, manifest: Manifest, place: Place, *, sparse: bool) -> ModuleRunner:
    from .torch_runner import ModuleRunner

    compiled = manifest.format == FORMATS["inductor"]
    return ModuleRunner(folder, manifest, place, compiled=compiled, sparse=sparse)


def _timed_sparse(job: ExportJob, checkpoint: Checkpoint, folder: Path, program: ExportedProgram) -> ExportedProgram:
    """The program with the evidence of its sparse layers: each one's times, and those of the whole beside its dense
    twin, at the tuned shape on this GPU."""
    from dataclasses import replace

    from ..exporters.inputs import probe_batch
    from .torch_sparse import in_turn, kernels

    job.progress("timing sparse layers beside dense ones")
    shapes = job.settings.shapes
    manifest = program.manifest(checkpoint, job.settings)
    batch = probe_batch(job.checkpoint, shapes.opt_batch, shapes.opt_sequence)
    place = _place(manifest, None)
    with (
        closing(_module_runner(folder, manifest, place, sparse=True)) as runner,
        closing(_module_runner(folder, manifest, place, sparse=False)) as twin,
    ):
        dense, sparse = in_turn(twin.prepare(batch), runner.prepare(batch))
        evidence = {
            "device": place.device_name,
            "kernels": kernels(),
            "shape": f"{shapes.opt_batch} x {shapes.opt_sequence}",
            "layers": [choice.row() for choice in runner.choices],
            "dense twin": {"sparse ms": sparse, "dense ms": dense, "ratio": dense / sparse},
        }
    return replace(program, evidence={**program.evidence, SPARSITY: evidence})
