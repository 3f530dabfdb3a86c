"""torch: a checkpoint as weights for torch itself, or compiled ahead of time by AOTInductor into a package beside them.

The weights lie in a file of their own whatever runs them, so that they can be read back without opening machine code,
and lie on the disk once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
import torch._inductor.config
from torch import nn
from torch.utils import _pytree

from ..errors import BackendUnavailable, InputError, first_line
from ..models.anatomy import Linear, reduction_axis
from ..models.checkpoint import Checkpoint, load_model
from ..models.embedding import read_pooling
from ..models.mapped import copy_of
from ..models.tasks import get_task
from .artifact import Manifest, SparseLayer, TensorSpec
from .inputs import dynamic_shapes, longest, sample_inputs
from .kv_cache import PAST, CachedTrace
from .onnx import quiet_exporters
from .precision import cast_parameter
from .program import ProgramWeight
from .settings import ExportSettings, Precision
from .sparsity import WeightUse, prunable_modules, sparse_layer
from .unsupported import failures_named

PACKAGE_FILE = "model.pt2"
WEIGHTS_FILE = "model.safetensors"
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT_IN = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""What a cache of keys and values is called by its type."""
_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Relative rounding of a weight."""
_TURNED = "it is a Conv1D, whose weight lies the other way round: torch's sparse kernels take nn.Linear"
_INSIDE = "module."
"""How the names of traced weights begin: the checkpoint's module stands inside one that gives its output alone."""
_PAST_OF_PACKAGE = "past"
PAST_SIZES, INPUTS = "limbeck.past", "limbeck.inputs"
"""Keys in the package's metadata: heads and size of each tensor of an empty cache, and the names of the inputs."""


def in_precision(checkpoint: Checkpoint, precision: Precision, device: str) -> Checkpoint:
    """The checkpoint with a model whose weights are of this precision, on this device; float32 on the CPU is the
    checkpoint itself. Buffers stay as they are: rotary frequencies are computed in float32 on purpose.

    Raises:
        ExportMismatch: a weight that is finite in float32 is not in the precision.
    """
    dtype = DTYPES[precision]
    if dtype == torch.float32 and device == "cpu":
        return checkpoint
    names = {id(parameter): name for name, parameter in checkpoint.model.named_parameters()}

    def convert(parameter: nn.Parameter) -> torch.Tensor:
        if not parameter.is_floating_point():
            return parameter.to(device)
        return cast_parameter(parameter, dtype, names[id(parameter)]).to(device)

    return replace(checkpoint, model=copy_of(checkpoint.model, convert).to(device).eval())


