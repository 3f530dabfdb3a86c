"""A built TensorRT engine on the GPU, with torch's memory and streams."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable, InputError, first_line
from .base import Runner

if TYPE_CHECKING:
    import numpy as np
    import torch

_CAPTURES = 16
"""CUDA graphs that are kept, each with a context of its own; the one that was used longest ago gives way."""


@dataclass(frozen=True)
class InputRange:
    """Shapes of one input in one profile, an entry an axis."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether the profile takes this shape."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )

    def distance(self, shape: Sequence[int]) -> int:
        """How far a shape is from the one that the profile's kernels were chosen for."""
        return sum(abs(size - best) for size, best in zip(shape, self.opt, strict=True))

    def __str__(self) -> str:
        return f"{self.min} to {self.max}, tuned for {self.opt}"


Profiles = Sequence[Mapping[str, InputRange]]
"""Ranges by input name, one mapping a profile."""


def choose_profile(profiles: Profiles, shapes: Mapping[str, Sequence[int]]) -> int:
    """The profile that takes these shapes; of several, the one that was tuned for the nearest.

    Raises:
        InputError: none does; the first input that fits nowhere is named with its ranges.
    """
    fitting = [
        index for index, ranges in enumerate(profiles) if all(ranges[name].holds(shapes[name]) for name in ranges)
    ]
    if not fitting:
        name = next((name for name in shapes if not any(ranges[name].holds(shapes[name]) for ranges in profiles)), None)
        name = name or next(iter(shapes))
        raise InputError(
            f"The engine does not take {name} of shape {tuple(shapes[name])}: it was built for "
            f"{' or '.join(str(ranges[name]) for ranges in profiles)}.",
            "Export a kit for those shapes (--batch, --sequence, --option profiles=...) and build it.",
        )
    return min(fitting, key=lambda index: sum(profiles[index][name].distance(shapes[name]) for name in shapes))


@dataclass(frozen=True)
class _Bound:
    """An execution context with the tensors whose addresses it was given; they must live as long as it is called."""

    context: Any
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    graph: Any = None
    """The `torch.cuda.CUDAGraph` of the call, where graphs are captured."""


