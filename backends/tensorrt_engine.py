"""A built TensorRT engine on the GPU, with torch's memory and streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable, InputError
from .base import Runner

if TYPE_CHECKING:
    import numpy as np
    import torch


class EngineRunner(Runner):
    """One execution context on a stream of its own (TensorRT synchronises more on the default stream)."""

    def __init__(self, path: Path) -> None:
        import tensorrt as trt
        import torch

        if not torch.cuda.is_available():
            raise BackendUnavailable(
                f"Running an engine needs a torch with CUDA; {torch.__version__} sees no GPU.",
                "pip install torch --index-url https://download.pytorch.org/whl/cu130",
            )
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        runtime.engine_host_code_allowed = True  # version-compatible engines carry their runtime; hashes were checked
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BackendUnavailable(
                f"TensorRT {trt.__version__} on a {torch.cuda.get_device_name()} cannot open {path}: an engine runs on "
                "the GPU model and TensorRT version that built it.",
                "Build it here from its kit: limbeck build KIT --out DIR.",
            )
        context = engine.create_execution_context()
        if context is None:
            raise BackendUnavailable(f"The GPU has too little free memory for {path}.")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        dtypes = torch_dtypes(trt, torch)
        self._dtypes = {name: dtypes[engine.get_tensor_dtype(name)] for name in names}
        self._keep = (runtime, engine)  # a context must not outlive them
        self._context: Any = context
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.properties = {
            "runtime": f"tensorrt {trt.__version__}",
            "device": torch.cuda.get_device_name(),
            "profiles": "; ".join(_profile_text(engine, name) for name in self._inputs),
            "hardware compatibility": str(engine.hardware_compatibility_level),
        }

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        outputs = self._bind(batch)[1]
        self._execute()
        return {name: value.float().cpu().numpy() for name, value in outputs.items()}

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        bound = self._bind(batch)
        execute, handle, wait = self._context.execute_async_v3, self._stream.cuda_stream, self._stream.synchronize

        def call(_keep: object = bound) -> None:  # the addresses are raw: the tensors must live as long as the call
            execute(handle)
            wait()

        return call

    def close(self) -> None:
        self._context = None
        self._keep = ()  # type: ignore[assignment]

    def _bind(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Copy the inputs to the GPU, make room for the outputs, and give TensorRT the addresses of both."""
        import torch

        context = self._context
        inputs = {name: batch[name].to("cuda", self._dtypes[name]).contiguous() for name in self._inputs}
        for name, value in inputs.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise InputError(
                    f"The engine does not take {name} of shape {tuple(value.shape)}: it was built for "
                    f"{self.properties['profiles']}.",
                    "Build a kit that was exported for larger shapes.",
                )
            context.set_tensor_address(name, value.data_ptr())
        outputs = {
            name: torch.empty(tuple(context.get_tensor_shape(name)), dtype=self._dtypes[name], device="cuda")
            for name in self._outputs
        }
        for name, value in outputs.items():
            context.set_tensor_address(name, value.data_ptr())
        torch.cuda.current_stream().synchronize()  # the copies above ran there
        return inputs, outputs

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise InputError("TensorRT could not run the batch; its log says why.")
        self._stream.synchronize()


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


def _profile_text(engine: Any, name: str) -> str:
    smallest, best, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
    return f"{name} {smallest} to {largest}, tuned for {best}"
