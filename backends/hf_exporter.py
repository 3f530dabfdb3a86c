"""Any exporter of transformers (`HfExporter`) as a backend: what a plug-in gets whose entry point names one.

    [project.entry-points."limbeck.backends"]
    dynamo = "transformers.exporters:DynamoExporter"

Its programs are run by the runner that transformers knows for its format (`register_backend(exporter, runner)`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable, InputError, first_line
from .base import Availability, Backend, ExportJob, Runner

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers.exporters.base import HfExporter

    from ..exporters.artifact import Manifest, TensorSpec
    from ..exporters.program import ExportedProgram


class HfExporterBackend(Backend):
    """`--backend NAME`, where the entry point NAME is an `HfExporter`. Float32 only, and without a weight audit: where
    the weights lie in its files is not known."""

    def __init__(self, name: str, exporter: type[HfExporter]) -> None:
        self.name = name
        self.summary = f"{exporter.__name__} of {exporter.__module__.partition('.')[0]}"
        self.formats = (str(exporter.export_format),)
        self._exporter = exporter

    def probe(self) -> Availability:
        from transformers.exporters.auto import EXPORT_BACKENDS

        from ..exporters.onnx import quiet_exporters

        try:
            with quiet_exporters():
                self._exporter()
        except (ImportError, RuntimeError) as error:  # a package that it needs is missing or too old
            return Availability(
                False, False, first_line(error), f"pip install {' '.join(self._exporter.required_packages)}"
            )
        registered = EXPORT_BACKENDS.get(self.formats[0])
        if registered is None or registered.runner is None:
            return Availability(True, False, f"no runner is registered for its format, {self.formats[0]}")
        return Availability(True, True)

    def export(self, job: ExportJob, folder: Path) -> ExportedProgram:
        from ..exporters.inputs import dynamic_shapes, sample_inputs
        from ..exporters.onnx import quiet_exporters
        from ..exporters.program import ExportedProgram
        from ..exporters.unsupported import failures_named

        settings = self._exporter.config_class
        wanted = {"dynamic_shapes": dynamic_shapes(job.checkpoint, job.settings.shapes)}
        known = {field.name for field in dataclasses.fields(settings)}
        config = settings(**{name: value for name, value in wanted.items() if name in known})
        job.progress("tracing the graph")
        sample = sample_inputs(job.checkpoint, job.settings.shapes)
        with quiet_exporters(), failures_named(job.checkpoint.module, getattr(config, "opset_version", None)):
            exported = self._exporter().export(job.checkpoint.module, sample, config)
        exported.save_pretrained(folder)
        inputs, outputs = _specs(job, sample)
        return ExportedProgram(format=self.formats[0], inputs=inputs, outputs=outputs)

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        available = self.probe()
        if not available.can_run:
            raise BackendUnavailable(f"{folder} cannot be opened here: {available.reason}.", available.mend)
        return HfRunner(folder, manifest, threads)


class HfRunner(Runner):
    """A program through transformers' own runner."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None) -> None:
        import torch
        from transformers.exporters import ExportedModel

        from ..exporters.onnx import quiet_exporters

        if threads is not None:
            torch.set_num_threads(threads)
        try:
            with quiet_exporters():
                exported = ExportedModel.from_pretrained(folder)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            raise BackendUnavailable(f"{folder} cannot be opened here: {first_line(error)}") from error
        self._run: Callable[..., Any] = exported.runners["model"]
        self._inputs = [spec.name for spec in manifest.inputs]
        self._outputs = [spec.name for spec in manifest.outputs]
        self.properties = {
            "runtime": f"{type(self._run).__name__} of {type(self._run).__module__.partition('.')[0]}",
            "device": str(exported.device),
            "threads": str(torch.get_num_threads()),
        }

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        try:
            outputs = self._run(**{name: batch[name] for name in self._inputs})
        except (RuntimeError, ValueError, AssertionError) as error:
            shape = tuple(next(iter(batch.values())).shape)
            raise InputError(f"The program does not take inputs of shape {shape}: {first_line(error)}") from error
        return {name: outputs[name].float().cpu().numpy() for name in self._outputs}

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        return partial(self._run, share_outputs=True, **{name: batch[name] for name in self._inputs})


def _specs(job: ExportJob, sample: Mapping[str, Any]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs for the manifest: the batch varies in all of them, the sequence where there is one."""
    import torch

    from ..exporters.artifact import TensorSpec
    from ..exporters.inputs import TRACED_BATCH, TRACED_SEQUENCE

    with torch.inference_mode():
        outputs = job.checkpoint.module(**sample)

    def spec(name: str, value: torch.Tensor, sequence: bool) -> TensorSpec:
        varies = {0: TRACED_BATCH, 1: TRACED_SEQUENCE} if sequence else {0: TRACED_BATCH}
        shape = [None if varies.get(axis) == size else size for axis, size in enumerate(value.shape)]
        return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape)

    tensors = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    inputs = [spec(name, sample[name], sequence=True) for name in job.checkpoint.input_names]
    # Per text [batch, labels] or [batch, width]; per token [batch, sequence, ...].
    return inputs, [spec(name, value, sequence=value.ndim >= 3) for name, value in tensors.items()]
