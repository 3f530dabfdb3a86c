"""Options that are one backend's own, by which `--option NAME=VALUE` and a recipe's `options` are checked."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UsageError, did_you_mean
from .settings import ShapeRange

Options = TypeVar("Options", bound="BackendOptions")

NEWEST_OPSET = 23
"""Of ONNX, as far as torch's exporter writes it."""
OPSET = 20
"""Pinned: the exporter's default moves with onnxscript's releases."""
ATTENTION_OPSET = 23
"""The first with an operator for attention, which reads few key heads for many query heads without repeating them."""


class BackendOptions(BaseModel):
    """Base of every backend's options; one that has none uses it as it is. Each field has a description, which
    `limbeck backends NAME` shows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OnnxOptions(BackendOptions):
    """Options of `--backend onnx`."""

    opset: int | None = Field(
        None,
        ge=18,
        le=NEWEST_OPSET,
        description=f"ONNX opset of the graph; {OPSET} if not given, {ATTENTION_OPSET} for a language model with its "
        "cache.",
    )
    fusions: bool = Field(
        False,
        description="Fuse attention, norms and activations into ONNX Runtime's own operators: not with int8, and no "
        "other runtime reads them.",
    )
    group_size: Literal[16, 32, 64, 128, 256] = Field(
        32, description="Weights that share one scale in a weight-only precision."
    )


class OpenVINOOptions(BackendOptions):
    """Options of `--backend openvino`."""

    compile_cache: bool = Field(
        False, description="Keep the compiled program in the user's cache folder, so that it opens faster next time."
    )
    group_size: Literal[16, 32, 64, 128] = Field(
        32, description="Weights that share one scale in int4-weight-only (int8-weight-only has one a channel)."
    )
    kv_cache_precision: Literal["f32", "bf16", "f16", "u8"] | None = Field(
        None, description="What a language model keeps keys and values in; what it computes in if not given."
    )


class ExecuTorchOptions(BackendOptions):
    """Options of `--backend executorch`."""

    activations: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="Where int8 takes the ranges of activations from: each token as it comes, or calibration, which is "
        "coarser.",
    )


class ProfileShapes(BaseModel):
    """One range of input sizes that an engine is tuned for; what is left out is as in the export's shapes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_batch: int | None = Field(None, ge=1)
    opt_batch: int | None = Field(None, ge=1)
    max_batch: int | None = Field(None, ge=1)
    min_sequence: int | None = Field(None, ge=1)
    opt_sequence: int | None = Field(None, ge=1)
    max_sequence: int | None = Field(None, ge=1)

    def inside(self, shapes: ShapeRange) -> ShapeRange:
        """The whole range, sizes that were left out taken from `shapes`.

        Raises:
            UsageError: it reaches outside `shapes`, for which the graph was traced, or its sizes are out of order.
        """
        given = self.model_dump(exclude_none=True)
        for name, size in given.items():
            what = name.partition("_")[2]
            smallest, largest = getattr(shapes, f"min_{what}"), getattr(shapes, f"max_{what}")
            if not smallest <= size <= largest:
                raise UsageError(
                    f"A profile of tensorrt has {name} {size}; the graph takes a {what} of {smallest} to {largest}.",
                    f"Widen --{what}, or narrow the profile.",
                )
        try:
            return ShapeRange(**{**shapes.model_dump(), **given}).within(shapes.max_sequence)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UsageError(f"A profile of tensorrt is not a range: {message}.") from error


class TensorRTOptions(BackendOptions):
    """Options of `--backend tensorrt`; they go into the kit's build plan."""

    profiles: tuple[ProfileShapes, ...] = Field(
        (),
        description="Ranges that get kernels of their own, instead of one for all shapes: "
        "[{max_batch: 1}, {min_batch: 8, opt_batch: 32, max_batch: 64}].",
    )
    rest: Literal["fp16", "fp32"] = Field(
        "fp16", description="What an int8 or fp8 graph computes in where it is not quantised."
    )
    optimization_level: int = Field(3, ge=0, le=5, description="How long the builder searches; 5 is longest.")
    workspace_mb: int | None = Field(
        None, ge=1, description="Scratch memory in MiB that kernels may use; all of the GPU's if not given."
    )
    version_compatible: bool = Field(False, description="Let newer TensorRT versions run the engine.")
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = Field(
        "none", description="Other GPU models that can run the engine, at some cost in speed."
    )
    cuda_graphs: bool = Field(
        False, description="Replay each shape as a CUDA graph: less overhead a call, more memory a shape."
    )


class TorchOptions(BackendOptions):
    """Options of `--backend torch`."""

    compiler: Literal["aot", "inductor", "eager"] = Field(
        "aot",
        description="What makes it fast: AOTInductor, ahead of time, into a package of machine code; inductor, when it "
        "is first called (torch.compile); eager, nothing.",
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where it runs, and is compiled for.")


def checked_options(kind: type[Options], values: dict[str, Any], backend: str) -> Options:
    """The options as their backend reads them.

    Raises:
        UsageError: an option that the backend does not have, or a value that is not valid.
    """
    known = list(kind.model_fields)
    for name in values:
        if name not in known:
            have = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"The backend {backend} has no option {name!r}; {have}.{did_you_mean(name, known)}")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        said = f"{message[0].lower()}{message[1:]} (given: {first['input']!r})"
        raise UsageError(f"The option {first['loc'][0]} of the backend {backend}: {said}.") from error
