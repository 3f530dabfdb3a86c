"""Which GPU and which TensorRT are here, and whether an engine that was built with others runs on them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ..environment import gpu_facts
from ..errors import BackendUnavailable, InputError
from ..exporters.artifact import Manifest
from ..exporters.build_plan import BuildPlan

BUILT_ON = "built on"
"""Key of a `Device` in an engine's evidence."""
_AMPERE = 8
_FLOAT8 = [8, 9]
"""Compute capability of Ada; Jetson Orin's 8.7 has no float8."""


class Device(BaseModel):
    """What an engine is bound to, as it is written into its manifest."""

    model_config = ConfigDict(extra="forbid")

    gpu: str
    compute_capability: str
    """`9.0`"""
    driver: str
    tensorrt: str
    """`11.4.0.106`"""

    def __str__(self) -> str:
        return f"{self.gpu} (compute capability {self.compute_capability}) with TensorRT {self.tensorrt}"


def here() -> Device:
    """This machine's GPU, the one that torch uses where torch sees it, and TensorRT."""
    import tensorrt as trt
    import torch

    listed = gpu_facts()[0]
    name, capability = listed["name"], listed["compute_cap"]
    if torch.cuda.is_available():  # it may be another than the first: CUDA_VISIBLE_DEVICES
        name = torch.cuda.get_device_name()
        capability = ".".join(str(part) for part in torch.cuda.get_device_capability())
    return Device(
        gpu=name, compute_capability=capability, driver=listed["driver_version"], tensorrt=str(trt.__version__)
    )


def require_same_device(folder: Path, manifest: Manifest, plan: BuildPlan, now: Device) -> None:
    """Refuse an engine that was built for another device, before TensorRT is asked to open it.

    Raises:
        BackendUnavailable: another GPU or TensorRT than the engine's plan allows; both are named.
        InputError: the manifest does not say what the engine was built on.
    """
    try:
        built = Device.model_validate(manifest.evidence.get(BUILT_ON))
    except ValidationError as error:
        raise InputError(
            f"The manifest of {folder} does not say on which GPU and with which TensorRT the engine was built.",
            "Build it again from its kit: limbeck build KIT --out DIR.",
        ) from error
    if not (_same_gpu(built, now, plan) and _same_tensorrt(built, now, plan)):
        raise BackendUnavailable(
            f"The engine {folder} was built on a {built}; here is a {now}.",
            "Build it here from its kit: limbeck build KIT --out DIR. A kit that was exported with --option "
            "hardware_compatibility=... or version_compatible=true makes an engine that others can run too.",
        )


def require_precision(plan: BuildPlan, now: Device) -> None:
    """Refuse a kit whose types the GPU does not multiply, before minutes go into its build.

    Raises:
        BackendUnavailable: an fp8 kit on a GPU without float8.
    """
    if plan.precision == "fp8" and _numbers(now.compute_capability) < _FLOAT8:
        raise BackendUnavailable(
            f"fp8 needs a GPU of compute capability 8.9 or more; here is a {now}.",
            "Export at --precision int8 or fp16.",
        )


def _same_gpu(built: Device, now: Device, plan: BuildPlan) -> bool:
    if plan.hardware_compatibility == "NONE":
        return built.gpu == now.gpu and built.compute_capability == now.compute_capability
    if plan.hardware_compatibility == "SAME_COMPUTE_CAPABILITY":
        return built.compute_capability == now.compute_capability
    return _numbers(now.compute_capability) >= [_AMPERE]


def _same_tensorrt(built: Device, now: Device, plan: BuildPlan) -> bool:
    before, after = _numbers(built.tensorrt), _numbers(now.tensorrt)
    return after >= before if plan.version_compatible else after[:3] == before[:3]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]
