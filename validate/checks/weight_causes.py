"""What wrong weights look like, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ...exporters.program import ProgramWeight
from ...models.anatomy import ANATOMIES, anatomy_of, reduction_axis
from ...models.checkpoint import Checkpoint
from ..proofs.weight_audit import same_weight
from .base import Subject

_MOSTLY = 0.9
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_NEIGHBOURS = 24
_LISTED = 3


@dataclass(frozen=True)
class _Found:
    """A program's weights beside its student's."""

    student: Checkpoint
    weights: Mapping[str, ProgramWeight]
    """Matrices and vectors of which the program holds all rows."""

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        named = self.student.module.named_parameters(remove_duplicate=False)
        return {name: parameter.detach().float().cpu().numpy() for name, parameter in named}

    @cached_property
    def wrong(self) -> list[str]:
        """Matrices that are not the student's own, by name; vectors are too alike to tell anything by."""
        return [name for name in self.matrices if not self.holds(name, name)]

    @cached_property
    def matrices(self) -> list[str]:
        return [name for name in self.weights if name in self.expected and self.expected[name].ndim == 2]

    def holds(self, name: str, other: str) -> bool:
        """Whether the program's weight of the one name has the values of the student's parameter of the other."""
        return other in self.expected and same_weight(self.weights[name], self.expected[other])

    @cached_property
    def layers(self) -> dict[int, dict[str, str]]:
        """Layer to the names of its matrices in the student, by what follows the layer's number."""
        if self.student.model.config.model_type not in ANATOMIES:
            return {}
        module_of = {id(part): name for name, part in self.student.module.named_modules()}
        layers = anatomy_of(self.student.model).layers(self.student.model)
        return {
            index: {name: f"{module_of[id(layer)]}.{name}" for name, p in layer.named_parameters() if p.ndim == 2}
            for index, layer in enumerate(layers)
        }


def cause_of(student: Checkpoint, weights: Iterable[ProgramWeight], subject: Subject) -> str | None:
    """The likeliest cause of weights that are not the student's, in words; `None` where nothing known is like it."""
    found = _Found(student, {weight.name: weight for weight in weights if weight.rows is None})
    return _layers_moved(found) or _layers_gone(found) or _heads_zeroed(found) or _rounded(found) or \
        _older(found, subject)  # fmt: skip


def _layers_gone(found: _Found) -> str | None:
    gone = [i for i, names in found.layers.items() if names and not any(n in found.weights for n in names.values())]
    zero = [i for i, names in found.layers.items() if i not in gone and all(_is_zero(found, n) for n in names.values())]
    parts = [f"layer {index} is missing: none of its weights is in the program" for index in gone]
    return " and ".join([*parts, *(f"layer {index} is zero" for index in zero)]) or None


def _is_zero(found: _Found, name: str) -> bool:
    return name in found.weights and not np.any(found.weights[name].values) and bool(np.any(found.expected[name]))


def _layers_moved(found: _Found) -> str | None:
    """Which other layer's weights a layer holds."""
    holds = {index: other for index in found.layers if (other := _holder(found, index)) is not None}
    if not holds:
        return None
    swapped = [(i, j) for i, j in holds.items() if holds.get(j) == i and i < j]
    if swapped:
        return " and ".join(f"layers {i} and {j} are swapped" for i, j in swapped)
    first = min(holds)
    if holds[first] == first + 1 and all(other == index + 1 for index, other in holds.items()):
        return f"layer {first} is missing: from there on each layer holds the weights of the next"
    return ", ".join(f"layer {index} holds the weights of layer {other}" for index, other in holds.items())


def _holder(found: _Found, index: int) -> int | None:
    """The other layer whose weights most matrices of this one have."""
    own = {part: name for part, name in found.layers[index].items() if name in found.weights}
    if not own or any(found.holds(name, name) for name in own.values()):
        return None
    for other, names in found.layers.items():
        same = sum(part in names and found.holds(name, names[part]) for part, name in own.items())
        if other != index and same >= _MOSTLY * len(own):
            return other
    return None


def _heads_zeroed(found: _Found) -> str | None:
    """Heads whose part of the output projection, or whose values, are zero in the program alone."""
    if not found.layers:
        return None
    anatomy, model = anatomy_of(found.student.model), found.student.model
    size, told = anatomy.head_size_of(model), []
    for index, layer in enumerate(anatomy.layers(model)):
        axis = reduction_axis(layer.get_submodule(anatomy.output))  # type: ignore[arg-type]
        places = [(anatomy.output, axis), (anatomy.value, 1 - axis)]
        heads = {head for part, side in places if part for head in _zero_heads(found, index, part, side, size)}
        told += [f"head {head} of layer {index} is zero" for head in sorted(heads)]
    return " and ".join(told[:_LISTED]) or None


def _zero_heads(found: _Found, index: int, part: str, axis: int, size: int) -> Iterator[int]:
    name = found.layers[index].get(f"{part}.weight", "")
    if name not in found.weights or found.weights[name].values.shape != found.expected[name].shape:
        return
    for head in range(found.expected[name].shape[axis] // size):
        places = np.arange(head * size, (head + 1) * size)
        if not found.weights[name].values.take(places, axis).any() and found.expected[name].take(places, axis).any():
            yield head


def _rounded(found: _Found) -> str | None:
    for kind, dtype in _HALVES.items():
        rounded = {name: torch.from_numpy(found.expected[name]).to(dtype).float().numpy() for name in found.wrong}
        if rounded and all(np.array_equal(found.weights[name].values, values) for name, values in rounded.items()):
            return f"the weights are rounded to {kind}"
    return None


def _older(found: _Found, subject: Subject) -> str | None:
    """Weights that are nearly all others: whose they are, where a relative with them lies at hand."""
    if len(found.wrong) < _MOSTLY * len(found.matrices):
        return None
    asked = [name for name in found.wrong if any(name in names.values() for names in found.layers.values())]
    for folder in _relatives(subject):
        if _is_of(folder, [found.weights[name] for name in (asked or found.wrong)[:_LISTED]]):
            return f"these are not this student's weights but those of {folder.name}, another state of the model"
    return f"these are not this student's weights ({len(found.wrong)} of {len(found.matrices)} matrices are others)"


def _relatives(subject: Subject) -> list[Path]:
    """The teacher's folder, and checkpoints that lie beside the student's: the other stages of a run."""
    assert subject.student is not None
    home = Path(subject.student.source).resolve()
    beside = [path.parent for path in sorted(home.parent.glob("*/config.json"))] if home.is_dir() else []
    teacher = [Path(subject.standard.teacher.source).resolve()] if subject.standard is not None else []
    return [folder for folder in [*teacher, *beside[:_MOST_NEIGHBOURS]] if folder != home and folder.is_dir()]


def _is_of(folder: Path, weights: list[ProgramWeight]) -> bool:
    """Whether the folder's safetensors hold these weights, under the same name or a part of it."""
    held = dict[str, np.ndarray]()
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                    if any(_same_name(name, weight.name) for weight in weights):
                        held[name] = tensors.get_tensor(name).float().numpy()
    except (SafetensorError, OSError):
        return False
    return all(any(_same_name(n, w.name) and same_weight(w, values) for n, values in held.items()) for w in weights)


def _same_name(left: str, right: str) -> bool:
    return left == right or left.endswith(f".{right}") or right.endswith(f".{left}")
