"""Machine code out of artifacts runs only where it was made, or where the user says so.

Artifacts come from anybody, and whoever opens compiled code runs it. So the hash of such an artifact is noted in the
user's cache folder when it is sealed here; one that came from elsewhere is opened if its id stands in `LIMBECK_TRUST`.
The id is made of the hashes of its files, which are verified before anything is opened: another file is another id.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..environment import cache_folder
from ..errors import InputError
from .base import Backend

if TYPE_CHECKING:
    from ..exporters.artifact import Manifest

TRUST_VARIABLE = "LIMBECK_TRUST"
"""Artifact ids, with commas between them."""


def seal_here(manifest: Manifest, folder: Path, backend: Backend) -> Manifest:
    """Seal an artifact (see `exporters.artifact.seal`), and note that it was made here if it holds machine code. Where
    the cache folder cannot be written nothing is noted, and the user is asked when it is opened."""
    from ..exporters.artifact import payload_hash, seal

    sealed = seal(manifest, folder)
    if backend.runs_machine_code(sealed):
        with suppress(OSError):
            _shelf().mkdir(parents=True, exist_ok=True, mode=0o700)
            (_shelf() / payload_hash(sealed.files)).touch()
    return sealed


def require_trusted(folder: Path, manifest: Manifest, backend: Backend) -> None:
    """Refuse machine code of others, before any of it runs.

    Args:
        manifest: verified (`open_artifact`), so that the id is the files'.

    Raises:
        InputError: the artifact holds machine code, was not made here, and is not trusted by the user either.
    """
    if not backend.runs_machine_code(manifest) or _is_known(manifest):
        return
    known = manifest.artifact_id
    raise InputError(
        f"The artifact {known} in {folder} is machine code ({manifest.format}), which runs when it is opened, and it "
        "was not made on this machine.",
        f"If you trust who made it, set {TRUST_VARIABLE}={known}; or make it here from its checkpoint: limbeck export "
        f"CHECKPOINT --backend {manifest.settings.backend}.",
    )


def _is_known(manifest: Manifest) -> bool:
    from ..exporters.artifact import payload_hash

    trusted = {name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",")} - {""}
    return manifest.artifact_id in trusted or (_shelf() / payload_hash(manifest.files)).is_file()


def _shelf() -> Path:
    return cache_folder() / "made-here"
