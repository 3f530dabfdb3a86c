"""ExecuTorch for phones and boards: `.pte` programs in float32 and int8, computed by XNNPACK on the CPU."""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environment import available_cpus, installed_version, is_importable
from ..errors import BackendUnavailable, InputError, first_line
from .base import Availability, Backend, ExportJob, Runner

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..exporters.activation_ranges import ActivationRange
    from ..exporters.artifact import Manifest, TensorSpec
    from ..exporters.layer_facts import ProgramFacts
    from ..exporters.options import ExecuTorchOptions
    from ..exporters.program import ExportedProgram, ProgramWeight
    from ..exporters.settings import ExportSettings

_INSTALL = 'pip install "limbeck[executorch]"'
_METHOD = "forward"
_INT64 = 4
"""ExecuTorch's number of the type."""
_running: weakref.WeakSet[ExecuTorchRunner] = weakref.WeakSet()
"""Programs that hold the pool of threads, of which a process has one."""


class ExecuTorchRunner(Runner):
    """A loaded method of a `.pte`.

    The pool of threads is the process's: it is made anew for another number only while no other program holds it, for
    that would leave the other without. `properties` tells what there is.
    """

    def __init__(
        self, program: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], threads: int | None = None
    ) -> None:
        self._inputs = [spec.name for spec in inputs]
        self._outputs = [spec.name for spec in outputs]
        with _said() as said:
            self._method = _loaded(program, threads or available_cpus(), said)
        known = self._method.metadata
        takes = [known.input_tensor_meta(number) for number in range(known.num_inputs())]
        self._largest = [tuple(tensor.sizes()) for tensor in takes]
        types = {tensor.dtype() for tensor in takes}
        if (known.num_inputs(), known.num_outputs()) != (len(inputs), len(outputs)) or types != {_INT64}:
            raise InputError(
                f"{program} is not the program that its manifest describes: it takes {known.num_inputs()} tensors and "
                f"gives {known.num_outputs()}, where {len(inputs)} of whole numbers and {len(outputs)} are listed.",
                "Export it again; do not run it.",
            )
        _running.add(self)
        self.properties = {
            "runtime": f"executorch {installed_version('executorch')}",
            "delegate": "XNNPACK",
            "threads": str(_threads()),
        }

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        feed = self._feed(batch)
        try:
            values = self._method.execute(feed)
        except RuntimeError as error:
            raise InputError(
                f"The program does not take inputs of shape {tuple(feed[0].shape)}: {first_line(error)}"
            ) from error
        return {name: value.float().numpy() for name, value in zip(self._outputs, values, strict=True)}

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        feed, execute = self._feed(batch), self._method.execute
        return lambda: execute(feed)

    def _feed(self, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The inputs in the program's order. Sizes are looked at here, since the runtime looks at their product."""
        import torch

        from ..exporters.kv_cache import feed_of

        feed = [torch.from_numpy(value).contiguous() for value in feed_of(batch, self._inputs).values()]
        for value, most in zip(feed, self._largest, strict=True):
            if value.ndim != len(most) or any(size > limit for size, limit in zip(value.shape, most, strict=True)):
                raise InputError(
                    f"The program does not take inputs of shape {tuple(value.shape)}: it takes up to {most}."
                )
        return feed

    def close(self) -> None:
        _running.discard(self)
        del self._method


def _loaded(program: Path, threads: int, said: Callable[[], str]) -> Any:
    """The method of a program, with so many threads where nothing else runs in this process."""
    from ..exporters.executorch import quiet_executorch

    with quiet_executorch():
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime
    if not _running:
        _unsafe_reset_threadpool(threads)
    try:
        opened = Runtime.get().load_program(program)
    except RuntimeError as error:
        raise InputError(
            f"{program} is no program that this ExecuTorch reads: {said() or first_line(error)}.",
            "Export it again, with the version of ExecuTorch that runs it.",
        ) from error
    if _METHOD not in opened.method_names:
        raise InputError(f"{program} has no method {_METHOD!r}; it has {', '.join(sorted(opened.method_names))}.")
    try:
        return opened.load_method(_METHOD)
    except RuntimeError as error:
        raise BackendUnavailable(f"ExecuTorch cannot run {program}: {said() or first_line(error)}.") from error


def _threads() -> int:
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count

    return int(_threadpool_get_thread_count())


@contextmanager
def _said() -> Iterator[Callable[[], str]]:
    """Take what the runtime says, by Python's standard error and by the process's: what CPU it finds, and why it fails,
    which its errors do not tell. Hands out what gives the line that tells most."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:

        def telling_line() -> str:
            file.flush()
            file.seek(0)
            lines = [line.partition("] ")[2].strip(" .") for line in file.read().splitlines()]
            missing = [line for line in lines if line.startswith("Missing operator")]
            return [*lines, *missing][-1] if lines else ""

        os.dup2(file.fileno(), 2)
        try:
            with redirect_stderr(file):
                yield telling_line
        finally:
            os.dup2(kept, 2)
            os.close(kept)


class ExecuTorchBackend(Backend):
    """`--backend executorch`."""

    name = "executorch"
    summary = "ExecuTorch program for phones and boards, run by XNNPACK on the CPU"
    precisions = ("fp32", "int8")
    formats = ("executorch",)

    @classmethod
    def options(cls) -> type[ExecuTorchOptions]:
        from ..exporters.options import ExecuTorchOptions

        return ExecuTorchOptions

    def probe(self) -> Availability:
        if not is_importable("executorch.runtime"):
            return Availability(False, False, "not installed: executorch", _INSTALL)
        return Availability(True, True, facts={"executorch": installed_version("executorch") or "?"})

    def measures_ranges(self, settings: ExportSettings) -> bool:
        return settings.precision == "int8" and self._options(settings).activations == "static"

    def export(self, job: ExportJob, folder: Path) -> ExportedProgram:
        from ..exporters import executorch as exporter
        from ..exporters.executorch_facts import delegation
        from ..exporters.executorch_program import read_program
        from ..exporters.executorch_weights import name_weights
        from ..exporters.onnx import require_calibration
        from ..exporters.program import ExportedProgram

        calibrated = self.measures_ranges(job.settings)
        if calibrated:
            require_calibration(job.calibration)
        job.progress("tracing the graph, calibrating int8" if calibrated else "tracing the graph")
        options = self._options(job.settings)
        exported = exporter.export_program(job.checkpoint, job.settings, options, job.calibration)
        exported.save_pretrained(folder)
        program = read_program(folder / exporter.PROGRAM_FILE)
        name_weights(program, job.checkpoint.module).save(folder)
        inputs, outputs = exporter.tensor_specs(exported)
        return ExportedProgram(
            format="executorch", inputs=inputs, outputs=outputs, evidence={"XNNPACK": delegation(program)}
        )

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        from ..exporters.executorch import PROGRAM_FILE

        self._require(f"open {folder}")
        self.compile_properties(manifest)
        return ExecuTorchRunner(folder / PROGRAM_FILE, manifest.inputs, manifest.outputs, threads)

    def weights(self, folder: Path, manifest: Manifest, module: torch.nn.Module) -> Iterator[ProgramWeight]:
        from ..exporters.executorch import PROGRAM_FILE
        from ..exporters.executorch_program import read_program
        from ..exporters.executorch_weights import WeightNames, read_weights

        self._require(f"read {folder}")
        return read_weights(read_program(folder / PROGRAM_FILE), WeightNames.load(folder))

    def activation_ranges(self, folder: Path, manifest: Manifest) -> Iterator[ActivationRange] | None:
        from ..exporters.executorch import PROGRAM_FILE
        from ..exporters.executorch_facts import executorch_ranges
        from ..exporters.executorch_weights import WeightNames

        self._require(f"read {folder}")
        return executorch_ranges(folder / PROGRAM_FILE, WeightNames.load(folder))

    def program_facts(self, folder: Path, manifest: Manifest, batch: int, sequence: int) -> ProgramFacts:
        from ..exporters.executorch import PROGRAM_FILE
        from ..exporters.executorch_facts import executorch_facts
        from ..exporters.executorch_weights import WeightNames

        self._require(f"read {folder}")
        shapes = manifest.settings.shapes
        largest = shapes.max_batch, min(shapes.max_sequence, manifest.max_length)
        return executorch_facts(folder / PROGRAM_FILE, WeightNames.load(folder), largest, batch, sequence)

    def _options(self, settings: ExportSettings) -> ExecuTorchOptions:
        from ..exporters.options import ExecuTorchOptions, checked_options

        return checked_options(ExecuTorchOptions, settings.options, self.name)

    def _require(self, what: str) -> None:
        available = self.probe()
        if not available.can_run:
            raise BackendUnavailable(f"ExecuTorch is needed to {what}: {available.reason}.", available.mend)
