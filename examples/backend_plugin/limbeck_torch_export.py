"""`--backend torch-export`: a program of `torch.export`, run by torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from limbeck.backends.base import Availability, Backend, ExportJob, Runner
from limbeck.errors import InputError
from limbeck.exporters.artifact import Manifest, TensorSpec
from limbeck.exporters.inputs import dynamic_shapes, sample_inputs
from limbeck.exporters.program import ExportedProgram, ProgramWeight
from limbeck.models.checkpoint import Checkpoint

PROGRAM_FILE = "model.pt2"


class TorchExportBackend(Backend):
    """Float32 programs of `torch.export`."""

    name = "torch-export"
    summary = "torch.export program, run by torch"
    formats = ("torch-export",)

    def probe(self) -> Availability:
        return Availability(can_export=True, can_run=True, facts={"torch": torch.__version__})

    def export(self, job: ExportJob, folder: Path) -> ExportedProgram:
        job.progress("tracing the graph")
        names, sample = job.checkpoint.input_names, sample_inputs(job.checkpoint, job.settings.shapes)
        module = _Positional(job.checkpoint, names)
        shapes = dynamic_shapes(job.checkpoint, job.settings.shapes)
        tensors = tuple(sample[name] for name in names)
        program = torch.export.export(module, tensors, dynamic_shapes={"inputs": tuple(shapes[name] for name in names)})
        torch.export.save(program, folder / PROGRAM_FILE)
        with torch.inference_mode():
            outputs = module(*tensors)
        return ExportedProgram(
            format=self.formats[0],
            inputs=[TensorSpec(name=name, dtype="int64", shape=[None, None]) for name in names],
            outputs=[_output(name, value) for name, value in outputs.items()],
        )

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        return TorchExportRunner(folder / PROGRAM_FILE, manifest, threads)

    def weights(self, folder: Path, manifest: Manifest, module: torch.nn.Module) -> Iterator[ProgramWeight]:
        """Every parameter as the written program holds it."""
        for name, value in torch.export.load(folder / PROGRAM_FILE).state_dict.items():
            yield ProgramWeight(name.removeprefix("module."), value.detach().float().numpy())


class _Positional(torch.nn.Module):
    """The checkpoint's module with its inputs by position and nothing but tensors out."""

    def __init__(self, checkpoint: Checkpoint, names: list[str]) -> None:
        super().__init__()
        self.module = checkpoint.module
        self._names, self._flags, self._output = names, checkpoint.task.forward_flags(), checkpoint.task.output

    def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.module(**dict(zip(self._names, inputs, strict=True)), **self._flags)
        return {self._output: outputs[self._output]}


class TorchExportRunner(Runner):
    """The program as an ordinary module."""

    def __init__(self, path: Path, manifest: Manifest, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._module = torch.export.load(path).module()
        self._inputs = [spec.name for spec in manifest.inputs]
        self._outputs = [spec.name for spec in manifest.outputs]
        self.properties = {"runtime": f"torch {torch.__version__} export", "threads": str(torch.get_num_threads())}

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        try:
            outputs = self.prepare(batch)()
        except (RuntimeError, AssertionError) as error:  # the program checks its shapes itself
            raise InputError(f"The program does not take this batch: {str(error).splitlines()[0]}") from error
        return {name: outputs[name].numpy() for name in self._outputs}  # type: ignore[index]

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        inputs = [batch[name] for name in self._inputs]

        def call() -> object:
            with torch.inference_mode():
                return self._module(*inputs)

        return call


def _output(name: str, value: torch.Tensor) -> TensorSpec:
    varying: list[int | None] = [None] if value.dim() == 2 else [None, None]
    return TensorSpec(
        name=name, dtype=str(value.dtype).removeprefix("torch."), shape=[*varying, *value.shape[len(varying) :]]
    )
