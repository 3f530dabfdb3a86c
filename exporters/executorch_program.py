"""What lies in a `.pte`: the graphs that XNNPACK was handed, the kernels that run beside them, and every constant.

The program is read by ExecuTorch's own deserialiser, XNNPACK's graphs by the flatbuffers compiler that comes with it.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, first_line
from .program import rounding_of

DELEGATE = "XnnpackBackend"
_OWN = "executorch_prim::"
"""Prefix of kernels that compute sizes and make views: no work on numbers."""
_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "qint8": "int8", "qcint8": "int8",
          "qdint8": "int8", "quint8": "uint8", "qint32": "int32", "qcint32": "int32"}  # fmt: skip
_TRANSPOSED = 1
"""XNNPACK's flag of a product whose weight lies [inputs, outputs]."""
_NOT_JSON = re.compile(rb"(?<=: )(-?)(inf|nan)\b")
_FLOATS: dict[int, np.dtype[Any]] = {6: np.dtype(np.float32), 5: np.dtype(np.float16)}
"""ExecuTorch's numbers of the types that a parameter may be stored in."""


@dataclass(frozen=True)
class Constant:
    """A constant as the file holds it.

    Attributes:
        place: where it lies, the same for the same file: `graph 3, value 7` or `buffer 12`.
        raw: as stored, [outputs, inputs] where it is multiplied.
        scale: what a step of it stands for, broadcastable to `raw`; `None` where it is stored as it was traced.
        stored: the type of `raw`.
    """

    place: str
    raw: np.ndarray
    scale: np.ndarray | None
    stored: str

    @property
    def values(self) -> np.ndarray:
        """Brought back to real numbers, float32."""
        real: np.ndarray = self.raw.astype(np.float32)
        return real if self.scale is None else real * self.scale

    @property
    def step(self) -> np.ndarray | float:
        """The largest rounding that the storage explains: half a quantisation step."""
        if self.scale is None:
            return 0.0
        return np.broadcast_to(rounding_of(self.raw, np.iinfo(self.raw.dtype).max) * self.scale, self.raw.shape)


@dataclass(frozen=True)
class Product:
    """One product with a stored weight that XNNPACK computes."""

    weight: Constant
    computed: str
    """The type of what it is multiplied with."""
    given: tuple[float, float] | None
    """What its input is cut to, where that was fixed when the program was made."""
    sizes: tuple[int, ...]
    """Of its input, as the graph tells them."""
    axis: int
    """The axis of the weight that is summed over."""


