"""Options that are one backend's own, by which `--option NAME=VALUE` and a recipe's `options` are checked."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UsageError, did_you_mean

Options = TypeVar("Options", bound="BackendOptions")


class BackendOptions(BaseModel):
    """Base of every backend's options; one that has none uses it as it is. Each field has a description, which
    `limbeck backends NAME` shows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OnnxOptions(BackendOptions):
    """Options of `--backend onnx`."""

    opset: int = Field(20, ge=18, le=23, description="ONNX opset of the graph.")
    fusions: bool = Field(
        False,
        description="Fuse attention, norms and activations into ONNX Runtime's own operators (no other runtime reads "
        "them).",
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
