"""A teacher's outputs from the runtime that is asked for: eager torch, or a program compiled for this machine, which
has to answer as eager torch does before it teaches anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
import torch

from ..backends.base import ExportJob, Runner
from ..backends.registry import backend_for, get_backend
from ..distill.teacher import TeacherCall, eager_teacher
from ..errors import BackendUnavailable, ExportMismatch, UsageError, did_you_mean, first_line
from ..exporters.inputs import probe_batches
from ..exporters.settings import ExportSettings, Precision, ShapeRange
from ..models.batching import Batch, Run
from ..models.checkpoint import Checkpoint
from ..models.features import recording
from ..validate.proofs.parity import check_parity
from .progress import SILENT, Progress

TeacherRuntime = Literal["eager", "openvino", "onnx", "torch-compile"]
TEACHER_RUNTIMES: tuple[str, ...] = get_args(TeacherRuntime)

_PRECISION: dict[str, Precision] = {"openvino": "native", "onnx": "fp32"}
_PROPERTIES = {"onnx": {"session.force_spinning_stop": "1"}}
"""ONNX Runtime's threads go on spinning after a call, and take from the student's step what they spin away: measured on
two cores, 0.3 of a core while idle."""
_LARGEST_BATCH = 4096
_USE_EAGER = "Use the eager teacher."


@contextmanager
def teacher_runtime(teacher: Checkpoint, runtime: str, progress: Progress = SILENT) -> Iterator[TeacherCall]:
    """The teacher's outputs, with the features that it records, for as long as the block lasts.

    Args:
        runtime: one of `TEACHER_RUNTIMES`. OpenVINO computes in what it is fastest in here (bfloat16 where the CPU has
            it), ONNX Runtime in float32, torch.compile in bfloat16 on a GPU that has it and in float32 elsewhere.

    Raises:
        UsageError: there is no such runtime.
        BackendUnavailable: a package or a compiler that it needs is missing.
        ExportMismatch: the compiled teacher answers otherwise than eager torch.
    """
    if runtime not in TEACHER_RUNTIMES:
        raise UsageError(
            f"There is no teacher runtime {runtime!r}; there are {', '.join(TEACHER_RUNTIMES)}."
            f"{did_you_mean(runtime, TEACHER_RUNTIMES)}"
        )
    if runtime == "eager":
        yield eager_teacher(teacher)
        return
    progress.say("compiling the teacher")
    with _torch_compiled(teacher) if runtime == "torch-compile" else _exported(teacher, runtime) as call:
        progress.say("distilling")
        yield call


@contextmanager
def _exported(teacher: Checkpoint, runtime: str) -> Iterator[TeacherCall]:
    """The teacher as a program of one of our backends."""
    shapes = ShapeRange(max_batch=_LARGEST_BATCH, max_sequence=teacher.max_length)
    settings = ExportSettings(backend=runtime, precision=_PRECISION[runtime], shapes=shapes, kv_cache=False)
    backend_for(settings)
    with (
        TemporaryDirectory(prefix="limbeck-") as folder,
        closing(_loaded(teacher, settings, runtime, Path(folder))) as runner,
    ):
        _check(runner, teacher, _probes(teacher), settings.precision)

        def call(batch: Batch) -> dict[str, torch.Tensor]:
            device = batch["input_ids"].device
            outputs = runner({name: value.cpu() for name, value in batch.items()})
            return {name: torch.from_numpy(values).to(device) for name, values in outputs.items()}

        yield call


def _loaded(teacher: Checkpoint, settings: ExportSettings, runtime: str, folder: Path) -> Runner:
    backend = get_backend(runtime)
    program = backend.export(ExportJob(teacher, settings), folder)
    manifest = program.manifest(teacher, settings)
    properties = {**manifest.compile_properties, **_PROPERTIES.get(runtime, {})}
    return backend.load(folder, manifest.model_copy(update={"compile_properties": properties}))


@contextmanager
def _torch_compiled(teacher: Checkpoint) -> Iterator[TeacherCall]:
    """The teacher through torch.compile, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = device == "cuda" and torch.cuda.is_bf16_supported()
    module = replace(teacher, recorded=()).module.to(device)
    # Hooks that are set inside the forward, as `FeatureRecorder` sets them, would break the graph at each of them.
    with recording(teacher.model, teacher.recorded) as features:

        def whole(inputs: Batch) -> dict[str, torch.Tensor]:
            outputs = module(**inputs, **teacher.task.forward_flags())
            return {teacher.task.output: outputs[teacher.task.output], **features}

        compiled = torch.compile(whole, dynamic=True)

        def call(batch: Batch) -> dict[str, torch.Tensor]:
            inputs = {name: value.to(device) for name, value in teacher.model_inputs(batch).items()}
            # What was checked is what runs: not in whatever precision the student happens to be trained in.
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
                outputs = compiled(inputs)
            return {name: value.float() for name, value in outputs.items()}

        # A batch of one is compiled anew, and training has none.
        probes = [(shape, batch) for shape, batch in _probes(teacher) if len(batch["input_ids"]) > 1]
        try:
            _check(lambda batch: _arrays(call(dict(batch))), teacher, probes, "native" if half else "fp32")
        except RuntimeError as error:
            raise BackendUnavailable(
                f"torch.compile cannot compile the teacher here: {first_line(error)}",
                f"It needs a C++ compiler (g++), and Triton for a GPU. {_USE_EAGER}",
            ) from error
        yield call


def _probes(teacher: Checkpoint) -> list[tuple[str, Batch]]:
    return list(probe_batches(teacher, ShapeRange()))


def _check(program: Run, teacher: Checkpoint, probes: Iterable[tuple[str, Batch]], precision: Precision) -> None:
    eager, device = eager_teacher(teacher), next(teacher.module.parameters()).device

    def reference(batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        outputs = eager({name: value.to(device) for name, value in batch.items()})
        return _arrays({name: outputs[name] for name in (teacher.task.output, *teacher.recorded)})

    parity = check_parity(program, reference, probes, precision)
    if not parity.passed:
        raise ExportMismatch(f"The compiled teacher is not the teacher: {parity.detail}.", _USE_EAGER)


def _arrays(outputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.float().cpu().numpy() for name, value in outputs.items()}
