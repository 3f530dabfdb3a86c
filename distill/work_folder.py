"""The folder in which a training keeps what it would need to go on after being killed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import read_json, write_json
from .launch import is_main, main_first

_KEY_FILE = "training.json"


@contextmanager
def work_folder(wanted: Path | None, key: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for one training: `wanted`, which outlives an interruption and goes when training has ended well, or a
    temporary one.

    Args:
        key: what identifies the training; a folder of another one is not gone on with.

    Raises:
        UsageError: `wanted` holds something else.
    """
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="limbeck-") as folder:
            yield Path(folder)
        return
    with main_first():
        _claim(wanted, json.loads(json.dumps(key)))  # as it will be read back
    try:
        yield wanted
    except BaseException:
        if is_main() and newest_checkpoint(wanted) is None:  # nothing that could be gone on with
            shutil.rmtree(wanted)
        raise
    if is_main():
        shutil.rmtree(wanted)


def _claim(folder: Path, key: dict[str, Any]) -> None:
    path = folder / _KEY_FILE
    if path.exists():
        found = read_json(path)
        other = [name for name in key if found.get(name) != key[name]]
        if other:
            raise UsageError(
                f"{folder} holds the unfinished training of another run: its {' and '.join(other)} "
                f"{'is' if len(other) == 1 else 'are'} not the same.",
                "Delete the folder to start anew, or repeat that run to finish it.",
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds something that is not a training.", "Name a new or empty folder.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, key)


def newest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of the trainer; its state file is written last."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