class XnnGraph:
    """One of the graphs that XNNPACK was handed."""

    def __init__(self, number: int, graph: dict[str, Any], data: dict[str, bytes]) -> None:
        self._number, self._graph, self._data = number, graph, data
        self._values = [_Value.of(value) for value in graph["xvalues"]]

    @property
    def operators(self) -> Iterator[str]:
        """The kinds of its nodes, in order."""
        return (node["xnode_union_type"].removeprefix("XNN") for node in self._graph["xnodes"])

    @property
    def constants(self) -> Iterator[Constant]:
        """Every one that is stored in a known type."""
        found = (self._constant(number) for number in range(len(self._values)))
        return (constant for constant in found if constant is not None)

    @property
    def products(self) -> Iterator[Product]:
        """Its products with a stored weight."""
        for node in self._graph["xnodes"]:
            if node["xnode_union_type"] != "XNNFullyConnected":
                continue
            given = self._values[node["xnode_union"]["input1_id"]]
            weight = self._constant(node["xnode_union"]["filter_id"])
            turned = node["xnode_union"]["flags"] & _TRANSPOSED
            if weight is not None:
                yield Product(weight, given.type, given.range, given.sizes, 0 if turned else 1)

    @property
    def attention(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The sizes of both operands of each product of two activations."""
        for node in self._graph["xnodes"]:
            if node["xnode_union_type"] == "XNNBatchMatrixMultiply":
                first, second = (self._values[node["xnode_union"][name]] for name in ("input1_id", "input2_id"))
                yield first.sizes, second.sizes

    def _constant(self, number: int) -> Constant | None:
        value = self._values[number]
        raw = self._bytes(value.buffer)
        if raw is None or value.type not in ("float32", "float16", "int8", "int32"):
            return None
        array = np.frombuffer(raw, value.type)[: int(np.prod(value.sizes))].reshape(value.sizes)
        return Constant(f"graph {self._number}, value {number}", array, self._scale(value), value.type)

    def _scale(self, value: _Value) -> np.ndarray | None:
        if value.scale_buffer is None:
            return None if value.scale is None else np.asarray([value.scale], np.float32)
        raw = self._bytes(value.scale_buffer)
        scales = np.frombuffer(raw or b"", np.float32)
        shape = [1] * len(value.sizes)
        shape[value.channel_axis] = -1
        return scales.reshape(shape)

    def _bytes(self, buffer: int) -> bytes | None:
        if not buffer:
            return None
        entry = self._graph["constant_data"][buffer]
        return self._data[entry["named_key"]][: entry["size"]]


@dataclass(frozen=True)
class _Value:
    """A tensor of one of XNNPACK's graphs."""

    type: str
    sizes: tuple[int, ...]
    buffer: int
    scale: float | None = None
    zero_point: int = 0
    scale_buffer: int | None = None
    channel_axis: int = 0

    @classmethod
    def of(cls, value: dict[str, Any]) -> _Value:
        inside = value["xvalue_union"]
        tensor = inside.get("tensor_value", inside)
        kind = tensor["datatype"].removeprefix("xnn_datatype_")
        quantised: dict[str, Any] = inside.get("quant_params", {})
        by_channel = quantised.get("num_scales", 0) > 0
        return cls(
            type=_TYPES.get(kind, kind),
            sizes=tuple(tensor["dims"]),
            buffer=tensor["constant_buffer_idx"],
            scale=None if by_channel or "scale" not in quantised else float(quantised["scale"]),
            zero_point=quantised.get("zero_point", 0),
            scale_buffer=quantised["scale_buffer_idx"] if by_channel else None,
            channel_axis=quantised.get("channel_dim", 0),
        )

    @property
    def range(self) -> tuple[float, float] | None:
        if self.scale is None or self.type not in ("int8", "uint8"):
            return None
        ends = np.iinfo(self.type)
        return (int(ends.min) - self.zero_point) * self.scale, (int(ends.max) - self.zero_point) * self.scale


class PteProgram:
    """A `.pte` file that was read whole."""

    def __init__(self, plan: Any, buffers: Sequence[Any], graphs: Sequence[XnnGraph]) -> None:
        self._plan, self._buffers, self.graphs = plan, buffers, graphs

    @property
    def planned_bytes(self) -> int:
        """Memory that is planned for what is handed from one graph or kernel to the next."""
        return int(sum(self._plan.non_const_buffer_sizes))

    @cached_property
    def kernels(self) -> Counter[str]:
        """How often each of ExecuTorch's own kernels is called, by its operator's name."""
        names = (name for name, _ in self._calls() if not name.startswith(_OWN) and "::sym_" not in name)
        return Counter(name.removeprefix("aten::") for name in names)

    @property
    def tables(self) -> Iterator[Constant]:
        """Every table whose rows are looked up."""
        for name, args in self._calls():
            if name == "aten::embedding" and (table := self._constant(args[0])) is not None:
                yield table

    @property
    def constants(self) -> Iterator[Constant]:
        """Every constant, of a graph or a kernel, once."""
        for graph in self.graphs:
            yield from graph.constants
        calls = (instruction.instr_args for chain in self._plan.chains for instruction in chain.instructions)
        arguments = dict.fromkeys(argument for call in calls for argument in getattr(call, "args", []))
        yield from (constant for constant in map(self._constant, arguments) if constant is not None)

    def _calls(self) -> Iterator[tuple[str, list[int]]]:
        for chain in self._plan.chains:
            for instruction in chain.instructions:
                call = instruction.instr_args
                if hasattr(call, "op_index"):
                    yield self._plan.operators[call.op_index].name, call.args

    def _constant(self, value: int) -> Constant | None:
        tensor = self._plan.values[value].val
        buffer = getattr(tensor, "data_buffer_idx", 0)
        if not buffer or tensor.allocation_info is not None or int(tensor.scalar_type) not in _FLOATS:
            return None
        kind = _FLOATS[int(tensor.scalar_type)]
        size = int(np.prod(tensor.sizes))
        raw = np.frombuffer(self._buffers[buffer].storage, kind, size).reshape(tensor.sizes)
        return Constant(f"buffer {buffer}", raw, None, kind.name)


def read_program(path: Path) -> PteProgram:
    """Read a `.pte` that may be anybody's.

    Raises:
        InputError: a file that does not parse, or a program for another accelerator.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    try:
        file = deserialize_pte_binary(path.read_bytes())
        (plan,) = file.program.execution_plan
        strangers = sorted({delegate.id for delegate in plan.delegates} - {DELEGATE})
        graphs = [] if strangers else _graphs_of(file, plan)
    except OSError:
        raise
    except Exception as error:  # a deserialiser raises anything on bytes that are no program
        raise InputError(f"{path} cannot be read as an ExecuTorch program: {first_line(error)}.") from error
    if strangers:
        raise InputError(f"{path} is a program for {', '.join(strangers)}; limbeck reads those for {DELEGATE}.")
    return PteProgram(plan, file.program.constant_buffer, graphs)


def _graphs_of(file: Any, plan: Any) -> list[XnnGraph]:
    named, inline = file.named_data, file.program.backend_delegate_data
    data = {key: bytes(named.buffers[entry.buffer_index]) for key, entry in named.pte_data.items()} if named else {}
    payloads = [bytes(inline[delegate.processed.index].data) for delegate in plan.delegates]
    return [XnnGraph(number, graph, data) for number, graph in enumerate(_spelt_out(payloads))]


def _spelt_out(payloads: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """The graphs that XNNPACK was handed, as the schema that comes with ExecuTorch spells them."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

    schema = files("executorch.backends.xnnpack.serialization") / "schema.fbs"
    with tempfile.TemporaryDirectory(prefix="limbeck-") as scratch, as_file(schema) as grammar:
        folder, names = Path(scratch), [f"{number}.bin" for number in range(len(payloads))]
        for name, payload in zip(names, payloads, strict=True):
            header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
            start = header.flatbuffer_offset
            (folder / name).write_bytes(payload[start : start + header.flatbuffer_size])
        if names:
            _flatc("--json", "--strict-json", "--defaults-json", str(grammar), "--", *names, folder=folder)
        for number in range(len(payloads)):
            text = _NOT_JSON.sub(rb"\1\2", (folder / f"{number}.json").read_bytes())
            yield json.loads(text.replace(b": inf", b": Infinity").replace(b": -inf", b": -Infinity"))


def _flatc(*words: str, folder: Path) -> None:
    with as_file(files("executorch.data.bin") / "flatc") as program:
        done = subprocess.run([str(program), *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError((done.stdout + done.stderr).strip() or f"flatc ended with {done.returncode}")
