"""OpenVINO on Intel-style CPUs: float32, bfloat16, float16, and by NNCF int8 or weights alone in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environment import available_cpus, cache_folder, installed_version, is_importable
from ..errors import BackendUnavailable, InputError
from .base import Availability, Backend, ExportJob, Runner
from .decoder import Decoder

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..exporters.activation_ranges import ActivationRange
    from ..exporters.artifact import Manifest
    from ..exporters.layer_facts import ProgramFacts
    from ..exporters.options import OpenVINOOptions
    from ..exporters.program import ExportedProgram, ProgramWeight
    from ..exporters.tokenizer_graph import TextTokens, Tokenize

_INSTALL = 'pip install "limbeck[openvino]"'
_READ_BACK = (
    "INFERENCE_PRECISION_HINT",
    "INFERENCE_NUM_THREADS",
    "NUM_STREAMS",
    "PERFORMANCE_HINT",
    "EXECUTION_DEVICES",
    "KV_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
)


class OpenVINORunner(Runner):
    """One infer request of a model compiled for the CPU.

    Args:
        graph: the `.xml` file, or an `openvino.Model`.
        cache: folder in which OpenVINO keeps what it compiled.
    """

    def __init__(
        self, graph: Any, properties: Mapping[str, str], threads: int | None = None, cache: Path | None = None
    ) -> None:
        import openvino

        from ..exporters.kv_cache import ROWS

        # Without properties of its own a program runs as the plug-in pleases, but for the number of threads.
        latency = {"PERFORMANCE_HINT": "LATENCY"} if properties else {}
        wanted = {**latency, "INFERENCE_NUM_THREADS": str(threads or available_cpus()), **properties}
        if cache is not None:
            wanted["CACHE_DIR"] = str(cache)
        try:
            program = str(graph) if isinstance(graph, Path) else graph
            compiled = openvino.Core().compile_model(program, "CPU", wanted)
        except RuntimeError as error:
            name = graph.name if isinstance(graph, Path) else "the program"
            raise BackendUnavailable(f"OpenVINO cannot compile {name}: {_last_line(error)}") from error
        self._request = compiled.create_infer_request()
        self._inputs = [port.get_any_name() for port in compiled.inputs if port.get_any_name() != ROWS]
        self._keeps = len(self._inputs) < len(compiled.inputs)
        self._outputs = [port.get_any_name() for port in compiled.outputs]
        read_back = {name: _text(compiled.get_property(name)) for name in _READ_BACK}
        self.properties = {"runtime": f"openvino {openvino.__version__}", **read_back}
        self.properties["threads"] = self.properties["INFERENCE_NUM_THREADS"]

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        with _refusals(next(iter(batch.values())).shape):
            if self._keeps:
                self._request.reset_state()
            values = self._request.infer(self._feed(batch), share_inputs=True)
        return {name: values[name].astype("float32") for name in self._outputs}

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        import openvino

        for name, value in self._feed(batch).items():
            self._request.set_tensor(name, openvino.Tensor(value.copy()))
        infer: Callable[[], object] = self._request.infer
        forget = self._request.reset_state

        def read() -> object:
            forget()
            return infer()

        return read if self._keeps else infer

    def _feed(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        from ..exporters.kv_cache import feed_of

        feed = feed_of(batch, self._inputs)
        return {**feed, **_in_place(len(next(iter(feed.values()))))} if self._keeps else feed

    def decoder(self) -> Decoder:
        return _OpenVINODecoder(self._request, self._inputs) if self._keeps else super().decoder()


@contextmanager
def _refusals(shape: Sequence[int]) -> Iterator[None]:
    """What the runtime refuses of inputs of this shape is an input error."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"The program does not take inputs of shape {tuple(shape)}: {_last_line(error)}") from error


class _OpenVINODecoder(Decoder):
    """The cache is state of the infer request."""

    def __init__(self, request: Any, inputs: Sequence[str]) -> None:
        self._request, self._inputs = request, inputs
        self._rows = _in_place(0)

    def start(self, rows: int) -> None:
        self._request.reset_state()
        self._rows = _in_place(rows)

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = {name: given[name] for name in self._inputs}
        with _refusals(ids.shape):
            found = self._request.infer({**feed, **self._rows}, share_inputs=True, share_outputs=True)
        logits: np.ndarray = found["logits"][:, -1].astype("float32", copy=False)
        return logits

    def cache_bytes(self) -> int:
        return sum(int(state.state.get_byte_size()) for state in self._request.query_state())


def _in_place(rows: int) -> dict[str, np.ndarray]:
    """Every text keeps its row of the cache (a beam search would move them)."""
    import numpy as np

    from ..exporters.kv_cache import ROWS

    return {ROWS: np.arange(rows, dtype=np.int32)}


def _text(value: Any) -> str:
    """A property as OpenVINO's own configuration spells it."""
    if hasattr(value, "get_type_name"):
        return str(value.get_type_name())
    return ", ".join(str(item) for item in value) if isinstance(value, list | tuple) else str(value)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


