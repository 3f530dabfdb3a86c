"""What the objectives read of the teacher, computed once and kept on disk in Arrow, mapped into memory when read.

A folder holds `manifest.json` (whose outputs, for which examples) and shards (`cache_shards.py`). Shards are written
aside and renamed, so a killed writer loses at most the one it was at; examples of like length lie together, as they
were computed.

Numbers are kept as float32 and ids as int32; what lies inside the model (hidden states, queries, keys, values) as
float16, which rounds by 2^-11 of a number (and below 6e-5 by 3e-8), where float16 can hold it, else as float32.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from .. import __version__
from ..errors import DiskFull, InputError, IntegrityError, UsageError
from ..files import read_document, write_json
from ..models.batching import Batch
from ..models.checkpoint import Checkpoint
from .cache_shards import TensorLayout, checksum_of, open_shard, record_batch, schema_of
from .objectives.base import Objective
from .teacher import teacher_inputs
from .training_data import TrainingData

if TYPE_CHECKING:
    from .module import Term

logger = logging.getLogger(__name__)

Views = Callable[[Batch], Mapping[str, torch.Tensor]]
"""A training batch -> named tensors [batch, ...], or [batch, sequence, ...] where they are per token."""
Progress = Callable[[int, int], None]

_SCHEMA = 1
_MANIFEST = "manifest.json"
_INNER = ("embeddings", "hidden", "query", "key", "value")
_BATCH_ROWS, _BATCH_TOKENS = 64, 4096
"""The largest batch that the teacher is asked for: a row of a large vocabulary's logits takes half a megabyte."""
_SHARD_BYTES, _SHARD_ROWS = 256 << 20, 4096


class CacheKey(BaseModel):
    """What cached outputs depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str
    """The teacher's hash."""
    data: str
    """Fingerprint of the tokenised examples."""
    max_length: int
    views: list[dict[str, Any]]
    """What is read of the teacher: features and, where an objective reduces what it reads, its settings."""

    @classmethod
    def of(cls, teacher: Checkpoint, data: TrainingData, terms: Sequence[Term]) -> CacheKey:
        """The key of what these terms read of the teacher; weights and what the student does are no part of it."""
        views = [_view_of(term.objective, term) for term in terms if term.objective.needs_teacher]
        unique = [view for i, view in enumerate(views) if view not in views[:i]]
        return cls(teacher=teacher.hash, data=data.fingerprint, max_length=data.max_length, views=unique)


def _view_of(objective: Objective, term: Term) -> dict[str, Any]:
    reads: dict[str, Any] = {"reads": sorted({pair.teacher for pair in term.pairs}) or ["output"]}
    if type(objective).teacher_view is Objective.teacher_view:
        return reads
    settings = objective.model_dump(mode="json", exclude={"weight"})
    return {**reads, "objective": objective.name, "settings": settings}


class Manifest(BaseModel):
    """`manifest.json` of a cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = _SCHEMA
    key: CacheKey
    rows: int
    shard_rows: int
    tensors: dict[str, TensorLayout]
    limbeck: str = __version__

    @property
    def shards(self) -> list[str]:
        """File names, in the order of the rows that they hold."""
        return [f"shard-{i:05d}.arrow" for i in range(-(-self.rows // self.shard_rows))]


def cached_teacher(
    folder: Path,
    key: CacheKey,
    views: Callable[[], Views],
    data: TrainingData,
    progress: Progress = lambda done, total: None,
) -> CachedTeacher:
    """The cache in `folder`, filled where it is not whole: what a killed process left is gone on with, and a second
    process waits for the first. The data shows its first epoch from here on, since what was computed from its examples
    is kept.

    Args:
        views: makes what computes the tensors; called only if something is to be computed.
        progress: examples computed and examples in all.

    Raises:
        InputError: `folder` holds the outputs of another teacher, for other data or of other layers, or no cache.
        UsageError: a tensor that grows with the square of the length (attention maps) is not kept.
        DiskFull: there is no room for the whole of it.
    """
    data.frozen = True
    order = np.argsort(data.lengths, kind="stable").astype(np.int32)
    manifest = _claimed(folder, key)
    if manifest is None or _missing(folder, manifest):
        with _alone(folder):
            manifest = _claimed(folder, key)  # by now another process may have filled it
            missing = None if manifest is None else _missing(folder, manifest)
            if manifest is None or missing:
                compute = views()
                if manifest is None:
                    manifest = _planned(key, compute, data)
                    write_json(folder / _MANIFEST, manifest.model_dump(mode="json"))
                _Filler(folder, manifest, compute, data, order).fill(missing or manifest.shards, progress)
    return CachedTeacher(folder, manifest, order)


def _claimed(folder: Path, key: CacheKey) -> Manifest | None:
    """The manifest of this key's cache, or `None` where there is none yet.

    Raises:
        InputError: see `cached_teacher`.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; a teacher's cache is a folder.")
    if not (folder / _MANIFEST).exists():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(f"{folder} holds something that is no teacher's cache.", "Name a new or empty folder.")
        return None
    manifest = read_document(folder / _MANIFEST, Manifest, _SCHEMA)
    other = _difference(manifest.key, key)
    if other:
        raise InputError(f"The cache in {folder} is {other}.", "Name another folder for this one, or delete that one.")
    return manifest


