"""The whole plug-in surface of limbeck: what a backend is.

To add `--backend mine`, write one `Backend` subclass and name it in your package's entry points:

    [project.entry-points."limbeck.backends"]
    mine = "my_package.backend:MyBackend"

The entry may name an exporter of transformers (`HfExporter`) instead: `hf_exporter.py` makes a backend of it.

A backend says whether it can run here (`probe`), turns a checkpoint into files (`export`), and loads those files as a
`Runner`. A compiler that needs the target device also has `build`, which turns a kit (portable) into the built program.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import InputError, UsageError

if TYPE_CHECKING:  # `limbeck backends` probes without loading torch
    import numpy as np
    import torch

    from ..exporters.activation_ranges import ActivationRange
    from ..exporters.artifact import Manifest
    from ..exporters.layer_facts import ProgramFacts
    from ..exporters.options import BackendOptions
    from ..exporters.program import ExportedProgram, Floor, ProgramWeight
    from ..exporters.settings import ExportSettings, Precision
    from ..exporters.tokenizer_graph import TextTokens, Tokenize
    from ..models.checkpoint import Checkpoint
    from .decoder import Decoder

Progress = Callable[[str], None]
"""Told in a few words what is being done now."""
Advance = Callable[[int, int], None]
"""Told how many steps of how many are done, of what was said last."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used on this machine, and if not, why and what mends it."""

    can_export: bool
    can_run: bool
    reason: str = ""
    mend: str = ""
    """The command that mends it."""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportJob:
    """What an export starts from."""

    checkpoint: Checkpoint
    settings: ExportSettings
    calibration: Sequence[Mapping[str, torch.Tensor]] = ()
    """Batches of real inputs: int8 is calibrated on them, float16 ranges are checked on them."""
    floor: Floor | None = None
    """What a backend with accuracy control heeds while it quantises; every program is held to it afterwards."""
    progress: Progress = lambda _: None


@dataclass(frozen=True)
class BuildJob:
    """What a build starts from."""

    kit: Path
    """The kit's folder, its files verified."""
    manifest: Manifest
    timing_cache: Path | None = None
    """Where the compiler keeps the times of its kernels from one build to the next; read where there, written after."""
    progress: Progress = lambda _: None
    advance: Advance = lambda _, __: None


class Runner(ABC):
    """A loaded program."""

    properties: Mapping[str, str]
    """Compile properties as read back from the runtime, threads included."""

    @abstractmethod
    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Run one batch of int64 tensors [batch, sequence]; float32 outputs by name. Inputs that the program does not
        take are left out.

        Raises:
            InputError: a shape that the program does not take.
        """

    @abstractmethod
    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        """The runtime's own inference call with this batch bound: what is timed, nothing of ours inside."""

    def decoder(self) -> Decoder:
        """What writes text with this program; one at a time.

        Raises:
            UsageError: the program keeps no keys and values of what it has read.
        """
        raise UsageError(
            "The program keeps no keys and values of what it has read, so it writes no text.",
            "Export the model for text-generation, with --backend onnx, openvino or torch and without --no-kv-cache.",
        )

    def close(self) -> None:
        """Free the device; the runner is not called again. Nothing to do for most."""
        return


