"""Models whose weights stay in files: copies that share memory, and weights that lie mapped on disk.

`from_pretrained` maps safetensors files when the data type asked for is the stored one (checked with transformers
5.23): a weight is read when it is looked at, and the system takes its pages back when it needs them. What is changed
becomes private memory. So a model larger than memory can be pruned if half-precision files are converted on disk
(`in_float32`) and changed weights go to disk too (`settle`).
"""

from __future__ import annotations

import copy
import ctypes
import errno
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import DiskFull, InputError
from ..files import read_json, write_json

MAPPED_FROM = 2**25
"""Bytes of weights from which on a changed model is kept on disk. Smaller ones are quicker in memory."""

_INDEX = "model.safetensors.index.json"

_Module = TypeVar("_Module", bound=nn.Module)


def copy_of(
    module: _Module,
    convert: Callable[[nn.Parameter], torch.Tensor],
    instead: Mapping[nn.Module, nn.Module] | None = None,
) -> _Module:
    """A deep copy whose parameters are what `convert` makes of the original's; without a copy in between.

    With `convert` returning the parameter's own tensor the copy shares its memory, and costs nothing. Tied weights stay
    tied.

    Args:
        instead: modules that are not copied, each with what stands in its place.
    """
    memo: dict[int, object] = {id(old): new for old, new in (instead or {}).items()}
    left_out = {id(parameter) for old in instead or {} for parameter in old.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in left_out:
            memo[id(parameter)] = nn.Parameter(convert(parameter).detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)


def is_large(module: nn.Module) -> bool:
    """Whether a changed copy of this model is kept on disk: its weights take `MAPPED_FROM` bytes or more, and are on
    the CPU."""
    weights = list(module.parameters())
    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    return on_cpu and sum(weight.numel() * weight.element_size() for weight in weights) >= MAPPED_FROM


@contextmanager
def in_float32(folder: Path) -> Iterator[Path]:
    """A model folder whose weights can be mapped as float32 while the block lasts: the folder itself, or, where it has
    large weights of another type, a temporary one in which they lie converted. What was mapped outlives it.

    Raises:
        DiskFull: no room for the converted weights in the folder for temporary files.
        InputError: an index of weights that is malformed, or names a file elsewhere.
        SafetensorError: a file that is none.
    """
    files = _weight_files(folder)
    if 4 * sum(_half_weights(file) for file in files) < MAPPED_FROM:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="limbeck-", ignore_cleanup_errors=True) as place:
        for path in folder.iterdir():
            if path.suffix != ".safetensors" and path.name != _INDEX:
                (Path(place) / path.name).symlink_to(path.resolve())
        shard_of: dict[str, str] = {}
        for number, part in enumerate(_parts(files)):
            name = f"model-{number:05}.safetensors"
            _save(part, Path(place) / name)
            shard_of |= dict.fromkeys(part, name)
        write_json(Path(place) / _INDEX, {"metadata": {}, "weight_map": shard_of})
        yield Path(place)


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read; none where one is missing, which is for transformers to say.

    Raises:
        InputError: an index that is malformed, or names a file elsewhere.
    """
    whole, index = folder / "model.safetensors", folder / _INDEX
    if whole.exists() or not index.exists():
        return [whole] if whole.exists() else []
    written = read_json(index)
    shard_of = written.get("weight_map") if isinstance(written, dict) else None
    if not isinstance(shard_of, dict):
        raise InputError(f"{index} has no weight_map, a table of weights and their files.", "Download it again.")
    for name in shard_of.values():  # by name alone: where a hub's snapshot lies, the files are links to elsewhere
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(
                f"{index} names {name!r}, which is no file beside it.",
                "Do not use this folder: it may have been tampered with.",
            )
    files = [folder / name for name in sorted(set(shard_of.values()))]
    return files if all(file.is_file() for file in files) else []


def _half_weights(file: Path) -> int:
    """How many weights a file stores in half precision."""
    with safe_open(file, framework="pt") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118  (it is no mapping)
        return sum(math.prod(each.get_shape()) for each in slices if each.get_dtype() in ("F16", "BF16"))


def _parts(files: Iterable[Path]) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors by name, floating ones as float32, about `MAPPED_FROM` bytes at a time."""
    part: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                value = weights.get_tensor(name)
                part[name] = value.float() if value.is_floating_point() else value
                if sum(each.nbytes for each in part.values()) >= MAPPED_FROM:
                    yield part
                    part = {}
    if part:
        yield part


def settle(values: Mapping[nn.Parameter, torch.Tensor], on_disk: bool) -> None:
    """Give each parameter its value, in memory of its own (data type and device stay the parameter's).

    With `on_disk` that memory is a mapped file in the folder for temporary files (`TMPDIR`), which should not be one
    that lives in memory itself. The file has no name any more once this returns (where the system allows that), so it
    goes with the last tensor that uses it. Writing to such a tensor makes the touched pages private, not the file's.

    Raises:
        DiskFull: no room for the file.
    """
    if not on_disk:
        for parameter, value in values.items():
            own = value.detach().to(parameter.device, parameter.dtype)
            parameter.data = own.clone(memory_format=torch.contiguous_format)
        return
    named = {
        str(place): value.detach().to(parameter.device, parameter.dtype).contiguous()
        for place, (parameter, value) in enumerate(values.items())
    }
    with tempfile.TemporaryDirectory(prefix="limbeck-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "weights.safetensors"
        _save(named, file)
        mapped = load_file(file)
    for place, parameter in enumerate(values):
        parameter.data = mapped[str(place)]
    _give_back_freed_memory()


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise DiskFull(
                f"No room in {tempfile.gettempdir()} for the weights of a model that is kept on disk while it is "
                "worked on.",
                "Make room, or set TMPDIR to a folder that has some.",
            ) from error
        raise


def _give_back_freed_memory() -> None:
    """Matrices of up to 32 MB come from glibc's heap, which keeps the holes that they leave between what stays: without
    this a pass over many layers grows by a third of what it frees."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
