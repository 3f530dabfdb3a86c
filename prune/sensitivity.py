"""What each part of a model is worth: one layer's heads, channels, weights, or the whole of it, cut alone, without
training, while everything else stays whole.

A cut leaves what comes before its layer as it was. So the passes start at the layer that is cut, from what entered it
when nothing was cut: measuring all layers costs half of what whole passes would, and the activations of one layer at a
time are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import nn

from ..errors import InputError, UsageError, did_you_mean
from ..models.anatomy import Linear, anatomy_of, in_features, out_features, reduction_axis
from ..models.batching import Batch, Examples, batches_by_length, concatenate_in_order
from ..models.checkpoint import Checkpoint
from ..models.gates import Gates, gated
from ..models.importance import Calibration, Scores, get_importance
from ..models.shapes import shapes_of
from .masks import Pattern, SemiStructured, Share

HEADS, FFN, LAYERS, SEMI_STRUCTURED, UNSTRUCTURED = "heads", "ffn", "layers", "2:4", "unstructured"
STRUCTURES = (HEADS, FFN, LAYERS, SEMI_STRUCTURED, UNSTRUCTURED)
RANKED = (HEADS, FFN)
"""Parts that go in the order of their importance."""
SHARED = (HEADS, FFN, UNSTRUCTURED)
"""Structures that can be cut by any share; the others are there or not."""
_TWO_OF_FOUR = SemiStructured(2, 4)
_HALF = 0.5

Progress = Callable[[int, int], None]
Answers = dict[str, np.ndarray]
"""A task's predictions; the first axis is the examples' order."""
Measured = TypeVar("Measured")


class SensitivitySettings(BaseModel):
    """Which parts are cut, by how much, and on how many rows the model is watched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    structures: tuple[str, ...] | None = Field(
        None, description="Of heads, ffn, layers, 2:4 and unstructured; all that the model has when not given."
    )
    shares: tuple[float, ...] = Field(
        (0.1, 0.25, 0.5, 0.75, 0.9), description="Shares to cut of heads, channels and weights, between 0 and 1."
    )
    method: str = Field("taylor", description="What says which heads and channels go first.")
    samples: int | None = Field(512, ge=1, description="Most rows that are looked at; null for all.")
    batch_size: int = Field(16, ge=1, description="Texts a batch.")
    seed: int = Field(0, description="Draws the rows.")

    @field_validator("structures")
    @classmethod
    def _known(cls, structures: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in structures or ():
            if name not in STRUCTURES:
                known = ", ".join(STRUCTURES)
                raise UsageError(f"There is no structure {name!r}; valid are {known}.{did_you_mean(name, STRUCTURES)}")
        if structures is not None and not structures:
            raise UsageError(f"No structure is named; valid are {', '.join(STRUCTURES)}.")
        return None if structures is None else tuple(name for name in STRUCTURES if name in structures)

    @field_validator("shares")
    @classmethod
    def _inside(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not shares:
            raise UsageError("There is no share to cut.", "Use --shares 0.1,0.5,0.9.")
        for share in shares:
            if not 0 < share < 1:
                raise UsageError(
                    f"A share of {share:g} cannot be cut; a share is more than 0 and less than 1.",
                    "Use --shares 0.1,0.5,0.9; --structures layers takes whole layers out.",
                )
        return tuple(sorted(set(shares)))


@dataclass(frozen=True)
class Cut:
    """One part of one layer, and how much of it goes."""

    structure: str
    layer: int
    """Counted from 0."""
    share: float
    """As asked for; `cut` of `units` is what whole heads, channels and weights make of it."""
    cut: int
    units: int


class ResumablePass:
    """A model's answers to the same examples over and over, each time from one layer on.

    At first that is the whole model; every `advance` moves the start one layer further. What enters the layer is what
    entered it while `advance` ran, so nothing before it may be changed in between.
    """

    def __init__(self, checkpoint: Checkpoint, examples: Examples, batch_size: int) -> None:
        self.checkpoint = checkpoint
        self.start = 0
        """The layer that the passes start with."""
        self._layers = list(anatomy_of(checkpoint.model).layers(checkpoint.model))
        self._batches = list(batches_by_length(examples, checkpoint.tokenizer, batch_size))
        self._before: list[Any] = [None] * len(self._batches)  # what the layer before the start gave, batch by batch

    @property
    def batches(self) -> int:
        """Batches of a pass."""
        return len(self._batches)

    def answers(self, told: Callable[[], None] = lambda: None) -> Answers:
        """The task's predictions; `told` is called after every batch."""
        parts = []
        for (positions, batch), before in zip(self._batches, self._before, strict=True):
            with _giving(self._layers[: self.start], before):
                outputs = self.checkpoint.run(batch)
            parts.append((positions, self.checkpoint.task.predictions(outputs, batch)))
            told()
        return concatenate_in_order(parts)

    def advance(self) -> None:
        """Start one layer further from now on."""
        for place, (_, batch) in enumerate(self._batches):
            with _giving(self._layers[: self.start], self._before[place]):
                self._before[place] = self._output(self._layers[self.start], batch)
        self.start += 1

    def _output(self, layer: nn.Module, batch: Batch) -> Any:
        """What a layer gives; what follows it is not computed."""

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Reached(output)

        hook = layer.register_forward_hook(stop)
        try:
            self.checkpoint.run(batch)
        except _Reached as reached:
            return reached.output
        finally:
            hook.remove()
        raise InputError(f"A layer of {self.checkpoint.source} does not run when the model does.")


class _Reached(Exception):
    """Ends a pass at the layer that it was for."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@contextmanager
def _giving(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let these layers give this instead of computing anything. They stay in their list, since models read attributes
    of them."""
    own = [vars(layer).get("forward") for layer in layers]  # what other tools may have put over the class's
    try:
        for layer in layers:
            vars(layer)["forward"] = lambda *_args, **_kwargs: output
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = before


def rank_parts(
    checkpoint: Checkpoint,
    examples: Examples,
    settings: SensitivitySettings,
    progress: Progress | None = None,
) -> Scores | None:
    """How important each head and channel is; `None` where neither is cut.

    Raises:
        UsageError: an unknown method, or one that does not score what is to be cut.
        InputError: a loss that is not a number.
    """
    wanted = [name for name in RANKED if name in structures_of(checkpoint, settings)]
    if not wanted:
        return None
    calibration = Calibration(examples, settings.batch_size, settings.seed, progress)
    return get_importance(settings.method).scores(checkpoint, wanted, calibration)


def structures_of(checkpoint: Checkpoint, settings: SensitivitySettings) -> tuple[str, ...]:
    """The structures to cut: those asked for, or all that the model has.

    Raises:
        InputError: the model lacks one that was asked for, or has none at all.
    """
    found = {cut.structure for cuts in _by_layer(checkpoint, settings) for cut in cuts}
    for name in settings.structures or ():
        if name not in found:
            raise InputError(f"{checkpoint.source} has no {name} to cut: {_why_lacking(checkpoint, name)}.")
    if not found:
        raise InputError(f"{checkpoint.source} has nothing that could be cut.")
    return tuple(name for name in STRUCTURES if name in found)


def _why_lacking(checkpoint: Checkpoint, structure: str) -> str:
    if structure == SEMI_STRUCTURED:
        name, module = next(iter(anatomy_of(checkpoint.model).linear_layers(checkpoint.model)))
        return f"no sparse kernel takes its matrices ({name}: {_why_not_sparse(module)})"
    return {HEADS: "its layers have one head each", FFN: "its layers have one channel each"}.get(
        structure, "it is a single layer"
    )


def measure_cuts(
    passes: ResumablePass,
    settings: SensitivitySettings,
    scores: Scores | None,
    measure: Callable[[Answers], Measured],
    progress: Progress = lambda done, total: None,
) -> list[tuple[Cut, Measured]]:
    """Cut every part of every layer alone, by every share, and measure what the model answers then. The model is
    afterwards what it was, to the bit, whatever is raised on the way.

    Args:
        passes: of the whole model; used up by this.
        scores: from `rank_parts`.
        measure: what the answers are worth.
        progress: called with (batches done, batches in all).
    """
    checkpoint, found = passes.checkpoint, []
    by_layer = _by_layer(checkpoint, settings)
    total = passes.batches * sum(len({(cut.structure, cut.cut) for cut in cuts}) for cuts in by_layer)
    done = 0

    def told() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for layer, cuts in enumerate(by_layer):
        seen: dict[tuple[str, int], Measured] = {}
        for cut in cuts:
            key = cut.structure, cut.cut
            if key not in seen:  # several shares of a few heads can mean the same number of them
                with cutting(checkpoint, cut, scores):
                    answers = passes.answers(told)
                seen[key] = measure(answers)
            found.append((cut, seen[key]))
        if layer + 1 < len(by_layer):
            passes.advance()
    return found


def _by_layer(checkpoint: Checkpoint, settings: SensitivitySettings) -> list[list[Cut]]:
    """Every cut to make, layer by layer."""
    shapes = shapes_of(checkpoint.model).layers
    wanted = settings.structures or STRUCTURES
    by_layer = []
    for layer, shape in enumerate(shapes):
        weights = sum(module.weight.numel() for module in _matrices(checkpoint, layer))
        sparse = sum(module.weight.numel() for module in _sparse_matrices(checkpoint, layer))
        cuts = []
        for structure, units in ((HEADS, shape.heads), (FFN, shape.ffn), (UNSTRUCTURED, weights)):
            if structure in wanted and units > 1:  # the last one cannot go: nothing would be left to run
                counts = ((share, min(max(1, round(share * units)), units - 1)) for share in settings.shares)
                cuts += [Cut(structure, layer, share, count, units) for share, count in counts]
        if LAYERS in wanted and len(shapes) > 1:
            cuts.append(Cut(LAYERS, layer, 1.0, 1, 1))
        if SEMI_STRUCTURED in wanted and sparse:
            cuts.append(Cut(SEMI_STRUCTURED, layer, _HALF, sparse // 2, weights))
        by_layer.append(cuts)
    return by_layer


@contextmanager
def cutting(checkpoint: Checkpoint, cut: Cut, scores: Scores | None) -> Iterator[None]:
    """The model with one part cut, inside the block: heads, channels and layers by gates of 0, weights by zeros that
    are written over them and taken back."""
    if cut.structure in (SEMI_STRUCTURED, UNSTRUCTURED):
        with _zeroed(list(_doomed_weights(checkpoint, cut))):
            yield
        return
    with gated(checkpoint.model, _gates(cut, scores)):
        yield


def _gates(cut: Cut, scores: Scores | None) -> Gates:
    if cut.structure == LAYERS:
        return Gates(layers={cut.layer: torch.tensor(float(cut.units - cut.cut))})
    by_layer = (scores.heads if cut.structure == HEADS else scores.ffn) if scores is not None else None
    if by_layer is None:
        raise UsageError(f"Cutting {cut.structure} needs their importance.")
    gate = torch.ones(cut.units)
    gate[torch.argsort(by_layer[cut.layer], stable=True)[: cut.cut]] = 0.0
    return Gates(heads={cut.layer: gate}) if cut.structure == HEADS else Gates(ffn={cut.layer: gate})


def _matrices(checkpoint: Checkpoint, layer: int) -> list[Linear]:
    layers = anatomy_of(checkpoint.model).layers(checkpoint.model)
    return [module for module in layers[layer].modules() if isinstance(module, Linear)]


def _sparse_matrices(checkpoint: Checkpoint, layer: int) -> list[Linear]:
    """Those that pruning to 2:4 would not leave dense."""
    return [module for module in _matrices(checkpoint, layer) if _why_not_sparse(module) is None]


def _why_not_sparse(module: Linear) -> str | None:
    return _TWO_OF_FOUR.why_not(out_features(module), in_features(module))


def _doomed_weights(checkpoint: Checkpoint, cut: Cut) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each weight that loses values, with a mask of its shape that is true where they go: the smallest magnitudes."""
    if cut.structure == SEMI_STRUCTURED:
        pattern: Pattern = _TWO_OF_FOUR
        modules = _sparse_matrices(checkpoint, cut.layer)
    else:
        pattern, modules = Share(cut.cut / cut.units), _matrices(checkpoint, cut.layer)
    for module in modules:
        weight = module.weight.detach()
        sizes = weight.abs() if reduction_axis(module) == 1 else weight.abs().T  # [out, in]
        doomed = ~pattern.keep(sizes)
        yield module.weight, doomed if reduction_axis(module) == 1 else doomed.T


@contextmanager
def _zeroed(doomed: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    saved = [weight.detach().clone() for weight, _ in doomed]
    try:
        with torch.no_grad():
            for weight, mask in doomed:
                weight.masked_fill_(mask, 0)
        yield
    finally:
        with torch.no_grad():
            for (weight, _), before in zip(doomed, saved, strict=True):
                weight.copy_(before)
