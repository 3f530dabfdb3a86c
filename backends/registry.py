"""Backends by name: ours from a table, others from the entry-point group `limbeck.backends`."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..environment import is_importable
from ..errors import BackendUnavailable, InputError, UsageError, did_you_mean
from .base import Availability, Backend, Runner
from .fitted import FittedRunner
from .trust import require_trusted

if TYPE_CHECKING:
    from ..exporters.artifact import Manifest
    from ..exporters.settings import ExportSettings

ENTRY_POINT_GROUP = "limbeck.backends"

# Entry points need an installed package; ours work from a checkout too.
_BUILT_IN = {
    "onnx": ".onnx:OnnxBackend",
    "openvino": ".openvino:OpenVINOBackend",
    "tensorrt": ".tensorrt:TensorRTBackend",
    "torch": ".torch:TorchBackend",
    "executorch": ".executorch:ExecuTorchBackend",
}


@dataclass(frozen=True)
class Listing:
    """One line of `limbeck backends`."""

    name: str
    summary: str
    source: str
    availability: Availability


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def backend_names() -> list[str]:
    """Every name that `--backend` takes, ours first."""
    return [*_BUILT_IN, *(name for name in sorted(_entry_points()) if name not in _BUILT_IN)]


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UsageError: there is none; the message lists the known and suggests the near.
        BackendUnavailable: a plug-in that does not import, or is no `Backend`.
    """
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        backend: type[Backend] = getattr(importlib.import_module(module, __package__), attribute)
        return backend()
    point = _entry_points().get(name)
    if point is None:
        known = backend_names()
        raise UsageError(
            f"There is no backend {name!r}; the backends are {', '.join(known)}.{did_you_mean(name, known)}"
        )
    try:
        loaded = point.load()
    except (Exception, SystemExit) as error:  # another package's code may raise anything when it is imported
        raise BackendUnavailable(f"The plug-in backend {name!r} ({point.value}) does not import: {error}.") from error
    if _is_exporter(loaded):
        from .hf_exporter import HfExporterBackend

        return HfExporterBackend(name, loaded)
    if not (isinstance(loaded, type) and issubclass(loaded, Backend)):
        raise BackendUnavailable(
            f"The plug-in backend {name!r} ({point.value}) is neither a limbeck Backend nor an HfExporter "
            "of transformers."
        )
    try:
        return loaded()
    except Exception as error:  # such as an abstract method that it does not define
        raise BackendUnavailable(f"The plug-in backend {name!r} ({point.value}) cannot be made: {error}.") from error


def _is_exporter(loaded: object) -> bool:
    """Whether an entry point names an exporter of transformers, which whoever defines one has imported."""
    exporters = sys.modules.get("transformers.exporters.base")
    return exporters is not None and isinstance(loaded, type) and issubclass(loaded, exporters.HfExporter)


def backend_for(settings: ExportSettings) -> Backend:
    """The backend that can do this export, here; asked before a model is loaded or trained.

    Raises:
        UsageError: there is no such backend, or it lacks the precision or sparsity, or has no graphs of tokenizers.
        BackendUnavailable: a package that the export needs is missing.
    """
    from ..exporters.options import checked_options

    backend = get_backend(settings.backend)
    if settings.precision not in backend.precisions:
        valid = ", ".join(backend.precisions)
        raise UsageError(f"The backend {backend.name} has no precision {settings.precision}; it has {valid}.")
    if settings.sparsity is not None and settings.sparsity not in backend.sparsities:
        able = [name for name in _BUILT_IN if settings.sparsity in get_backend(name).sparsities]
        raise UsageError(
            f"The backend {backend.name} makes no use of {settings.sparsity} sparsity; {' and '.join(able)} do.",
            "Leave --sparsity out: the zeros stay in the weights all the same.",
        )
    checked_options(backend.options(), settings.options, backend.name)
    backend.check_settings(settings)
    if settings.tokenizer_graph:
        _require_tokenizer_graphs(backend)
    available = backend.probe()
    if not available.can_export:
        raise BackendUnavailable(f"The backend {backend.name} cannot export here: {available.reason}.", available.mend)
    return backend


def _require_tokenizer_graphs(backend: Backend) -> None:
    package = backend.tokenizer_package
    if not package:
        able = [name for name in _BUILT_IN if get_backend(name).tokenizer_package]
        raise UsageError(
            f"The backend {backend.name} makes no graphs of tokenizers; {' and '.join(able)} do.",
            "Leave --tokenizer-graph out: the artifact carries the tokenizer all the same.",
        )
    if not is_importable(package.replace("-", "_")):
        raise BackendUnavailable(
            f"--tokenizer-graph needs {package}, which is not installed.", f"pip install {package}"
        )


def list_backends() -> list[Listing]:
    """All backends with what they can do here; one that is broken is listed as such and harms no other."""
    return [listing_of(name) for name in backend_names()]


def listing_of(name: str) -> Listing:
    """What one of `backend_names` can do here.

    Raises:
        UsageError: there is no such backend.
    """
    source = "built in" if name in _BUILT_IN or name not in _entry_points() else _entry_points()[name].value
    try:
        backend = get_backend(name)
        available = backend.probe()
        if not isinstance(available, Availability):
            raise TypeError(f"its probe gives a {type(available).__name__}, not an Availability")
        return Listing(name, str(backend.summary), source, available)
    except BackendUnavailable as error:
        return Listing(name, "", source, Availability(False, False, error.message))
    except Exception as error:
        if source == "built in":
            raise  # a defect of ours, to be seen as one
        reason = f"{type(error).__name__} when probed: {error}"
        return Listing(name, "", source, Availability(False, False, reason))


def backend_of_format(artifact_format: str) -> Backend:
    """The backend that loads artifacts of this format.

    Raises:
        InputError: no backend here does.
    """
    for name in backend_names():
        try:
            backend = get_backend(name)
        except BackendUnavailable:
            continue  # a broken plug-in must not stand in the way of the others
        if artifact_format in backend.formats:
            return backend
    raise InputError(
        f"No backend here opens artifacts of the format {artifact_format!r}; there are {', '.join(backend_names())}.",
        "Install the plug-in that wrote it.",
    )


def backend_to_run(folder: Path, manifest: Manifest) -> Backend:
    """The backend that loads a verified artifact: whoever is to run what lies on a disk gets its backend here, and
    not from `backend_of_format`, which serves those that only read.

    Raises:
        InputError: no backend here opens the format, or the artifact is machine code that nobody vouches for.
    """
    backend = backend_of_format(manifest.format)
    require_trusted(folder, manifest, backend)
    return backend


def load_runner(path: Path, threads: int | None = None) -> tuple[Runner, Manifest]:
    """Verify an artifact and load it on its backend's runtime, for batches of any size.

    Raises:
        IntegrityError: a file is not the one that was exported.
        InputError: machine code that was made elsewhere (see `trust.py`).
        BackendUnavailable: its runtime or device is not here.
    """
    from ..exporters.artifact import open_artifact

    manifest = open_artifact(path)
    runner = backend_to_run(path, manifest).load(path, manifest, threads)
    return FittedRunner(runner, manifest.settings.shapes), manifest