class Backend(ABC):
    """One way to compile and run a model."""

    name: str
    summary: str
    """One line for `limbeck backends`."""
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32",)
    default_precision: ClassVar[Precision] = "fp32"
    formats: tuple[str, ...] = ()
    """The artifact formats (`Manifest.format`) that this backend loads."""
    sparsities: ClassVar[tuple[str, ...]] = ()
    """Patterns of zeros that its compiler can use (`--sparsity`)."""
    built_format: ClassVar[str] = ""
    """The format that `build` makes of a kit, where there is a build."""
    tokenizer_package: ClassVar[str] = ""
    """The pip package that its graphs of tokenizers are made with (`--tokenizer-graph`); empty: it makes none."""
    writes_text: ClassVar[bool] = False
    """Whether it exports language models with their cache of keys and values, for a `Runner.decoder`."""
    properties: ClassVar[frozenset[str]] = frozenset()
    """Compile properties that a manifest may hand to the runtime. Artifacts come from anybody, and runtimes have
    properties that name files to read or folders to write."""

    reference_options: ClassVar[Mapping[str, Any]] = {}
    """Its options for the float32 graph that attribution and `bisect` refer to."""

    @classmethod
    def options(cls) -> type[BackendOptions]:
        """The options of its own (`--option NAME=VALUE`); none unless it says so."""
        from ..exporters.options import BackendOptions

        return BackendOptions

    @abstractmethod
    def probe(self) -> Availability:
        """Look at the machine without importing anything heavy."""

    def check_settings(self, settings: ExportSettings) -> None:
        """Refuse settings that do not go together, or not here, before a model is loaded or trained.

        Raises:
            UsageError: options, precision and sparsity that contradict each other.
            BackendUnavailable: a device or a package that they need is not here.
        """
        return

    def measures_ranges(self, settings: ExportSettings) -> bool:
        """Whether this export sets the ranges of activations by real inputs, and so is refused without."""
        from ..exporters.settings import CALIBRATED

        return settings.precision in CALIBRATED

    @abstractmethod
    def export(self, job: ExportJob, folder: Path) -> ExportedProgram:
        """Write the program's files into an empty folder and say what they are.

        Raises:
            UsageError: a precision or sparsity that this backend does not have.
            BackendUnavailable: a package that the export needs is missing.
        """

    def export_tokenizer(self, tokens: TextTokens, folder: Path) -> Tokenize:
        """Write what `tokens` does with a text as a graph of its own into the folder; returns what runs the written
        graph. Where there is a `tokenizer_package`.

        Raises:
            InputError: a tokenizer that cannot be made a graph of.
        """
        raise UsageError(f"The backend {self.name} makes no graphs of tokenizers.")

    @abstractmethod
    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        """Open a verified artifact.

        Raises:
            BackendUnavailable: the runtime or the device is not here.
        """

    def runs_machine_code(self, manifest: Manifest) -> bool:
        """Whether loading an artifact of this manifest runs code that it brings. Such an artifact is loaded only where
        it was made, or where the user trusts it by its id (`trust.py`)."""
        return False

    def build(self, job: BuildJob, folder: Path) -> dict[str, Any]:
        """Turn a kit into the built program's files in an empty folder, on the device it will run on; returns evidence
        for the manifest (what the compiler chose and said).

        Raises:
            BackendUnavailable: this backend needs no build, or the device or compiler is not here.
        """
        raise UsageError(f"An artifact of {self.name} needs no build: it runs as it was exported.")

    def built_shapes(self, folder: Path) -> list[tuple[int, int]]:
        """Batch and sequence at which a freshly built program is compared with the graph of its kit; where there is a
        build."""
        return []

    def weights(self, folder: Path, manifest: Manifest, module: torch.nn.Module) -> Iterator[ProgramWeight] | None:
        """The parameters of the module that the program was made from, as its written files hold them, brought back to
        real numbers: for the weight audit. `None`: they cannot be read back, and the manifest says that they were not
        compared."""
        return None

    def intermediates(self, folder: Path, manifest: Manifest, modules: Sequence[str]) -> Runner | None:
        """A runner of the same program that also gives what these modules of the traced model hand on, each under the
        module's qualified name; modules that it does not show are left out. For `limbeck bisect`, on a verified
        artifact. `None`: this backend's programs do not show their inside.

        Raises:
            BackendUnavailable: the runtime or the device is not here.
        """
        return None

    def activation_ranges(self, folder: Path, manifest: Manifest) -> Iterator[ActivationRange] | None:
        """What the inputs of its quantised products are cut to; `None`: a backend without a calibrated precision, or
        one that cannot read them back."""
        return None

    def program_facts(self, folder: Path, manifest: Manifest, batch: int, sequence: int) -> ProgramFacts | None:
        """What the files of a verified artifact tell of its layers, and the FLOPs of a call on [batch, sequence]
        tokens; `None`: it is not known, as for a backend that does not define this.

        Raises:
            BackendUnavailable: a package that reads the files is missing.
            InputError: files that do not parse.
        """
        return None

    def compile_properties(self, manifest: Manifest) -> dict[str, str]:
        """What the manifest asks of the runtime.

        Raises:
            InputError: a property that is not one of `properties`.
        """
        for name in manifest.compile_properties:
            if name not in self.properties:
                known = ", ".join(sorted(self.properties)) or "none"
                raise InputError(
                    f"The manifest sets the compile property {name!r}, which {self.name} does not take from an "
                    f"artifact; it takes {known}.",
                    "Export it again; do not run it.",
                )
        return dict(manifest.compile_properties)
