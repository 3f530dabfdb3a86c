"""The build plan of a TensorRT kit: everything that the builder is told, in one readable file (`build.json`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..environment import versions
from ..files import read_document, write_json
from .settings import ExportSettings, Precision, ShapeRange

PLAN_FILE = "build.json"
PLAN_SCHEMA = 1
WRITTEN_FOR = "11.4"
"""The TensorRT whose Python API the builder was written against; `tests/backends` holds it to NVIDIA's bindings."""
_RECORDED = ("limbeck", "torch", "transformers", "onnx")


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
    graph: str = "model.onnx"
    precision: Precision
    profiles: dict[str, Profile]
    """By input name."""
    flags: list[Literal["SPARSE_WEIGHTS", "TF32"]] = Field(default_factory=list)
    """Members of `tensorrt.BuilderFlag`. SPARSE_WEIGHTS allows sparse kernels; the faster of sparse and dense wins."""
    builder_optimization_level: int = Field(3, ge=0, le=5)
    """3 is TensorRT's default; 5 searches longest."""
    workspace_bytes: int | None = Field(None, ge=1)
    """Scratch memory that kernels may use; `None`: all of the GPU's."""
    version_compatible: bool = False
    """Whether newer TensorRT versions can run the engine."""
    hardware_compatibility: Literal["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"] = "NONE"
    """Other GPU models that can run the engine, a member of `tensorrt.HardwareCompatibilityLevel`."""
    opset: int
    tensorrt: str = WRITTEN_FOR
    versions: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(cls, settings: ExportSettings, inputs: list[str], opset: int) -> BuildPlan:
        """The plan for these settings, whose shapes are within what the model has positions for."""
        profile = _profile(settings.shapes)
        flags: list[Literal["SPARSE_WEIGHTS", "TF32"]] = []
        if settings.sparsity is not None:
            flags.append("SPARSE_WEIGHTS")
        if settings.precision == "tf32":
            flags.append("TF32")
        return cls(
            precision=settings.precision,
            profiles=dict.fromkeys(inputs, profile),
            flags=flags,
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


def _profile(shapes: ShapeRange) -> Profile:
    return Profile(
        min=[shapes.min_batch, shapes.min_sequence],
        opt=[shapes.opt_batch, shapes.opt_sequence],
        max=[shapes.max_batch, shapes.max_sequence],
    )
