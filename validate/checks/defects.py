"""What exporters, compilers and conversions are known to get wrong, as changes of a live model that can be undone.

Each defect is a context inside which the checkpoint computes as if it had been exported with it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.activations import ACT2FN

from ...models.anatomy import ANATOMIES, Anatomy, anatomy_of
from ...models.checkpoint import Checkpoint
from ...models.embedding import SentenceEmbedder
from ...models.gates import Gates, gated

_EPSILONS = (1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_ACTIVATIONS = {"gelu": "GELU by erf", "gelu_pytorch_tanh": "GELU by tanh", "quick_gelu": "GELU by a sigmoid",
                "relu": "ReLU", "silu": "SiLU"}  # fmt: skip
_POSITION_TABLES = ("position_embeddings", "wpe")
_FINAL_NORMS = ("norm", "ln_f", "final_norm")
_MOST_PAIRS = 120
"""Pairs of layers that are tried as exchanged: those of 16 layers."""


@dataclass(frozen=True)
class Defect:
    """One thing that may have gone wrong; `cause` completes "what the student would with ..."."""

    cause: str
    applied: Callable[[], AbstractContextManager[Any]]


def defects_of(student: Checkpoint) -> Iterator[Defect]:
    """Every defect that this model can have, the usual ones first."""
    yield from _epsilons(student)
    yield from _activations(student)
    yield Defect("the attention mask ignored (padding is read as text)", partial(_mask_ignored, student.module))
    if isinstance(student.module, SentenceEmbedder):
        yield Defect("the attention mask ignored inside the encoder", partial(_mask_ignored, student.model))
        yield from _poolings(student.module)
    if student.task.name == "text-generation":
        yield Defect("the causal mask dropped", partial(_not_causal, student))
    yield from _positions(student)
    yield from _final_norms(student)
    if student.model.config.model_type in ANATOMIES:
        yield from _parts(student, anatomy_of(student.model))


def _epsilons(student: Checkpoint) -> Iterator[Defect]:
    norms = [(part, name) for part in student.module.modules() if (name := _epsilon_of(part)) is not None]
    own = {float(getattr(part, name)) for part, name in norms}
    for epsilon in _EPSILONS:
        if own and own != {epsilon}:
            instead = f" instead of {min(own):g}" if len(own) == 1 else ""
            yield Defect(f"LayerNorm epsilon {epsilon:g}{instead}", partial(_set_all, norms, epsilon))


def _epsilon_of(part: nn.Module) -> str | None:
    named = "norm" in type(part).__name__.lower()
    return next((name for name in ("eps", "variance_epsilon") if named and hasattr(part, name)), None)


@contextmanager
def _set_all(places: list[tuple[Any, str]], value: Any) -> Iterator[None]:
    """Give these attributes one value."""
    before = [getattr(owner, name) for owner, name in places]
    try:
        for owner, name in places:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), old in zip(places, before, strict=True):
            setattr(owner, name, old)


def _activations(student: Checkpoint) -> Iterator[Defect]:
    kinds = {kind: ACT2FN[kind] for kind in _ACTIVATIONS}
    known = tuple({type(function) for function in [*kinds.values(), ACT2FN["gelu_new"], nn.GELU()]})
    places = [(owner, name) for owner in student.module.modules() for name, part in owner.named_children()
              if isinstance(part, known)]  # fmt: skip
    if not places:
        return
    probe = torch.linspace(-3, 3, 64)
    own = getattr(*places[0])(probe)
    for kind, function in kinds.items():
        if not torch.allclose(function(probe), own, atol=1e-6):
            yield Defect(f"{_ACTIVATIONS[kind]} for the activation", partial(_set_all, places, function))


@contextmanager
def _mask_ignored(module: nn.Module) -> Iterator[None]:
    def everything(_: Any, args: Any, inputs: dict[str, Any]) -> Any:
        return args, {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}

    handle = module.register_forward_pre_hook(everything, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _poolings(module: SentenceEmbedder) -> Iterator[Defect]:
    own = module.pooling
    for mode in ("cls", "mean", "max"):
        if mode != own.mode:
            other = dataclasses.replace(own, mode=mode)
            cause = f"{mode} pooling instead of {own.mode}"
            yield Defect(cause, partial(_set_all, [(module, "pooling")], other))
    other = dataclasses.replace(own, normalize=not own.normalize)
    cause = "its embedding not normalised" if own.normalize else "its embedding normalised"
    yield Defect(cause, partial(_set_all, [(module, "pooling")], other))


@contextmanager
def _not_causal(student: Checkpoint) -> Iterator[None]:
    modeling: Any = sys.modules[type(student.model).__module__]
    names = [name for name in ("create_causal_mask",) if hasattr(modeling, name)]
    causal = [(part, "is_causal") for part in student.module.modules() if getattr(part, "is_causal", False)]
    with ExitStack() as undo:
        undo.enter_context(_set_all([(modeling, name) for name in names], masking_utils.create_bidirectional_mask))
        undo.enter_context(_set_all(causal, False))
        yield


def _positions(student: Checkpoint) -> Iterator[Defect]:
    tables = [part for name, part in student.module.named_modules()
              if name.rpartition(".")[2] in _POSITION_TABLES and isinstance(part, nn.Embedding)]  # fmt: skip
    for table in tables:
        for step in (1, -1):
            yield Defect(f"position ids off by one ({step:+d})", partial(_shifted, table, step))


@contextmanager
def _shifted(table: nn.Embedding, step: int) -> Iterator[None]:
    def hook(_: Any, args: tuple[Any, ...]) -> Any:
        return ((args[0] + step).clamp(0, table.num_embeddings - 1), *args[1:])

    handle = table.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _final_norms(student: Checkpoint) -> Iterator[Defect]:
    base: Any = student.model.base_model
    for name in _FINAL_NORMS:
        if isinstance(getattr(base, name, None), nn.Module):
            yield Defect("the last norm left out", partial(_set_all, [(base, name)], nn.Identity()))


def _parts(student: Checkpoint, anatomy: Anatomy) -> Iterator[Defect]:
    model, layers, size = student.model, anatomy.layers(student.model), anatomy.head_size_of(student.model)
    for index in range(len(layers)):
        gates = Gates(layers={index: torch.tensor(0.0)})
        yield Defect(f"layer {index} left out", partial(gated, model, gates))
    for pair in [*combinations(range(len(layers)), 2)][:_MOST_PAIRS]:
        yield Defect(f"layers {pair[0]} and {pair[1]} swapped", partial(_exchanged, layers, *pair))
    for index, layer in enumerate(layers):
        count = anatomy.heads_of(layer, size)
        for head in range(count):
            kept = torch.ones(count).index_fill(0, torch.tensor([head]), 0.0)
            yield Defect(f"head {head} of layer {index} zeroed", partial(gated, model, Gates(heads={index: kept})))


@contextmanager
def _exchanged(layers: nn.ModuleList, first: int, second: int) -> Iterator[None]:
    layers[first], layers[second] = layers[second], layers[first]
    try:
        yield
    finally:
        layers[first], layers[second] = layers[second], layers[first]