def _difference(found: CacheKey, wanted: CacheKey) -> str:
    if found.teacher != wanted.teacher:
        return f"another teacher's: its hash is {found.teacher[:12]}, this teacher's {wanted.teacher[:12]}"
    if found.max_length != wanted.max_length:
        return f"of texts cut at {found.max_length} tokens, and here they are cut at {wanted.max_length}"
    if found.data != wanted.data:
        return "of other training data (or of the same data tokenised otherwise)"
    if found.views != wanted.views:
        return f"of {_said(found)}, and these objectives read {_said(wanted)}"
    return ""


def _said(key: CacheKey) -> str:
    parts = []
    for view in key.views:
        settings = ", ".join(f"{name}: {value}" for name, value in view.get("settings", {}).items())
        parts.append(" + ".join(view["reads"]) + (f" ({view['objective']}: {settings})" if settings else ""))
    return "; ".join(parts)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process fills this folder inside the block; the system frees the lock of one that is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s is being filled by another process: waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _planned(key: CacheKey, compute: Views, data: TrainingData) -> Manifest:
    """Look at one example's tensors to see what is per token, and plan the shards."""
    tensors = _layouts(compute, data)
    size = _size(tensors, data.lengths)
    rows = min(_SHARD_ROWS, max(1, _SHARD_BYTES * len(data) // size))
    return Manifest(key=key, rows=len(data), shard_rows=rows, tensors=tensors)


def _size(tensors: Mapping[str, TensorLayout], lengths: np.ndarray) -> int:
    """Bytes of the tensors of examples of these lengths."""
    tokens = int(lengths.sum(dtype=np.int64))
    return sum(layout.bytes_of(len(lengths), tokens) for layout in tensors.values())


def _layouts(compute: Views, data: TrainingData) -> dict[str, TensorLayout]:
    """The longest example is computed whole and without its last token: what gets shorter is per token."""
    batch = _on_device(data.batch([int(np.argmax(data.lengths))]))
    if min(value.shape[-1] for value in batch.values() if value.ndim == 2) == 1:
        batch = {name: _longer(value) for name, value in batch.items()}
    shorter = {name: value[:, :-1] if value.ndim == 2 else value for name, value in batch.items()}
    whole, cut = dict(compute(batch)), dict(compute(shorter))
    layouts = {}
    for name, value in whole.items():
        changed = [axis for axis, size in enumerate(value.shape) if size != cut[name].shape[axis]]
        if changed not in ([], [1]):
            raise UsageError(
                f"{name} of the teacher grows with the square of a text's length: too much to keep on disk.",
                "Leave the cache out, or match attention-relations, which read queries, keys and values.",
            )
        kept_as: Literal["float16", "float32", "int32"] = "float32" if value.is_floating_point() else "int32"
        if kept_as == "float32" and name.partition(".")[0] in _INNER:
            kept_as = "float16"
        of_one = list(value.shape[1 + len(changed) :])
        layouts[name] = TensorLayout(per_token=changed == [1], shape=of_one, kept_as=kept_as)
    return layouts


def _longer(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values, values], dim=1) if values.ndim == 2 else values


def _on_device(batch: Batch) -> Batch:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: value.to(device) for name, value in batch.items()}


