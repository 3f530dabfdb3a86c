"""One shard of a teacher's cache: an Arrow file with a row an example, for every tensor one column of raw bytes without
padding, and a checksum."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict

_ROW, _CHECKSUM = "@row", "@checksum"


class TensorLayout(BaseModel):
    """How one tensor is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_token: bool
    shape: list[int]
    """Of one example, or of one token of it."""
    kept_as: Literal["float16", "float32", "int32"]

    def bytes_of(self, examples: int, tokens: int) -> int:
        """Bytes of so many examples of so many tokens together."""
        return np.dtype(self.kept_as).itemsize * math.prod(self.shape) * (tokens if self.per_token else examples)

    def dtype_of(self, content: np.ndarray, tokens: int) -> str:
        """What an example's bytes are: float32 where float16 could not hold them, which their number tells."""
        doubled = self.kept_as == "float16" and content.nbytes > self.bytes_of(1, tokens)
        return "float32" if doubled else self.kept_as


def schema_of(tensors: Mapping[str, TensorLayout]) -> pa.Schema:
    """The columns of a shard."""
    columns = [pa.field(name, pa.large_binary()) for name in tensors]
    return pa.schema([*columns, pa.field(_ROW, pa.int32()), pa.field(_CHECKSUM, pa.uint32())])


def record_batch(
    rows: np.ndarray, views: Mapping[str, torch.Tensor], tensors: Mapping[str, TensorLayout], tokens: Sequence[int]
) -> pa.RecordBatch:
    """The tensors [batch, ...] of the examples `rows` as they are written; `tokens` are the examples' lengths."""
    columns = [_encoded(views[name], layout, tokens) for name, layout in tensors.items()]
    checksums = [checksum_of(example) for example in zip(*columns, strict=True)]
    arrays = [pa.array(column, pa.large_binary()) for column in columns]
    arrays += [pa.array(rows, pa.int32()), pa.array(checksums, pa.uint32())]
    return pa.record_batch(arrays, schema=schema_of(tensors))


def _encoded(values: torch.Tensor, layout: TensorLayout, tokens: Sequence[int]) -> list[bytes]:
    """One tensor [batch, ...] as the bytes of each example, padding left out."""
    array = values.detach().cpu().to(torch.float32 if values.is_floating_point() else torch.int32).numpy()
    if layout.kept_as == "float16" and np.abs(array).max(initial=0) <= np.finfo(np.float16).max:
        array = array.astype(np.float16)
    return [row[: tokens[i]].tobytes() if layout.per_token else row.tobytes() for i, row in enumerate(array)]


def checksum_of(parts: Sequence[Any]) -> int:
    """CRC-32 of bytes that lie apart."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


@dataclass(frozen=True)
class Shard:
    """One mapped file, and where in it each example's tensors lie."""

    content: np.ndarray
    """Every byte of the file, uint8."""
    starts: Mapping[str, np.ndarray]
    """Name to the byte at which each example begins, int64 [examples]."""
    sizes: Mapping[str, np.ndarray]
    """Name to bytes of each example, int32 [examples]."""
    rows: np.ndarray
    checksums: np.ndarray

    def bytes_of(self, name: str, place: int) -> np.ndarray:
        """One example's tensor as it lies in the file."""
        start = self.starts[name][place]
        return self.content[start : start + self.sizes[name][place]]


def open_shard(path: Path, tensors: Mapping[str, TensorLayout]) -> Shard:
    """Map a shard; its tensors stay on disk.

    Raises:
        OSError, pa.ArrowInvalid, KeyError: it is not there, or is not whole.
    """
    content = pa.memory_map(str(path)).read_buffer()
    reader = pa.ipc.open_file(content)
    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    starts: dict[str, np.ndarray] = {}
    sizes: dict[str, np.ndarray] = {}
    for name in tensors:
        begins, lengths = [], []
        for batch in batches:
            _, offsets, values = batch.column(name).buffers()
            edges = np.frombuffer(offsets, dtype=np.int64)[: batch.num_rows + 1]
            begins.append(edges[:-1] + (values.address - content.address))
            lengths.append(np.diff(edges))
        starts[name], sizes[name] = np.concatenate(begins), np.concatenate(lengths).astype(np.int32)
    rows, checksums = (
        np.concatenate([batch.column(name).to_numpy() for batch in batches]) for name in (_ROW, _CHECKSUM)
    )
    return Shard(np.frombuffer(content, dtype=np.uint8), starts, sizes, rows, checksums)
