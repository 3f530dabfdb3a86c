"""The artifact folder: a compiled program with its tokenizer and a manifest that hashes every file."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .. import __version__
from ..environment import cpu_facts, gpu_facts, versions
from ..errors import InputError, IntegrityError
from ..files import files_below, path_inside, read_document, sha256_of_file, sha256_of_json, total_size, write_json
from ..models.lineage import Lineage
from ..models.terms import CARD_FILE
from .settings import ExportSettings

MANIFEST_FILE = "manifest.json"
MANIFEST_SCHEMA = 1
_ID_DIGITS = 16


class CacheFacts(BaseModel):
    """The keys and values that a program keeps of what it has read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: str
    """What they are stored in, as its runtime names it."""
    values_per_token: int
    """Numbers that are kept of each token of each text, all layers together."""


class TensorSpec(BaseModel):
    """One input or output of the program; `None` in a shape is an axis that varies."""

    model_config = ConfigDict(extra="forbid")

    name: str
    dtype: str
    shape: list[int | None]


class SparseLayer(BaseModel):
    """What the compiler will see of one layer's weight."""

    model_config = ConfigDict(extra="forbid")

    layer: str
    shape: list[int]
    """[reduction, output] sizes."""
    eligible: bool
    pattern: bool
    """Two of every four weights along the reduction axis are zero."""
    zeros: float
    """Share of weights that are zero."""
    reason: str = ""
    """Why a layer is not eligible, or where the pattern breaks."""


class CheckRecord(BaseModel):
    """A check that the artifact has passed when it was made."""

    model_config = ConfigDict(extra="forbid")

    name: str
    passed: bool
    detail: str
    rows: list[dict[str, str | float | int | bool]] = Field(default_factory=list)


class Manifest(BaseModel):
    """Everything known of an artifact. The artifact id depends on its payload alone: no times, no device."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = MANIFEST_SCHEMA
    artifact_id: str = ""
    format: str
    """Which backend opens it: `onnx`, `openvino`, `tensorrt` (a kit), `tensorrt-engine`, or a plug-in's."""
    task: str
    settings: ExportSettings
    files: dict[str, str] = Field(default_factory=dict)
    """Path inside the artifact to SHA-256."""
    program_files: list[str] = Field(default_factory=list)
    """Those that the backend wrote; the others (tokenizer and the like) are the same whatever the backend."""
    parent_hash: str
    parent: str
    """Where the checkpoint lay when it was exported; its hash is what counts."""
    parameters: int
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    max_length: int
    compile_properties: dict[str, str] = Field(default_factory=dict)
    """What the runtime must be given so that the program is what its precision says."""
    cache: CacheFacts | None = None
    """What a program that writes text keeps of what it has read; `None`: it keeps nothing, and writes none."""
    sparse_layers: list[SparseLayer] = Field(default_factory=list)
    checks: list[CheckRecord] = Field(default_factory=list)
    evidence: dict[str, Any] = Field(default_factory=dict)
    """What a backend's exporter or builder found out (range analysis, build log, ...)."""
    unverified: str | None = None
    """What has not been seen to run, in one sentence."""
    caveats: list[str] = Field(default_factory=list)
    """What speaks against the artifact although it passed, such as an int8 that is slower than float32."""
    lineage: Lineage
    stand_in: str | None = None
    """What runs in the program's place where it was made, for checks of accuracy; such a program is not timed."""
    is_kit: bool = False
    """Still to be built on the device it is for."""
    biases_corrected: bool = False
    """Quantising changed vectors (biases, norms) on purpose, so they are not the checkpoint's."""
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    limbeck: str = __version__
    versions: dict[str, str] = Field(default_factory=versions)
    cpu: dict[str, Any] = Field(default_factory=cpu_facts)
    gpus: list[dict[str, str]] = Field(default_factory=gpu_facts)


def seal(manifest: Manifest, folder: Path) -> Manifest:
    """Hash every file of the folder into the manifest and write it; the last thing that happens to an artifact."""
    names = [path.as_posix() for path in files_below(folder) if path.as_posix() != MANIFEST_FILE]
    hashes = {name: sha256_of_file(folder / name) for name in names}
    sealed = manifest.model_copy(update={"files": hashes, "artifact_id": payload_hash(hashes)[:_ID_DIGITS]})
    write_json(folder / MANIFEST_FILE, sealed.model_dump(mode="json"))
    return sealed


def payload_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256, 64 hex digits, of all files' (`Manifest.files`); the artifact id is its beginning. The card is left
    out, as the manifest is, which it restates: it has figures that were measured here."""
    return sha256_of_json({name: value for name, value in hashes.items() if name != CARD_FILE})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact folder, its files not yet verified.

    Raises:
        InputError: not an artifact, a malformed manifest, or one of a newer schema.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist." if not folder.exists() else f"{folder} is not a folder.")
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise InputError(f"{folder} is not a limbeck artifact: it has no {MANIFEST_FILE}.", "Make one: limbeck export.")
    return read_document(path, Manifest, MANIFEST_SCHEMA)


def open_artifact(folder: Path) -> Manifest:
    """The manifest, after every file has been found to be the one it lists.

    Raises:
        IntegrityError: a file is missing, changed or added since the manifest was written.
        InputError: see `read_manifest`.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = path_inside(folder, name)
        if not path.is_file():
            raise IntegrityError(f"{folder} lacks {name}, which its manifest lists.", "Export or copy it again.")
        if sha256_of_file(path) != expected:
            raise IntegrityError(
                f"{folder / name} is not the file that was exported: its SHA-256 differs from the manifest's.",
                "Export or copy it again; do not deploy it.",
            )
    if manifest.artifact_id != payload_hash(manifest.files)[:_ID_DIGITS]:
        raise IntegrityError(
            f"{folder / MANIFEST_FILE} lists other files than its artifact id {manifest.artifact_id!r} stands for.",
            "Export or copy it again; do not deploy it.",
        )
    extra = {path.as_posix() for path in files_below(folder)} - {*manifest.files, MANIFEST_FILE}
    if extra:
        raise IntegrityError(
            f"{folder} holds {sorted(extra)[0]}, which its manifest does not list.", "Remove it, or export again."
        )
    return manifest


def artifact_size(folder: Path) -> int:
    """Bytes of the artifact on disk."""
    return total_size(folder / path for path in files_below(folder))