class _Filler:
    """Computes what is missing and writes it, shard by shard."""

    def __init__(self, folder: Path, manifest: Manifest, compute: Views, data: TrainingData, order: np.ndarray) -> None:
        self._folder, self._manifest, self._compute = folder, manifest, compute
        self._data, self._order = data, order

    def fill(self, missing: Sequence[str], progress: Progress) -> None:
        for left_over in self._folder.glob(".shard-*"):  # a killed process was writing these; no other writes now
            left_over.unlink()
        parts = [self._rows_of(name) for name in missing]
        self._check_room(np.concatenate(parts))
        done = len(self._order) - sum(len(part) for part in parts)
        progress(done, len(self._order))
        for name, part in zip(missing, parts, strict=True):
            staging = self._folder / f".{name}"
            with staging.open("wb") as file:
                with pa.ipc.new_file(file, schema_of(self._manifest.tensors)) as writer:
                    for rows in self._batches(part):
                        writer.write_batch(self._computed(rows))
                        done += len(rows)
                        progress(done, len(self._order))
                file.flush()
                os.fsync(file.fileno())
            os.replace(staging, self._folder / name)

    def _rows_of(self, name: str) -> np.ndarray:
        start = self._manifest.shards.index(name) * self._manifest.shard_rows
        return self._order[start : start + self._manifest.shard_rows]

    def _check_room(self, rows: np.ndarray) -> None:
        needed = _size(self._manifest.tensors, self._data.lengths[rows])
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise DiskFull(
                f"The teacher's outputs take {needed / 1e9:.1f} GB, and {self._folder} has {free / 1e9:.1f} GB free.",
                "Choose a folder on another disk, let logits-kl keep its top_k only, or leave the cache out.",
            )

    def _batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        start = 0
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and stop - start < _BATCH_ROWS and self._fits(rows[start : stop + 1]):
                stop += 1
            yield rows[start:stop]
            start = stop

    def _fits(self, rows: np.ndarray) -> bool:
        return len(rows) * int(self._data.lengths[rows[-1]]) <= _BATCH_TOKENS  # rows come in order of length

    def _computed(self, rows: np.ndarray) -> pa.RecordBatch:
        batch = self._data.batch(rows)
        tokens = teacher_inputs(batch)["attention_mask"].sum(dim=1).tolist()
        views = self._compute(_on_device(batch))
        return record_batch(rows, views, self._manifest.tensors, tokens)


def _missing(folder: Path, manifest: Manifest) -> list[str]:
    """The shards that are not there, or that are not whole files."""
    missing = []
    for i, name in enumerate(manifest.shards):
        rows = min(manifest.shard_rows, manifest.rows - i * manifest.shard_rows)
        try:
            if len(open_shard(folder / name, manifest.tensors).rows) == rows:
                continue
        except FileNotFoundError:
            missing.append(name)
            continue
        except (OSError, pa.ArrowInvalid, KeyError, ValueError):
            pass
        logger.warning("%s is damaged: it is computed again", folder / name)
        missing.append(name)
    return missing


class CachedTeacher:
    """The kept tensors by example, in place of the teacher."""

    def __init__(self, folder: Path, manifest: Manifest, order: np.ndarray) -> None:
        self._folder, self._manifest = folder, manifest
        self._shards = [open_shard(folder / name, manifest.tensors) for name in manifest.shards]
        self._position = np.empty(len(order), dtype=np.int32)
        self._position[order] = np.arange(len(order), dtype=np.int32)
        self._verified = np.zeros(len(order), dtype=bool)

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The tensors of the batch's `row`s: float32 and int64, on the batch's device, tensors per token padded with
        zeros to the batch's sequence.

        Raises:
            IntegrityError: the disk gives back other bytes than were written.
        """
        rows = batch["row"].cpu().numpy()
        mask = teacher_inputs(batch)["attention_mask"]
        places = [divmod(int(position), self._manifest.shard_rows) for position in self._position[rows]]
        for row, place in zip(rows, places, strict=True):
            if not self._verified[row]:
                self._verify(int(row), *place)
        tokens = mask.sum(dim=1).tolist()
        return {
            name: self._read(name, layout, places, tokens, mask.shape[1]).to(mask.device)
            for name, layout in self._manifest.tensors.items()
        }

    def _read(
        self, name: str, layout: TensorLayout, places: Sequence[tuple[int, int]], tokens: Sequence[int], sequence: int
    ) -> torch.Tensor:
        contents = [self._shards[shard].bytes_of(name, place) for shard, place in places]
        values = [
            content.view(layout.dtype_of(content, count)) for content, count in zip(contents, tokens, strict=True)
        ]
        shape = [len(places), *([sequence] if layout.per_token else []), *layout.shape]
        gathered = np.zeros(shape, dtype=np.result_type(*values))
        for i, value in enumerate(values):
            if layout.per_token:
                gathered[i, : tokens[i]] = value.reshape(tokens[i], *layout.shape)
            else:
                gathered[i] = value.reshape(layout.shape)
        return torch.from_numpy(gathered).to(torch.int64 if layout.kept_as == "int32" else torch.float32)

    def _verify(self, row: int, shard: int, place: int) -> None:
        """Each example once: after that its pages are most likely in memory."""
        found = self._shards[shard]
        checksum = checksum_of([found.bytes_of(name, place) for name in self._manifest.tensors])
        if found.rows[place] != row or found.checksums[place] != checksum:
            path = self._folder / self._manifest.shards[shard]
            raise IntegrityError(
                f"{path} does not hold what was written into it: example {row} has changed.",
                "Delete that file: it alone is computed again.",
            )
        self._verified[row] = True
