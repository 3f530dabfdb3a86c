"""ONNX Runtime: portable graphs in float32, float16, bfloat16, static int8, or with weights alone in 8 or 4 bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environment import available_cpus, installed_version, is_importable
from ..errors import BackendUnavailable, InputError, UsageError
from .base import Availability, Backend, ExportJob, Runner
from .decoder import Decoder

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..exporters.activation_ranges import ActivationRange
    from ..exporters.artifact import Manifest
    from ..exporters.layer_facts import ProgramFacts
    from ..exporters.options import OnnxOptions
    from ..exporters.program import ExportedProgram, ProgramWeight
    from ..exporters.tokenizer_graph import TextTokens, Tokenize

_INSTALL = 'pip install "limbeck[onnx]"'
_NO_BF16 = "never run in bfloat16, which ONNX Runtime's CPU lacks; its float32 twin was checked"


class OnnxRunner(Runner):
    """A session of ONNX Runtime's CPU provider; `properties` are its configuration entries (`session.…`)."""

    def __init__(self, graph: Path, threads: int | None = None, properties: Mapping[str, str] | None = None) -> None:
        import onnxruntime

        from ..exporters.kv_cache import PRESENT_OUTPUTS

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or available_cpus()
        options.inter_op_num_threads = 1
        for name, value in (properties or {}).items():
            options.add_session_config_entry(name, value)
        options.log_severity_level = 3  # errors only: its warnings are about fusions that did not apply
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        unusable = (errors.Fail, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented, errors.NoSuchFile)
        try:
            self._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except (*unusable, RuntimeError) as error:
            raise BackendUnavailable(
                f"ONNX Runtime's CPU cannot run {graph.name}: {str(error).splitlines()[0]}"
            ) from error
        outputs = [value.name for value in self._session.get_outputs()]
        self._outputs = [name for name in outputs if not name.startswith(PRESENT_OUTPUTS)]
        self._keeps = len(self._outputs) < len(outputs)
        self.properties = {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "providers": ", ".join(self._session.get_providers()),
            # as the session has it: ORT_LOAD_CONFIG_FROM_MODEL lets a graph overrule what it was asked for
            "threads": str(self._session.get_session_options().intra_op_num_threads),
            **(properties or {}),
        }

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        with _refusals(next(iter(batch.values())).shape):
            values = self._session.run(self._outputs, self._feed(batch))
        return {name: value.astype("float32") for name, value in zip(self._outputs, values, strict=True)}

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        import onnxruntime

        binding = self._session.io_binding()
        bound = self._feed(batch)
        for name, value in bound.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for name in self._outputs:
            binding.bind_output(name)
        run = self._session.run_with_iobinding

        def call(keep: object = bound) -> object:  # bound values are read in place, so they must outlive the binding
            return run(binding)

        return call

    def _feed(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        from ..exporters.kv_cache import feed_whole_texts

        return feed_whole_texts(self._session.get_inputs(), batch)

    def decoder(self) -> Decoder:
        return _OnnxDecoder(self._session) if self._keeps else super().decoder()


@contextmanager
def _refusals(shape: Sequence[int]) -> Iterator[None]:
    """What the runtime refuses of inputs of this shape is an input error."""
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    try:
        yield
    except (errors.InvalidArgument, errors.RuntimeException, errors.Fail, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"The program does not take inputs of shape {tuple(shape)}: {said}") from error


class _OnnxDecoder(Decoder):
    """What a step hands out of the cache is what the next one is given, where it lies: nothing is copied by us."""

    def __init__(self, session: Any) -> None:
        from ..exporters.kv_cache import PAST_INPUTS

        self._session = session
        self._past = [spec for spec in session.get_inputs() if spec.name.startswith(PAST_INPUTS)]
        self._inputs = [spec.name for spec in session.get_inputs()]
        self._outputs = [value.name for value in session.get_outputs()]
        self._cache: dict[str, Any] = {}

    def start(self, rows: int) -> None:
        from onnxruntime import OrtValue

        from ..exporters.kv_cache import empty_cache

        empty = empty_cache(self._past, rows)
        self._cache = {name: OrtValue.ortvalue_from_numpy(value) for name, value in empty.items()}

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        from ..exporters.kv_cache import PAST_INPUTS, PRESENT_OUTPUTS

        binding = self._session.io_binding()
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            if name in self._inputs:
                binding.bind_cpu_input(name, value)
        for name, kept in self._cache.items():
            binding.bind_ortvalue_input(name, kept)
        for name in self._outputs:
            binding.bind_output(name)
        with _refusals(ids.shape):
            self._session.run_with_iobinding(binding)
        found = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        logits: np.ndarray = found["logits"].numpy()[:, -1].astype("float32", copy=False)
        kept = {name: value for name, value in found.items() if name.startswith(PRESENT_OUTPUTS)}
        self._cache = {PAST_INPUTS + name.removeprefix(PRESENT_OUTPUTS): value for name, value in kept.items()}
        return logits

    def cache_bytes(self) -> int:
        return sum(value.numpy().nbytes for value in self._cache.values())


class TwinRunner(OnnxRunner):
    """A bfloat16 graph as its float32 twin, with the weights that bfloat16 rounded: ONNX Runtime's CPU has no bfloat16.
    For checks of accuracy, never for speed."""

    def __init__(self, graph: Path, threads: int | None = None, properties: Mapping[str, str] | None = None) -> None:
        import onnx_ir

        from ..exporters.float_range import float32_twin, write_graph

        with tempfile.TemporaryDirectory(prefix="limbeck-") as scratch:
            twin = write_graph(float32_twin(onnx_ir.load(str(graph))), Path(scratch))
            super().__init__(twin, threads, properties)
        self.properties = {**self.properties, "arithmetic": "float32 with bfloat16 weights"}

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        raise BackendUnavailable("A bfloat16 ONNX graph cannot be timed here: ONNX Runtime's CPU has no bfloat16.")


def showing_intermediates(
    graph: Path, modules: Sequence[str], precision: str, properties: Mapping[str, str] | None = None
) -> OnnxRunner:
    """The graph of a written artifact with what these modules hand on as further outputs (see
    `Backend.intermediates`)."""
    import onnx_ir

    from ..exporters.float_range import write_graph
    from ..exporters.onnx_intermediates import with_intermediates

    with tempfile.TemporaryDirectory(prefix="limbeck-") as scratch:
        shown = write_graph(with_intermediates(onnx_ir.load(str(graph)), modules), Path(scratch))
        return (TwinRunner if precision == "bf16" else OnnxRunner)(shown, None, properties)


class OnnxBackend(Backend):
    """`--backend onnx`."""

    name = "onnx"
    summary = "ONNX graph, run by ONNX Runtime on the CPU"
    precisions = ("fp32", "fp16", "bf16", "int8", "int8-weight-only", "int4-weight-only")
    formats = ("onnx",)
    properties = frozenset({"session.force_spinning_stop"})
    writes_text = True
    tokenizer_package = "onnxruntime-extensions"

    @classmethod
    def options(cls) -> type[OnnxOptions]:
        from ..exporters.options import OnnxOptions

        return OnnxOptions

    def probe(self) -> Availability:
        missing = [module for module in ("onnx", "onnxscript", "onnxruntime") if not is_importable(module)]
        if missing:
            return Availability(False, False, f"not installed: {', '.join(missing)}", _INSTALL)
        return Availability(True, True, facts={"onnxruntime": installed_version("onnxruntime") or "?"})

    def export(self, job: ExportJob, folder: Path) -> ExportedProgram:
        from ..exporters import onnx as exporter
        from ..exporters.float_range import float16_evidence
        from ..exporters.kv_cache import CachedTrace, keeps_cache, without_cache
        from ..exporters.options import OnnxOptions, checked_options
        from ..exporters.precision import HALF_DTYPES, half_precision
        from ..exporters.program import ExportedProgram
        from ..exporters.settings import WEIGHT_ONLY

        precision, options = job.settings.precision, checked_options(OnnxOptions, job.settings.options, self.name)
        if precision == "int8" and options.fusions:
            raise UsageError(
                "ONNX Runtime's quantiser cannot calibrate a graph with fusions.",
                "Leave out the option fusions, or take another --precision.",
            )
        if precision == "int8":
            exporter.require_calibration(job.calibration)
        trace = CachedTrace.of(job.checkpoint) if keeps_cache(job.checkpoint, job.settings) else None
        job.progress("tracing the graph")
        dtype = HALF_DTYPES.get(precision)
        with half_precision(job.checkpoint.module, dtype) if dtype is not None else nullcontext():
            exported = exporter.export_graph(job.checkpoint, job.settings, options, trace)
        if precision == "int8":
            job.progress("calibrating int8")
            batches = [trace.on_empty_cache(batch) for batch in job.calibration] if trace else job.calibration
            exporter.quantize_int8(exported, batches)
        elif precision in WEIGHT_ONLY:
            job.progress("quantising the weights")
            exporter.quantize_weights_only(exported, precision, options)
        evidence = {}
        if precision == "fp16":  # the CPU computes through float32, and so hides what a GPU's would show
            job.progress("checking float16 ranges")
            found = float16_evidence(job.checkpoint, job.settings.shapes, exported.program, job.calibration)
            evidence["float16 range"] = found
        exported.save_pretrained(folder)
        graph = exported.program.graph
        return ExportedProgram(
            format="onnx",
            inputs=without_cache(exporter.tensor_specs(graph.inputs)),
            outputs=without_cache(exporter.tensor_specs(graph.outputs)),
            unverified=_NO_BF16 if precision == "bf16" else None,
            stand_in="its float32 twin" if precision == "bf16" else None,
            evidence=evidence,
            cache=trace.facts("f16" if precision == "fp16" else "f32") if trace else None,
        )

    def export_tokenizer(self, tokens: TextTokens, folder: Path) -> Tokenize:
        from ..exporters.tokenizer_graph import write_onnx_tokenizer

        return write_onnx_tokenizer(tokens, folder)

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        from ..exporters.onnx import GRAPH_FILE

        available = self.probe()
        if not available.can_run:
            raise BackendUnavailable(f"ONNX Runtime is needed to open {folder}: {available.reason}.", available.mend)
        properties = self.compile_properties(manifest)
        if manifest.settings.precision == "bf16":
            return TwinRunner(folder / GRAPH_FILE, threads, properties)
        return OnnxRunner(folder / GRAPH_FILE, threads, properties)

    def weights(self, folder: Path, manifest: Manifest, module: torch.nn.Module) -> Iterator[ProgramWeight]:
        from ..exporters.onnx import GRAPH_FILE, read_weights

        return read_weights(folder / GRAPH_FILE)

    def intermediates(self, folder: Path, manifest: Manifest, modules: Sequence[str]) -> Runner:
        from ..exporters.onnx import GRAPH_FILE

        properties = self.compile_properties(manifest)
        return showing_intermediates(folder / GRAPH_FILE, modules, manifest.settings.precision, properties)

    def activation_ranges(self, folder: Path, manifest: Manifest) -> Iterator[ActivationRange]:
        from ..exporters.activation_ranges import onnx_ranges
        from ..exporters.onnx import GRAPH_FILE

        return onnx_ranges(folder / GRAPH_FILE)

    def program_facts(self, folder: Path, manifest: Manifest, batch: int, sequence: int) -> ProgramFacts:
        if not is_importable("onnx"):
            raise BackendUnavailable("Reading an ONNX graph needs onnx, which is not installed.", _INSTALL)
        from ..exporters.onnx import GRAPH_FILE
        from ..exporters.onnx_facts import onnx_facts

        return onnx_facts(folder / GRAPH_FILE, batch, sequence, "ONNX Runtime has no kernels for sparse weights")
