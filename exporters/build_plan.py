"""The build plan of a TensorRT kit: everything that the builder is told, in one readable file (`build.json`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..environment import versions
from ..files import read_document, write_json
from .options import TensorRTOptions
from .settings import ExportSettings, Precision, ShapeRange

PLAN_FILE = "build.json"
PLAN_SCHEMA = 2
WRITTEN_FOR = "11.4"
"""The TensorRT whose Python API the builder was written against; `tests/backends` holds it to NVIDIA's bindings."""
_RECORDED = ("limbeck", "torch", "transformers", "onnx")
_MEBIBYTE = 2**20

Flag = Literal["SPARSE_WEIGHTS", "TF32"]
Hardware = Literal["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"]
_HARDWARE: dict[str, Hardware] = {
    "none": "NONE",
    "ampere-plus": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}


class Profile(BaseModel):
    """Shapes of one input: what the engine must take, and what its kernels are chosen for (`opt`)."""

    model_config = ConfigDict(extra="forbid")

    min: list[int]
    opt: list[int]
    max: list[int]


class BuildPlan(BaseModel):
    """What turns the kit's graph into an engine. Precision is not among the flags: the graph is strongly typed."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = PLAN_SCHEMA
    graph: Literal["model.onnx"] = "model.onnx"
    precision: Precision
    profiles: list[dict[str, Profile]] = Field(min_length=1)
    """By input name; an engine has kernels of its own for each."""
    flags: list[Flag] = Field(default_factory=list)
    """Members of `tensorrt.BuilderFlag`. SPARSE_WEIGHTS allows sparse kernels; the faster of sparse and dense wins."""
    builder_optimization_level: int = Field(3, ge=0, le=5)
    """3 is TensorRT's default; 5 searches longest."""
    workspace_bytes: int | None = Field(None, ge=1)
    """Scratch memory that kernels may use; `None`: all of the GPU's."""
    version_compatible: bool = False
    """Whether newer TensorRT versions can run the engine."""
    hardware_compatibility: Hardware = "NONE"
    """Other GPU models that can run the engine, a member of `tensorrt.HardwareCompatibilityLevel`."""
    cuda_graphs: bool = False
    """Whether the runner captures a CUDA graph a shape and replays it."""
    opset: int
    tensorrt: str = WRITTEN_FOR
    versions: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(cls, settings: ExportSettings, options: TensorRTOptions, inputs: list[str], opset: int) -> BuildPlan:
        """The plan for these settings, whose shapes are within what the model has positions for.

        Raises:
            UsageError: a profile that reaches outside the shapes.
        """
        return cls(
            precision=settings.precision,
            profiles=[dict.fromkeys(inputs, _profile(shapes)) for shapes in profile_shapes(settings.shapes, options)],
            flags=_flags(settings),
            builder_optimization_level=options.optimization_level,
            workspace_bytes=options.workspace_mb * _MEBIBYTE if options.workspace_mb is not None else None,
            version_compatible=options.version_compatible,
            hardware_compatibility=_HARDWARE[options.hardware_compatibility],
            cuda_graphs=options.cuda_graphs,
            opset=opset,
            versions={name: version for name, version in versions().items() if name in _RECORDED},
        )

    def save(self, folder: Path) -> None:
        """Write `build.json` into the kit."""
        write_json(folder / PLAN_FILE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> BuildPlan:
        """The plan of a kit.

        Raises:
            InputError: missing, malformed, or of a newer schema.
        """
        return read_document(folder / PLAN_FILE, cls, PLAN_SCHEMA)


def profile_shapes(shapes: ShapeRange, options: TensorRTOptions) -> list[ShapeRange]:
    """The ranges that the engine gets kernels for: the options' own, or the one range of all shapes.

    Raises:
        UsageError: a range that reaches outside the shapes.
    """
    return [profile.inside(shapes) for profile in options.profiles] or [shapes]


def _flags(settings: ExportSettings) -> list[Flag]:
    flags: list[Flag] = []
    if settings.sparsity is not None:
        flags.append("SPARSE_WEIGHTS")
    if settings.precision == "tf32":
        flags.append("TF32")
    return flags


def _profile(shapes: ShapeRange) -> Profile:
    return Profile(
        min=[shapes.min_batch, shapes.min_sequence],
        opt=[shapes.opt_batch, shapes.opt_sequence],
        max=[shapes.max_batch, shapes.max_sequence],
    )
