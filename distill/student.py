"""Drawing a student from its teacher: some of its layers, heads and channels with their weights, or none of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from ..models.anatomy import Anatomy, anatomy_of
from ..models.checkpoint import Checkpoint, hash_of_model
from ..models.data import Data
from ..models.shapes import uniform_shapes_of
from ..models.surgery import HeadSelection, Selection, select, strongest
from .inheritance import Inheritance
from .scratch import scratch_model
from .settings import StudentSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def draw_student(teacher: Checkpoint, settings: StudentSettings, data: Data | None = None, seed: int = 0) -> Checkpoint:
    """An untrained student, whose history is the teacher's so far. What it inherits are copies: the teacher stays as it
    was. The same teacher, settings and data give the same student.

    Args:
        data: the training text, by which it is chosen what a narrower student inherits (see `inheritance.py`); the
            weights decide when not given.
        seed: what a student from scratch draws its weights with.

    Raises:
        UsageError: sizes that the teacher cannot give or its architecture cannot have, or layers by importance without
            data.
        InputError: an architecture that is not in the anatomy table, or a configuration that cannot be used.
    """
    if settings.config is not None:
        if any((settings.layers is not None, settings.hidden_size, settings.heads, settings.ffn)):
            raise UsageError(
                "A student from scratch has the sizes of its config.", "Leave layers, hidden_size, heads and ffn out."
            )
        model = scratch_model(teacher, settings.config, seed)
        return replace(teacher, model=model, hash=hash_of_model(model))
    sizes = _sizes(teacher.model, settings)
    importance = Inheritance(teacher, data)
    layers = _chosen_layers(teacher.model, settings, importance)
    selection = Selection(
        layers=layers,
        channels=strongest(importance.channels(), sizes.width) if sizes.width is not None else None,
        heads=_chosen_heads(importance, teacher.model, layers, sizes) if sizes.heads is not None else None,
        ffn=[strongest(importance.ffn(layer), sizes.ffn) for layer in layers] if sizes.ffn is not None else None,
    )
    model = select(teacher.model, selection)
    return replace(teacher, model=model, hash=hash_of_model(model))


def uniform_layers(count: int, depth: int) -> list[int]:
    """`count` of `depth` layers, evenly spread, the first and the last among them (DistilBERT's and PKD-skip's choice
    in spirit: Sanh et al. 2019, Sun et al. 2019).

    Raises:
        UsageError: more layers than the teacher has, or none.
    """
    _check_count(count, depth)
    if count == 1:
        return [0]
    return [int(i * (depth - 1) / (count - 1)) for i in range(count)]


def _check_count(count: int, depth: int) -> None:
    if not 1 <= count <= depth:
        raise UsageError(f"A student of {count} layers cannot be drawn from a teacher of {depth}; choose 1 to {depth}.")


def _chosen_layers(model: PreTrainedModel, settings: StudentSettings, importance: Inheritance) -> list[int]:
    """The teacher's layers that the student has."""
    depth = len(anatomy_of(model).layers(model))
    if isinstance(settings.layers, list):
        return settings.layers
    count = depth if settings.layers is None else settings.layers
    _check_count(count, depth)
    if settings.choose == "first":
        return list(range(count))
    if settings.choose == "last":
        return list(range(depth - count, depth))
    if settings.choose == "uniform":
        return uniform_layers(count, depth)
    if importance.data is None:
        raise UsageError(
            "Layers are chosen by importance on the training text, and there is none.",
            "Give the data, or choose uniform, first or last.",
        )
    scores = importance.layers()
    if model.config.model_type == "modernbert":  # its first layer has no norm of its own, so it cannot be left out
        scores[0] = torch.inf
    return [int(layer) for layer in strongest(scores, count)]


@dataclass(frozen=True)
class _Sizes:
    """What is to be cut, checked; `None` leaves it as it is in the teacher."""

    width: int | None
    heads: int | None
    groups: int
    """Key-value heads."""
    head_size: int
    ffn: int | None


