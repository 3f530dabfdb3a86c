"""torch as a runtime: a module that transformers loads, as it is or compiled when it is first called; and packages of
AOTInductor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..environment import available_cpus
from ..errors import BackendUnavailable, InputError, first_line
from ..exporters.kv_cache import POSITIONS, positions_of
from ..exporters.settings import ShapeRange
from ..exporters.torch import (
    INPUTS,
    PACKAGE_FILE,
    PAST_SIZES,
    WEIGHTS_FILE,
    compiler_named,
    dtype_of,
    load_package,
)
from ..models.checkpoint import load_model
from ..models.embedding import read_pooling
from ..models.module_outputs import module_outputs
from ..models.tasks import get_task
from .base import Runner
from .decoder import Decoder
from .torch_eager import EagerDecoder
from .torch_sparse import LayerChoice, choose_kernels, told

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..exporters.artifact import Manifest


@dataclass(frozen=True)
class Place:
    """Where a program runs."""

    device: str
    """`cpu` or `cuda`."""
    threads: int | None = None

    def properties(self, runtime: str) -> dict[str, str]:
        """What is said of the runtime; what it computes float32 products in is a setting of the process."""
        found = {
            "runtime": f"torch {torch.__version__} {runtime}",
            "float32 products": torch.get_float32_matmul_precision(),
            "threads": str(torch.get_num_threads()),
        }
        return found if self.device == "cpu" else {**found, "device": self.device_name}

    @property
    def device_name(self) -> str:
        """The GPU's name, or `cpu`."""
        return self.device if self.device == "cpu" else torch.cuda.get_device_name()

    def take(self) -> None:
        """Set the number of threads, which torch keeps for the process."""
        torch.set_num_threads(self.threads or available_cpus())

    def put(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor on the device, in one piece: compiled code trusts that inputs lie as those of the trace did."""
        return value.to(self.device).contiguous()

    def waited_for(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call with its end awaited: on a GPU it returns before the work is done."""
        if self.device == "cpu":
            return call
        wait = torch.cuda.synchronize

        def whole() -> object:
            found = call()
            wait()
            return found

        return whole


class ModuleRunner(Runner):
    """A model that transformers loads from its own files.

    Args:
        compiled: by `torch.compile`, when it is first called with sizes of a kind (batches of one are another kind).
        sparse: with sparse weights in the layers that the manifest lists as 2:4, where those are faster.
    """

    choices: list[LayerChoice]
    """What became of each 2:4 layer."""

    def __init__(
        self, folder: Path, manifest: Manifest, place: Place, *, compiled: bool = False, sparse: bool = False
    ) -> None:
        place.take()
        self._place, self._compiled, self._shapes = place, compiled, manifest.settings.shapes
        self.task, dtype = get_task(manifest.task), dtype_of(manifest)
        self.model = load_model(folder, self.task, dtype=dtype).to(place.device)
        self.module = self.task.module(self.model, read_pooling(folder)).eval()
        self.choices = self._sparse(manifest) if sparse else []
        self._names = [spec.name for spec in manifest.inputs]
        self._writes = manifest.cache is not None
        self._run = self._compile(self._answer)
        kind = "compiled by inductor" if compiled else "eager"
        self.properties = {**place.properties(kind), "dtype": str(dtype).removeprefix("torch.")}
        if self.choices:
            self.properties["sparse"] = told(self.choices)

    def _sparse(self, manifest: Manifest) -> list[LayerChoice]:
        """Sparse weights where they are faster here, at the shape that the program is tuned for."""
        names = [layer.layer for layer in manifest.sparse_layers if layer.eligible and layer.pattern]
        return choose_kernels(self.module, names, self._shapes.opt_batch * self._shapes.opt_sequence)

    def _answer(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = self.module(**inputs, **self.task.forward_flags())[self.task.output]
        return found

    def _compile(self, call: Callable[..., Any]) -> Callable[..., Any]:
        if not self._compiled:
            return call
        shapes = self._shapes
        varies = shapes.min_batch < shapes.max_batch or shapes.min_sequence < shapes.max_sequence
        return torch.compile(call, dynamic=varies)

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        call = self._bound(batch)
        with self._failures(batch):
            found = call()
        return {self.task.output: found.float().cpu().numpy()}

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        return self._place.waited_for(self._bound(batch))

    def _bound(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        inputs = {name: self._place.put(value) for name, value in feed(batch, self._names, self._shapes).items()}
        run = self._run

        def call() -> torch.Tensor:
            with torch.inference_mode():
                found: torch.Tensor = run(inputs)
                return found

        return call

    @contextmanager
    def _failures(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        if not self._compiled:
            with refused_shapes(batch):
                yield
            return
        with compiler_named():
            yield

    def decoder(self) -> Decoder:
        if not self._writes:
            return super().decoder()
        return _CompiledDecoder(self.model) if self._compiled else EagerDecoder(self.model)


class _CompiledDecoder(EagerDecoder):
    """Prompts, and whatever else is read in pieces, are read by the model as it is; for single tokens it is compiled,
    once for one text and once for more. What is kept lies in one piece, or it would be compiled again where a prompt
    left it otherwise."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._compiled = torch.compile(model, dynamic=True)

    @torch.inference_mode()
    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        goes_on = ids.shape[1] == 1 < mask.shape[1]
        self._forward = self._compiled if goes_on else self._model
        with compiler_named():
            logits = super().step(ids, mask, positions)
        if not goes_on:
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
        return logits


class InsideRunner(ModuleRunner):
    """An eager program that also gives what some of its modules hand on."""

    def __init__(self, folder: Path, manifest: Manifest, place: Place, modules: Sequence[str]) -> None:
        super().__init__(folder, manifest, place)
        self._modules = modules

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        with module_outputs(self.module) as outputs:
            answer = super().__call__(batch)
        seen = {name: outputs.tensors[name].cpu().numpy() for name in self._modules if name in outputs.tensors}
        return {**seen, **answer}


class PackageRunner(Runner):
    """A package of AOTInductor with the weights that lie beside it."""

    def __init__(self, folder: Path, manifest: Manifest, place: Place) -> None:
        from safetensors.torch import load_file

        place.take()
        path = folder / PACKAGE_FILE
        try:
            program = load_package(path)
            self._weights = load_file(folder / WEIGHTS_FILE, device=place.device)
            # They stay where they are: mapped from the file, or once on the GPU.
            program.load_constants(self._weights, check_full_update=True, user_managed=True)
        except (RuntimeError, OSError) as error:
            raise BackendUnavailable(
                f"torch {torch.__version__} cannot open {path}: {first_line(error)}",
                "Export it again, with the torch that is to run it.",
            ) from error
        self._program, self._place, self._shapes = program, place, manifest.settings.shapes
        metadata = program.get_metadata()
        self._names: list[str] = json.loads(metadata[INPUTS])
        self._past: list[list[int]] = json.loads(metadata.get(PAST_SIZES, "[]"))
        self._dtype = dtype_of(manifest)
        self._output = manifest.outputs[0].name
        self.properties = {**place.properties("AOTInductor"), "dtype": str(self._dtype).removeprefix("torch.")}

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        with refused_shapes(batch):
            found = self._program.loader.run(self._inputs(batch))[0]
        return {self._output: found.float().cpu().numpy()}

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        run, inputs = self._program.loader.run, self._inputs(batch)
        return self._place.waited_for(lambda: run(inputs))

    def _inputs(self, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        given = [self._place.put(value) for value in feed(batch, self._names, self._shapes).values()]
        return [*given, *self.empty_cache(len(given[0]))]

    def run(self, given: Mapping[str, torch.Tensor], past: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One call with these inputs by name and this cache; the output, and the cache that follows."""
        found: list[torch.Tensor] = self._program.loader.run(
            [*(self._place.put(given[name]) for name in self._names), *past]
        )
        return found

    def empty_cache(self, rows: int) -> list[torch.Tensor]:
        """Keys and values of so many texts before anything is read; none where the program keeps none."""
        sizes = [(rows, heads, 0, size) for heads, size in self._past]
        return [torch.empty(size, dtype=self._dtype, device=self._place.device) for size in sizes]

    def require_room(self, tokens: int) -> None:
        """Refuse texts that are longer than what the program has places for: compiled code reads beyond a table's end.

        Raises:
            InputError: such a text.
        """
        if tokens > self._shapes.max_sequence:
            raise InputError(f"The program holds {self._shapes.max_sequence} tokens of a text, not {tokens}.")

    def decoder(self) -> Decoder:
        return _PackageDecoder(self) if self._past else super().decoder()


class _PackageDecoder(Decoder):
    """What a step hands out of the cache is what the next one is given."""

    def __init__(self, runner: PackageRunner) -> None:
        self._runner = runner
        self._past: list[torch.Tensor] = []

    def start(self, rows: int) -> None:
        self._past = self._runner.empty_cache(rows)

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self._runner.require_room(mask.shape[1])
        given = {"input_ids": ids, "attention_mask": mask, POSITIONS: positions}
        tensors = {name: torch.from_numpy(value) for name, value in given.items()}
        logits, *self._past = self._runner.run(tensors, self._past)
        last: np.ndarray = logits[:, -1].float().cpu().numpy()
        return last

    def cache_bytes(self) -> int:
        return sum(side.nbytes for side in self._past)


def feed(batch: Mapping[str, torch.Tensor], names: Sequence[str], shapes: ShapeRange) -> dict[str, torch.Tensor]:
    """The inputs of a program out of a batch, int64 [batch, sequence] by name. Compiled code does not look at sizes: of
    those that it was not made for it makes nonsense, or reads beyond a table's end.

    Raises:
        InputError: the batch lacks an input, or has a size that the program does not take.
    """
    if POSITIONS in names and POSITIONS not in batch and "attention_mask" in batch:
        batch = {**batch, POSITIONS: positions_of(batch["attention_mask"])}
    for name in names:
        if name not in batch:
            raise InputError(
                f"The program takes {name}, which the batch does not have: its tokenizer is not the model's.",
                "Give the artifact its own tokenizer: export it again.",
            )
    rows, tokens = batch[names[0]].shape
    if not (shapes.min_batch <= rows <= shapes.max_batch and shapes.min_sequence <= tokens <= shapes.max_sequence):
        raise InputError(
            f"The program does not take inputs of shape {(rows, tokens)}: it takes batches of {shapes.min_batch} to "
            f"{shapes.max_batch} and {shapes.min_sequence} to {shapes.max_sequence} tokens."
        )
    return {name: batch[name] for name in names}


@contextmanager
def refused_shapes(batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Around a call: what torch says of a batch, in words.

    Raises:
        InputError: the call failed.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        shape = tuple(next(iter(batch.values())).shape)
        raise InputError(f"The program does not take inputs of shape {shape}: {first_line(error)}") from error
