"""Files that are whole or absent: staging beside the target, moving into place, hashing, and paths that stay inside."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .errors import DiskFull, InputError, LimbeckError, UsageError

Document = TypeVar("Document", bound=BaseModel)

_STAGING = ".staging-"
_REPLACED = ".replaced-"
LARGEST_DOCUMENT = 64 << 20
"""Bytes of a JSON or YAML document that are read at most: manifests and recipes come from anybody."""
_NO_ROOM = 1 << 20  # bytes: less than this is a full disk to whatever failed to write there


def _siblings(target: Path, kind: str) -> list[Path]:
    parent = target.parent
    return sorted(parent.glob(f".{glob.escape(target.name)}{kind}*")) if parent.is_dir() else []


def mend_half_done_swap(target: Path) -> None:
    """Finish what a killed process left beside `target`: bring back the replaced folder if the new one never came,
    and drop stale staging folders."""
    for replaced in _siblings(target, _REPLACED):
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(target)
    _sweep_stale_staging(target)


def _sweep_stale_staging(target: Path) -> None:
    """Drop what killed processes were writing beside `target`, a folder or a file."""
    for staging in _siblings(target, _STAGING):
        owner = staging.name.rsplit("-", 2)[-2]
        if owner.isdigit() and _is_running(int(owner)):
            continue
        if staging.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
        else:
            staging.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_output_folder(target: Path, overwrite: bool = False) -> None:
    """Refuse an output folder that holds something, before any work is done.

    Raises:
        UsageError: `target` is a file, or a folder with something in it and `overwrite` is false.
    """
    mend_half_done_swap(target)
    if target.is_dir():
        if any(target.iterdir()) and not overwrite:
            raise UsageError(f"The output folder {target} is not empty.", "Choose another --out, or add --overwrite.")
    elif target.exists():
        raise UsageError(f"{target} is a file; --out takes a folder.", "Choose another --out.")


@contextmanager
def staged_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new empty folder beside `target` that takes its place when the block ends well, and is removed when it does
    not. With `overwrite` the old folder is renamed aside first, so a killed process leaves the old or the new.

    Raises:
        UsageError: `target` holds something and `overwrite` is false.
        DiskFull: the disk filled up inside the block.
    """
    target = target.resolve()  # `.` has no name to stage beside, and a link is not to be replaced by a folder
    check_output_folder(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}{_STAGING}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        with _disk_full_named(target):
            yield staging
        _swap(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, target: Path) -> None:
    replaced = None
    if target.exists():
        replaced = target.parent / f".{target.name}{_REPLACED}{uuid.uuid4().hex[:8]}"
        target.rename(replaced)
    staging.rename(target)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _disk_full_named(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, LimbeckError) and not isinstance(error, DiskFull):  # a file of a folder: the folder counts
            raise
        if (
            not isinstance(error, DiskFull)
            and not _says_disk_full(error)
            and shutil.disk_usage(target.parent).free > _NO_ROOM
        ):
            raise
        raise DiskFull(
            f"The disk is full: {target} could not be written, and nothing of it was left behind.",
            "Free some space, or choose an --out on another disk.",
        ) from error


def _says_disk_full(error: Exception) -> bool:
    """Only Python's own writers say it with an error number; others say it in words, or (numpy) not at all."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: beside the target first, then moved over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_stale_staging(path)
    staging = path.parent / f".{path.name}{_STAGING}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        with _disk_full_named(path):
            staging.write_text(text, encoding="utf-8")
            os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _text_of(path: Path, largest: int) -> str:
    """The text of a UTF-8 file, refused before it is read where it is larger; a device that says it is empty and is
    not, when it is.

    Raises:
        InputError: larger than `largest` bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        content = file.read(largest + 1) if size <= largest else b""
    if size > largest or len(content) > largest:
        told = f"{size:,} bytes" if size > largest else "endless"
        raise InputError(f"{path} is too large to be what it should be: {told}, and at most {largest:,} are read.")
    return content.decode("utf-8")


def read_json(path: Path, largest: int = LARGEST_DOCUMENT) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing, larger than `largest` bytes, or is not JSON.
    """
    try:
        return json.loads(_text_of(path, largest))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error


def read_document(path: Path, model: type[Document], newest: int) -> Document:
    """Read a JSON document of ours, which says its `schema_version`.

    Raises:
        InputError: missing, malformed, or of a schema newer than `newest`.
    """
    value = read_json(path)
    version = value.get("schema_version", 0) if isinstance(value, dict) else 0
    if isinstance(version, int) and version > newest:
        raise InputError(f"{path} has schema version {version}; this limbeck reads up to {newest}.", "Upgrade limbeck.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its whole"
        raise InputError(f"{path} is not a valid {model.__name__.lower()}: {where}: {first['msg']}.") from error


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        what: what the file is meant to be, for the error message ("recipe").

    Raises:
        InputError: missing, too large, not YAML, or not a mapping.
    """
    import yaml

    try:
        value: Any = yaml.safe_load(_text_of(path, LARGEST_DOCUMENT))
    except FileNotFoundError as error:
        raise InputError(f"The {what} {path} does not exist.") from error
    except (yaml.YAMLError, ValueError, RecursionError, IsADirectoryError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a {what}: it holds no mapping.")
    return value


def sha256_of_file(path: Path) -> str:
    """The file's SHA-256, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """The SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file below `folder`, as paths relative to it, sorted."""
    yield from sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def path_inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused when it would leave the folder (absolute, `..`, or a link that points outside).

    Raises:
        InputError: the path leaves `folder`.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{name!r} points outside {folder}.", "Do not use this folder: it may have been tampered with."
        )
    return path


def total_size(paths: Iterable[Path]) -> int:
    """The size of the files together, in bytes."""
    return sum(path.stat().st_size for path in paths)