class EngineRunner(Runner):
    """An execution context a profile, on a stream of its own (TensorRT synchronises more on the default stream).

    With `cuda_graphs`, a context a shape: a captured graph holds on to what its context was bound to. A
    version-compatible engine needs `host_code`: it carries a runtime of its own. Whether an engine may be opened at all
    is asked before (`trust.py`).
    """

    def __init__(self, path: Path, *, cuda_graphs: bool = False, host_code: bool = False) -> None:
        import tensorrt as trt
        import torch

        if not torch.cuda.is_available():
            raise BackendUnavailable(
                f"Running an engine needs a torch with CUDA; {torch.__version__} sees no GPU.",
                "pip install torch --index-url https://download.pytorch.org/whl/cu130",
            )
        logger = trt.Logger(trt.Logger.WARNING)
        runtime = trt.Runtime(logger)
        # A version-compatible engine carries a runtime of its own, code that runs on this machine when it is opened.
        runtime.engine_host_code_allowed = host_code
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BackendUnavailable(
                f"TensorRT {trt.__version__} on a {torch.cuda.get_device_name()} cannot open {path}: an engine runs on "
                "the GPU model and TensorRT version that built it.",
                "Build it here from its kit: limbeck build KIT --out DIR.",
            )
        self._path, self._engine = path, engine
        self._keep: tuple[Any, ...] = (logger, runtime)  # an engine must not outlive them
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        dtypes = torch_dtypes(trt, torch)
        self._dtypes = {name: dtypes[engine.get_tensor_dtype(name)] for name in names}
        self._profiles = profiles_of(engine, self._inputs)
        self._contexts: dict[int, Any] = {}
        self._captures: OrderedDict[tuple[tuple[int, ...], ...], _Bound] = OrderedDict()
        self._capturing = cuda_graphs
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.properties = {
            "runtime": f"tensorrt {trt.__version__}",
            "device": torch.cuda.get_device_name(),
            "profiles": "; ".join(f"{name} {ranges[name]}" for ranges in self._profiles for name in self._inputs),
            "hardware compatibility": str(engine.hardware_compatibility_level),
            "CUDA graphs": "a shape" if cuda_graphs else "no",
        }

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        bound = self._bind(batch)
        if bound.graph is not None:
            with self._current():
                bound.graph.replay()
        else:
            self._execute(bound.context)
        self._stream.synchronize()
        return {name: value.float().cpu().numpy() for name, value in bound.outputs.items()}

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        bound = self._bind(batch)
        launch, stream = self._launcher(bound)
        wait = stream.synchronize

        def call(_keep: object = bound) -> None:
            launch()
            wait()

        return call

    def stopwatch(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], float]:
        """A call that runs the batch and says how many milliseconds the GPU took, by CUDA events around it."""
        import torch

        bound = self._bind(batch)
        launch, stream = self._launcher(bound)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def call(_keep: object = bound) -> float:
            start.record(stream)
            launch()
            end.record(stream)
            end.synchronize()
            return float(start.elapsed_time(end))

        return call

    def close(self) -> None:
        self._captures.clear()
        self._contexts.clear()
        self._engine = None
        self._keep = ()

    def _bind(self, batch: Mapping[str, torch.Tensor]) -> _Bound:
        """Copy the inputs to the GPU, make room for the outputs, and give TensorRT the addresses of both.

        Raises:
            InputError: a shape that no profile takes.
        """
        inputs = {name: batch[name].to("cuda", self._dtypes[name]).contiguous() for name in self._inputs}
        profile = choose_profile(self._profiles, {name: tuple(value.shape) for name, value in inputs.items()})
        if self._capturing:
            return self._captured(profile, inputs)
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._address(self._contexts[profile], inputs)

    def _new_context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise BackendUnavailable(f"The GPU has too little free memory for {self._path}.")
        if not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
            raise BackendUnavailable(f"TensorRT could not choose profile {profile} of {self._path}; its log says why.")
        self._stream.synchronize()
        return context

    def _address(self, context: Any, inputs: dict[str, torch.Tensor]) -> _Bound:
        import torch

        for name, value in inputs.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise InputError(f"The engine does not take {name} of shape {tuple(value.shape)}.")
            context.set_tensor_address(name, value.data_ptr())
        outputs = {
            name: torch.empty(tuple(context.get_tensor_shape(name)), dtype=self._dtypes[name], device="cuda")
            for name in self._outputs
        }
        for name, value in outputs.items():
            context.set_tensor_address(name, value.data_ptr())
        torch.cuda.current_stream().synchronize()  # the copies of the inputs ran there
        return _Bound(context, inputs, outputs)

    def _captured(self, profile: int, inputs: dict[str, torch.Tensor]) -> _Bound:
        """The CUDA graph of these shapes with the inputs in its buffers; captured at their first sight."""
        import torch

        key = tuple(tuple(inputs[name].shape) for name in self._inputs)
        if key in self._captures:
            self._captures.move_to_end(key)
            for name, value in inputs.items():
                self._captures[key].inputs[name].copy_(value)
            torch.cuda.current_stream().synchronize()
            return self._captures[key]
        bound = self._address(self._new_context(profile), inputs)
        self._execute(bound.context)  # what TensorRT sets up at the first call of a shape must not be captured
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._execute(bound.context)
        except RuntimeError as error:
            raise BackendUnavailable(
                f"The engine {self._path} could not be captured as a CUDA graph: {first_line(error)}",
                "Export its kit again without --option cuda_graphs=true.",
            ) from error
        self._captures[key] = _Bound(bound.context, bound.inputs, bound.outputs, graph)
        if len(self._captures) > _CAPTURES:
            self._captures.popitem(last=False)
        return self._captures[key]

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise InputError("TensorRT could not run the batch; its log says why.")

    def _launcher(self, bound: _Bound) -> tuple[Callable[[], object], Any]:
        """The runtime's own call, and the stream that it goes to: a graph is replayed on torch's current one."""
        import torch

        if bound.graph is not None:
            return bound.graph.replay, torch.cuda.current_stream()
        return partial(bound.context.execute_async_v3, self._stream.cuda_stream), self._stream

    def _current(self) -> Any:
        import torch

        return torch.cuda.stream(self._stream)


def profiles_of(engine: Any, inputs: Sequence[str]) -> list[dict[str, InputRange]]:
    """The ranges of an engine's profiles, in its order."""
    return [
        {name: InputRange(*(tuple(dims) for dims in engine.get_tensor_profile_shape(name, index))) for name in inputs}
        for index in range(engine.num_optimization_profiles)
    ]


def torch_dtypes(trt: Any, torch: Any) -> dict[Any, Any]:
    """TensorRT's types of inputs and outputs, and torch's for them."""
    return {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT8: torch.int8,
        trt.DataType.UINT8: torch.uint8,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT64: torch.int64,
        trt.DataType.BOOL: torch.bool,
    }