def save_model(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the model as transformers loads it, and what a sentence's vector is pooled by."""
    model: Any = checkpoint.model
    kept = getattr(model, "generation_config", None)
    try:
        if kept is not None:  # the artifact's own is written as it is: this way some would be refused
            model.generation_config = type(kept)()
        with quiet_exporters():
            model.save_pretrained(folder, max_shard_size="1TB")  # one file, whatever its size
    finally:
        if kept is not None:
            model.generation_config = kept
    if checkpoint.task.name == "sentence-similarity":
        checkpoint.save_pooling(folder)


class _Answering(nn.Module):
    """A module that takes and gives tensors only: the task's output, and with a cache what is kept of the text."""

    def __init__(self, checkpoint: Checkpoint, cache: Any = None) -> None:
        super().__init__()
        self.module = checkpoint.module
        self._flags, self._output = checkpoint.task.forward_flags(), checkpoint.task.output
        self._cache = _CacheForm.of(cache) if cache is not None else None

    @property
    def config(self) -> Any:
        """The model's configuration (transformers' exporters read it)."""
        return self.module.config

    def forward(self, **inputs: Any) -> dict[str, Any]:
        if self._cache is None:
            return {self._output: self.module(**inputs, **self._flags)[self._output]}
        past = self._cache.filled(inputs.pop(_PAST_OF_PACKAGE))
        outputs = self.module(**inputs, **{PAST: past}, use_cache=True)
        return {self._output: outputs[self._output], _PAST_OF_PACKAGE: kept_of(outputs[PAST])}


@dataclass(frozen=True)
class _CacheForm:
    """A cache of transformers without its keys and values: layers with a sliding window hold other tensors too."""

    leaves: list[torch.Tensor]
    form: Any

    @classmethod
    def of(cls, cache: Any) -> Self:
        return cls(*_pytree.tree_flatten(cache))

    def filled(self, kept: Sequence[torch.Tensor]) -> Any:
        """The cache with these keys and values."""
        given = iter(kept)
        return _pytree.tree_unflatten([next(given) if _is_kept(leaf) else leaf for leaf in self.leaves], self.form)


def kept_of(cache: Any) -> list[torch.Tensor]:
    """Keys and values of a cache, layer by layer, each [batch, heads, read, size]."""
    return [leaf for leaf in _pytree.tree_leaves(cache) if _is_kept(leaf)]


def _is_kept(leaf: torch.Tensor) -> bool:
    return leaf.ndim == 4


@dataclass(frozen=True)
class Traced:
    """A program of torch.export with what it is called with."""

    program: torch.export.ExportedProgram
    weights: Mapping[str, torch.Tensor]
    """Everything that the package may ask for, by its name there."""
    metadata: dict[str, str]


def trace(checkpoint: Checkpoint, settings: ExportSettings, cached: CachedTrace | None) -> Traced:
    """Trace the checkpoint's module with transformers' own exporter. Batch and sequence vary within the settings'
    shapes; with a cache they vary freely, and so does the length of what is kept."""
    from transformers.exporters import DynamoConfig, DynamoExporter

    if cached is None:
        module, metadata = _Answering(checkpoint), {}
        known = sample_inputs(checkpoint, settings.shapes)
        sample = {name: known[name] for name in checkpoint.input_names}
        varying = dynamic_shapes(checkpoint, settings.shapes)
    else:
        past = cached.inputs[PAST]
        module, kept = _Answering(checkpoint, past), kept_of(past)
        sample = {name: cached.inputs[name] for name in cached.inputs if name not in (PAST, "use_cache")}
        varying = {
            **{name: cached.varying[name] for name in sample},
            _PAST_OF_PACKAGE: cached.varying[PAST][: len(kept)],
        }
        sample |= {_PAST_OF_PACKAGE: kept}
        metadata = {PAST_SIZES: json.dumps([[side.shape[1], side.shape[3]] for side in kept])}
    device = next(module.parameters()).device
    sample = _pytree.tree_map_only(torch.Tensor, lambda value: value.to(device), sample)
    metadata[INPUTS] = json.dumps([name for name in sample if name != _PAST_OF_PACKAGE])
    with quiet_exporters(), failures_named(checkpoint.module):
        program = DynamoExporter().export(module, sample, DynamoConfig(dynamic_shapes=varying)).program
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    weights = {name: value.detach() for pairs in named for name, value in pairs}
    return Traced(program, {**weights, **program.constants}, metadata)


def compile_package(traced: Traced, folder: Path) -> None:
    """Write the package, and beside it the weights that it asks for under their names there.

    Raises:
        BackendUnavailable: no C++ compiler, or one that fails.
    """
    from safetensors.torch import save_file

    settings = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.metadata": traced.metadata,
        "aot_inductor.enable_line_tables": False,  # for debuggers: half of its size
        "cpp.dynamic_threads": True,  # else the number of threads is compiled in
    }
    path = folder / PACKAGE_FILE
    with quiet_exporters(), compiler_named(), _all_weights_outside():
        torch._inductor.aoti_compile_and_package(traced.program, package_path=str(path), inductor_configs=settings)
        wanted = load_package(path).get_constant_fqns()
    save_file(_apart({name: traced.weights[name].cpu().contiguous() for name in wanted}), folder / WEIGHTS_FILE)