def _sizes(model: PreTrainedModel, settings: StudentSettings) -> _Sizes:
    anatomy = anatomy_of(model)
    width, size = int(model.config.hidden_size), anatomy.head_size_of(model)
    if not any((settings.hidden_size, settings.heads, settings.ffn)):
        return _Sizes(width=None, heads=None, groups=0, head_size=size, ffn=None)
    shape = uniform_shapes_of(model)
    heads, ffn = shape.heads, shape.ffn
    for name, asked, most in (
        ("hidden_size", settings.hidden_size, width),
        ("heads", settings.heads, heads),
        ("ffn", settings.ffn, ffn),
    ):
        if asked is not None and asked > most:
            raise UsageError(f"{name} is {asked}, and the teacher has {most}: a student inherits at most as much.")
    new_width = settings.hidden_size or width
    if anatomy.head_size is None:
        new_heads, new_size = _heads_that_make(new_width, settings.heads, model, anatomy)
    else:
        new_heads, new_size = settings.heads or heads, size
    return _Sizes(
        width=new_width if new_width != width else None,
        heads=new_heads if (new_heads, new_size) != (heads, size) else None,
        groups=_groups_for(new_heads, model, anatomy),
        head_size=new_size,
        ffn=settings.ffn if settings.ffn != ffn else None,
    )


def _heads_that_make(width: int, heads: int | None, model: PreTrainedModel, anatomy: Anatomy) -> tuple[int, int]:
    """Heads and their size for a family whose width is heads times head size."""
    kind, size = model.config.model_type, anatomy.head_size_of(model)
    if heads is None:
        if width % size:
            raise UsageError(
                f"hidden_size is {width}, which is no multiple of the teacher's head size {size}; a {kind} has as much "
                "width as its heads together.",
                f"Choose {width // size * size or size} or {(width // size + 1) * size}, or give heads too.",
            )
        return width // size, size
    if width % heads:
        raise UsageError(f"hidden_size is {width}, which {heads} heads cannot share evenly.")
    if width // heads > size:
        raise UsageError(
            f"{heads} heads at a width of {width} would have {width // heads} channels each, and the teacher's have "
            f"{size}: the configuration of a {kind} has no head size of its own.",
            f"Give hidden_size too: {heads * size} keeps the teacher's head size.",
        )
    if width // heads < size and anatomy.rotary:
        raise UsageError(
            f"{heads} heads at a width of {width} would have {width // heads} channels each, and the teacher's have "
            f"{size}; a {kind} rotates each channel at a speed that goes with its place in the head, so heads cannot "
            "get narrower.",
            f"Choose hidden_size {heads * size}, or {width // size} heads.",
        )
    return heads, width // heads


def _groups_for(heads: int, model: PreTrainedModel, anatomy: Anatomy) -> int:
    """The most key-value heads, up to the teacher's, that so many heads can share evenly, no more heads to each than in
    the teacher."""
    shape = uniform_shapes_of(model)
    if anatomy.key_value_heads is None:
        return heads
    groups, shared = shape.key_value_heads, shape.heads // shape.key_value_heads

    def most(count: int) -> int | None:
        return next((n for n in range(groups, 0, -1) if count % n == 0 and count // n <= shared), None)

    found = most(heads)
    if found is None:
        valid = ", ".join(str(count) for count in range(1, groups * shared + 1) if most(count) is not None)
        raise UsageError(
            f"{heads} heads cannot share the teacher's {groups} key-value heads evenly, at most {shared} to each; "
            f"heads can be {valid}."
        )
    return found


def _chosen_heads(
    importance: Inheritance, model: PreTrainedModel, layers: list[int], sizes: _Sizes
) -> list[HeadSelection]:
    """The heads that stay of each of these layers, and the channels of each where heads get narrower."""
    anatomy = anatomy_of(model)
    assert sizes.heads is not None
    shape = uniform_shapes_of(model)
    scores = [importance.heads(layer) for layer in layers]
    if anatomy.relative_bias is not None:  # the layers share a bias for each head, so they keep the same heads
        scores = [torch.stack(scores).sum(dim=0)] * len(layers)
    chosen = []
    for layer, score in zip(layers, scores, strict=True):
        query, key_value = _grouped(score, sizes.heads, sizes.groups, shape.heads // shape.key_value_heads)
        narrower = sizes.head_size < anatomy.head_size_of(model)
        chosen.append(
            HeadSelection(
                query,
                key_value,
                _strongest_rows(importance.score_channels(layer)[query], sizes.head_size) if narrower else None,
                _strongest_rows(importance.value_channels(layer)[query], sizes.head_size) if narrower else None,
            )
        )
    return chosen


def _grouped(scores: torch.Tensor, heads: int, groups: int, shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The heads and key-value heads that keep most of the scores [heads]: the best groups, the best heads in each."""
    by_group = scores.view(-1, shared)
    each = heads // groups
    key_value = strongest(by_group.topk(each, dim=1).values.sum(dim=1), groups)
    query = torch.cat([group * shared + strongest(by_group[group], each) for group in key_value])
    return query, key_value


def _strongest_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The positions of the `count` highest scores in each row, ascending, int64 [rows, count]."""
    return torch.stack([strongest(row, count) for row in scores])