class OpenVINOBackend(Backend):
    """`--backend openvino`."""

    name = "openvino"
    summary = "OpenVINO IR, run by its CPU plug-in"
    precisions = ("fp32", "bf16", "fp16", "int8", "int8-weight-only", "int4-weight-only", "native")
    formats = ("openvino",)
    properties = frozenset({"INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"})
    writes_text = True
    tokenizer_package = "openvino-tokenizers"

    @classmethod
    def options(cls) -> type[OpenVINOOptions]:
        from ..exporters.options import OpenVINOOptions

        return OpenVINOOptions

    def probe(self) -> Availability:
        if not is_importable("openvino"):
            return Availability(False, False, "not installed: openvino", _INSTALL)
        facts = {"openvino": installed_version("openvino") or "?"}
        if not is_importable("nncf"):
            return Availability(True, True, "int8 needs nncf, which is not installed", _INSTALL, facts)
        return Availability(True, True, facts={**facts, "nncf": installed_version("nncf") or "?"})

    def export(self, job: ExportJob, folder: Path) -> ExportedProgram:
        from ..exporters import openvino as exporter
        from ..exporters.kv_cache import CachedTrace, keeps_cache, with_rows, without_cache
        from ..exporters.onnx import require_calibration
        from ..exporters.options import OpenVINOOptions, checked_options
        from ..exporters.program import ExportedProgram
        from ..exporters.settings import QUANTISED, WEIGHT_ONLY

        precision, options = job.settings.precision, checked_options(OpenVINOOptions, job.settings.options, self.name)
        if precision in QUANTISED and not is_importable("nncf"):
            raise BackendUnavailable(f"OpenVINO's {precision} needs nncf, which is not installed.", _INSTALL)
        if precision == "int8":
            require_calibration(job.calibration)
        evidence: dict[str, Any] = {}
        trace = CachedTrace.of(job.checkpoint) if keeps_cache(job.checkpoint, job.settings) else None
        job.progress("tracing the graph")
        exported = exporter.export_graph(job.checkpoint, job.settings, trace)
        batches = [with_rows(batch) for batch in job.calibration] if trace else job.calibration
        if precision in WEIGHT_ONLY:
            job.progress("quantising the weights")
            exporter.quantize_weights_only(exported, precision, options)
        elif precision == "int8" and job.floor is not None:
            job.progress("calibrating int8, with accuracy control")
            evidence["accuracy control"] = exporter.quantize_to_floor(exported, batches, job.floor)
        elif precision == "int8":
            job.progress("calibrating int8")
            exporter.quantize_int8(exported, batches)
        exported.save_pretrained(folder)
        kept = exporter.cache_properties(precision, options) if trace else {}
        return ExportedProgram(
            format="openvino",
            inputs=without_cache(exporter.tensor_specs(exported.program.inputs)),
            outputs=without_cache(exporter.tensor_specs(exported.program.outputs)),
            compile_properties={**exporter.COMPILE_PROPERTIES[precision], **kept},
            evidence=evidence,
            cache=trace.facts(kept.get(exporter.CACHE_PRECISION, "what the runtime chooses")) if trace else None,
            biases_corrected=precision == "int8",
        )

    def export_tokenizer(self, tokens: TextTokens, folder: Path) -> Tokenize:
        from ..exporters.tokenizer_graph import write_openvino_tokenizer

        return write_openvino_tokenizer(tokens, folder)

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        from ..exporters.openvino import GRAPH_FILE

        available = self.probe()
        if not available.can_run:
            raise BackendUnavailable(f"OpenVINO is needed to open {folder}: {available.reason}.", available.mend)
        # A folder an artifact: OpenVINO looks for what it compiled by the graph's path and time, not by its weights.
        kept = manifest.settings.options.get("compile_cache") is True and manifest.artifact_id.isalnum()
        cache = cache_folder() / "openvino" / manifest.artifact_id if kept else None
        return OpenVINORunner(folder / GRAPH_FILE, self.compile_properties(manifest), threads, cache)

    def weights(self, folder: Path, manifest: Manifest, module: torch.nn.Module) -> Iterator[ProgramWeight]:
        from ..exporters.openvino import GRAPH_FILE, read_weights

        return read_weights(folder / GRAPH_FILE, module)

    def intermediates(self, folder: Path, manifest: Manifest, modules: Sequence[str]) -> Runner:
        import openvino

        from ..exporters.openvino import GRAPH_FILE
        from ..exporters.openvino_scopes import with_intermediates

        model = openvino.Core().read_model(str(folder / GRAPH_FILE))
        return OpenVINORunner(with_intermediates(model, list(modules)), self.compile_properties(manifest))

    def activation_ranges(self, folder: Path, manifest: Manifest) -> Iterator[ActivationRange]:
        from ..exporters.activation_ranges import openvino_ranges
        from ..exporters.openvino import GRAPH_FILE

        return openvino_ranges(folder / GRAPH_FILE)

    def program_facts(self, folder: Path, manifest: Manifest, batch: int, sequence: int) -> ProgramFacts:
        if not is_importable("openvino"):
            raise BackendUnavailable("Reading an OpenVINO IR needs openvino, which is not installed.", _INSTALL)
        from ..exporters.openvino import GRAPH_FILE
        from ..exporters.openvino_facts import openvino_facts

        no_kernels = "limbeck asks OpenVINO for no kernels for sparse weights"
        return openvino_facts(folder / GRAPH_FILE, manifest.compile_properties, batch, sequence, no_kernels)