@contextmanager
def _all_weights_outside() -> Iterator[None]:
    """inductor writes vectors of up to 8 numbers (a classifier's bias) into the code, where nobody could read them
    back; here they stay with the other weights."""
    from torch._inductor.graph import GraphLowering

    with patch.object(GraphLowering, "can_inline_constant", staticmethod(lambda _: False)):
        yield


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same without shared memory, which safetensors does not write."""
    seen: set[int] = set()
    apart = {}
    for name, value in tensors.items():
        apart[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return apart


def load_package(path: Path) -> Any:
    """Open a package: its machine code is run. Its weights are still to be loaded.

    torch would look whether this CPU is the one that it was compiled for, by compiling a few programs: that takes
    seconds, and ends in a warning at most. Here the manifest tells it.
    """
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        return torch._inductor.aoti_load_package(str(path))


@contextmanager
def compiler_named() -> Iterator[None]:
    """Around what may call the C++ compiler.

    Raises:
        BackendUnavailable: there is none, or it fails.
    """
    require_compiler()
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    try:
        yield
    except (CppCompileError, InvalidCxxCompiler, InductorError) as error:
        inner = getattr(error, "inner_exception", error)
        if not isinstance(inner, CppCompileError | InvalidCxxCompiler):
            raise
        said = str(getattr(inner, "output", inner)).strip().splitlines() or ["it says nothing"]
        raise BackendUnavailable(
            f"The C++ compiler {cxx()} cannot compile what torch has written for it: {said[-1].strip()}",
            "Install a g++ that compiles C++20, with its headers, or name one by CXX; --option compiler=eager compiles "
            "nothing.",
        ) from error


def require_compiler() -> None:
    """Refuse to compile where there is no compiler.

    Raises:
        BackendUnavailable: see above.
    """
    if shutil.which(cxx()) is None:
        raise BackendUnavailable(
            f"torch compiles models with a C++ compiler, and {cxx()} is not installed.",
            "Install it (apt-get install g++), or take --option compiler=eager, which compiles nothing.",
        )


def cxx() -> str:
    """The C++ compiler that torch calls."""
    named = torch._inductor.config.cpp.cxx
    return str(named[-1] if isinstance(named, tuple | list) else named)


def sparse_layers(checkpoint: Checkpoint) -> list[SparseLayer]:
    """What torch's sparse kernels would see of each layer's weight, in the module's order."""
    prunable = prunable_modules(checkpoint)
    found = []
    for name, part in checkpoint.module.named_modules():
        if not isinstance(part, Linear):
            continue
        weight = part.weight.detach().float().cpu().numpy()
        layer = sparse_layer(WeightUse(name, weight, reduction_axis(part)), prunable)
        if layer.eligible and not isinstance(part, nn.Linear):
            layer = layer.model_copy(update={"eligible": False, "reason": _TURNED})
        found.append(layer)
    return found


def read_model(folder: Path, manifest: Manifest) -> Iterator[ProgramWeight]:
    """The weights that transformers loads, under their names in the checkpoint's module."""
    task = get_task(manifest.task)
    module = task.module(load_model(folder, task, dtype=dtype_of(manifest)), read_pooling(folder))
    for name, value in module.named_parameters(remove_duplicate=False):
        yield weight_of(name, value)


def dtype_of(manifest: Manifest) -> torch.dtype:
    """The type that an artifact's weights have and are multiplied in.

    Raises:
        InputError: a precision that no torch program has.
    """
    precision = manifest.settings.precision
    if precision not in DTYPES:
        raise InputError(
            f"The manifest says {precision}, and a program of torch is {', '.join(DTYPES)}.",
            "Export it again; do not run it.",
        )
    return DTYPES[precision]


def read_constants(file: Path) -> Iterator[ProgramWeight]:
    """The weights beside a package, one at a time, under their names in the checkpoint's module."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                value = weights.get_tensor(name)
                if value.is_floating_point():
                    yield weight_of(name_in_module(name), value)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read: {first_line(error)}.") from error


def name_in_module(name: str) -> str:
    """The name, in the checkpoint's module, of a weight beside a package."""
    return name.removeprefix(_INSIDE)


def weight_of(name: str, value: torch.Tensor) -> ProgramWeight:
    """A weight with what its type explains of a difference from float32."""
    values = value.detach().float().cpu().numpy()
    rounding = _ROUNDING.get(value.dtype)
    return ProgramWeight(name, values, 0.0 if rounding is None else abs(values) * rounding + 2.0**-24)


def tensor_specs(checkpoint: Checkpoint, settings: ExportSettings) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and output for the manifest: what varies, and the output's size as a call has it."""
    shapes = settings.shapes
    axes = [
        shapes.min_batch if shapes.min_batch == shapes.max_batch else None,
        shapes.min_sequence if shapes.min_sequence == longest(checkpoint, shapes) else None,
    ]
    inputs = [TensorSpec(name=name, dtype="int64", shape=list(axes)) for name in checkpoint.input_names]
    sample = sample_inputs(checkpoint, shapes)
    name = checkpoint.task.output
    values = checkpoint.run(sample)[name]
    varying = 2 if values.ndim >= 3 else 1  # per token [batch, sequence, ...], per text [batch, ...]
    dtype = str(next(checkpoint.module.parameters()).dtype).removeprefix("torch.")
    return inputs, [TensorSpec(name=name, dtype=dtype, shape=[*axes[:varying], *values.shape[varying:]])]
