"""The reference graph: an artifact's student exported once more in float32, which tells what exporting did from what
compiling did. It is kept from run to run, for a trace takes longer than all that is asked of it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ... import __version__
from ...backends.base import Backend, ExportJob
from ...backends.registry import get_backend
from ...environment import cache_folder, versions
from ...errors import BackendUnavailable, InputError, IntegrityError
from ...exporters.artifact import MANIFEST_FILE, Manifest, open_artifact, seal
from ...exporters.settings import ExportSettings
from ...files import files_below, sha256_of_json, staged_folder, total_size
from ...models.checkpoint import Checkpoint

_KEPT = 4
_KEPT_BYTES = 8 << 30
"""The last few are kept, and of large models fewer."""


@dataclass(frozen=True)
class Reference:
    """A written reference graph: an artifact folder without a tokenizer."""

    folder: Path
    manifest: Manifest
    backend: Backend


@contextmanager
def reference_graph(
    student: Checkpoint, artifact: Manifest, say: Callable[[str], None] = lambda _: None
) -> Iterator[Reference]:
    """The student's graph in float32, made by the artifact's own backend for the artifact's shapes: out of the cache
    where it is there and unchanged, else exported. Nobody removes it while the block runs.

    Raises:
        BackendUnavailable: the backend, or what it exports with, is not here, or it has no float32.
        InputError: an operator that the backend's compiler does not have.
        DiskFull: no room was left.
    """
    backend = get_backend(artifact.settings.backend)
    if "fp32" not in backend.precisions:
        raise BackendUnavailable(f"the backend {backend.name} has no float32 to refer to")
    available = backend.probe()
    if not available.can_export:
        raise BackendUnavailable(f"the backend {backend.name} cannot export here: {available.reason}", available.mend)
    shapes = artifact.settings.shapes.within(student.max_length)
    options = dict(backend.reference_options)
    settings = ExportSettings(backend=backend.name, precision="fp32", shapes=shapes, kv_cache=False, options=options)
    shelf = cache_folder() / "reference-graphs"
    folder = shelf / _key(student, settings)
    shelf.mkdir(parents=True, exist_ok=True)
    with _lock_of(folder) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, and finds it made
        manifest = _kept(folder)
        if manifest is None:
            say("exporting the reference graph")
            manifest = _export(backend, student, settings, folder)
        os.utime(folder)
        fcntl.flock(lock, fcntl.LOCK_SH)
        _purge(shelf, folder)
        yield Reference(folder, manifest, backend)


def _key(student: Checkpoint, settings: ExportSettings) -> str:
    """What the graph depends on: the weights, how their outputs are pooled, the shapes, and all that traces."""
    pooling = [student.pooling.mode, student.pooling.normalize]
    made_of = [student.hash, student.task.name, pooling, settings.model_dump(mode="json"), __version__, versions()]
    return sha256_of_json(made_of)[:32]


@contextmanager
def _lock_of(folder: Path) -> Iterator[IO[str]]:
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        yield lock


def _kept(folder: Path) -> Manifest | None:
    """The manifest of a graph that lies there as it was written."""
    if not (folder / MANIFEST_FILE).is_file():
        return None
    try:
        return open_artifact(folder)
    except (IntegrityError, InputError):
        return None  # a disk's fault, or somebody else's file: it is made again


def _export(backend: Backend, student: Checkpoint, settings: ExportSettings, folder: Path) -> Manifest:
    with staged_folder(folder, overwrite=True) as staging:
        program = backend.export(ExportJob(student, settings), staging)
        student.model.config.save_pretrained(staging)
        return seal(program.manifest(student, settings), staging)


def _purge(shelf: Path, used: Path) -> None:
    """Drop the graphs that were used longest ago, but for those that somebody uses now."""
    kept, size = 0, 0
    folders = [path for path in shelf.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for folder in sorted(folders, key=_last_used, reverse=True):
        kept, size = kept + 1, size + total_size(folder / path for path in files_below(folder))
        if folder == used or (kept <= _KEPT and size <= _KEPT_BYTES):
            continue
        with _lock_of(folder) as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another process has just dropped it
        return 0.0
