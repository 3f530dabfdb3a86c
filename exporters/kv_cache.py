"""A language model traced with its cache of keys and values.

One graph serves every step: it reads a prompt onto an empty cache, and goes on from it token by token. So the weights
are there once, and what is validated on whole texts is the program that writes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import InputError, UsageError, first_line
from ..models.batching import Batch
from ..models.checkpoint import Checkpoint
from ..models.tasks.language_modeling import TextGeneration
from .artifact import CacheFacts, TensorSpec
from .inputs import probe_batch
from .settings import ExportSettings

if TYPE_CHECKING:
    import onnx_ir

PAST = "past_key_values"
"""What the forward of transformers' models calls its cache."""
POSITIONS = "position_ids"
PAST_INPUTS, PRESENT_OUTPUTS = f"input.{PAST}.", f"output.{PAST}."
"""How transformers' exporters name what goes in and what comes out of the cache where it is not state."""
ROWS = "beam_idx"
"""The input of a stateful program that says which row of the cache belongs to which text."""
_TRACED_BATCH, _TRACED_PROMPT = 2, 7
_AXES = 4
"""Keys and values are [batch, heads, read, size]."""
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def keeps_cache(checkpoint: Checkpoint, settings: ExportSettings) -> bool:
    """Whether this export is of a model that writes text, with its cache."""
    return settings.kv_cache and checkpoint.task.name == TextGeneration.name


def require_growing_sizes(settings: ExportSettings) -> None:
    """Refuse static sizes, which a program that is called with a prompt and then with single tokens cannot have.

    Raises:
        UsageError: batch or sequence is fixed.
    """
    shapes = settings.shapes
    if shapes.min_sequence > 1 or shapes.min_batch == shapes.max_batch:
        raise UsageError(
            "A program with a cache of keys and values is given whole prompts and then single tokens, so its sizes "
            "cannot be fixed.",
            "Let --batch and --sequence vary (1:MOST), or add --no-kv-cache: the program then scores texts only.",
        )


@dataclass(frozen=True)
class CachedTrace:
    """What a graph with a cache is traced with: two tokens of two texts, one of them padded on the left, that go on
    from a filled cache."""

    inputs: dict[str, Any]
    """Keyword arguments of the forward."""
    varying: dict[str, Any]
    """Which axes of them vary, as torch.export is told."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> CachedTrace:
        """Let the model write two tokens, and keep what its forward was given.

        Raises:
            InputError: the model has no cache that grows with the text.
        """
        from transformers.exporters.utils import decompose_for_generation

        prompt = probe_batch(checkpoint, _TRACED_BATCH, _TRACED_PROMPT)
        prompt["attention_mask"][0, 0] = 0
        prompt = {name: value.to(checkpoint.model.device) for name, value in prompt.items()}
        try:
            module, given = decompose_for_generation(checkpoint.model, prompt, multi_token_decode=True)["decode"]
        except (RuntimeError, ValueError) as error:
            raise _no_cache(checkpoint, first_line(error.__cause__ or error)) from error
        if given.get(PAST) is None:
            raise _no_cache(checkpoint, "its forward takes no past keys and values")
        inputs = {name: given[name] for name in ("input_ids", "attention_mask", POSITIONS) if name in given}
        cached = {**inputs, PAST: given[PAST], "use_cache": True}
        return cls(cached, _varying(module, inputs, given[PAST]))

    @property
    def _kept(self) -> list[torch.Tensor]:
        return [side for layer in self.inputs[PAST].layers for side in (layer.keys, layer.values)]

    def facts(self, precision: str) -> CacheFacts:
        """What the program keeps of each token, by the shapes of the model's own cache."""
        return CacheFacts(
            precision=precision, values_per_token=sum(kept.shape[1] * kept.shape[3] for kept in self._kept)
        )

    def on_empty_cache(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Whole texts, int64 [batch, sequence] by name, as inputs of the traced graph, to calibrate it on."""
        rows, past = len(batch["input_ids"]), copy.deepcopy(self.inputs[PAST])
        for layer in past.layers:
            for name in ("keys", "values"):
                kept = getattr(layer, name)
                setattr(layer, name, kept.new_zeros(rows, kept.shape[1], 0, kept.shape[3]))
        named = {name: value for name, value in batch.items() if name in self.inputs}
        if POSITIONS in self.inputs:
            named[POSITIONS] = positions_of(batch["attention_mask"])
        return {**named, PAST: past}


def _varying(module: nn.Module, inputs: Mapping[str, torch.Tensor], cache: Any) -> dict[str, Any]:
    """Batch and tokens vary, and the length of what is kept; how they hang together is for the tracer to find out."""
    from torch.utils import _pytree
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    register_cache_pytrees_for_model(module)
    auto = torch.export.Dim.AUTO
    # Layers with a sliding window hold counters beside keys and values [batch, heads, read, size].
    kept = [{0: auto, 2: auto} if leaf.ndim == _AXES else {} for leaf in _pytree.tree_leaves(cache)]
    return {**{name: {0: auto, 1: auto} for name in inputs}, PAST: kept}


def freeze_counters(graph_model: onnx_ir.Model, trace: CachedTrace) -> None:
    """Make constants of what a cache holds beside keys and values (the width of a sliding window): it is the same for
    every text, so no caller need know of it."""
    import onnx_ir
    from transformers.exporters.utils import get_leaf_tensors

    graph, held = graph_model.graph, get_leaf_tensors(trace.inputs)
    for value in [value for value in graph.inputs if value.name and value.name.startswith(PAST_INPUTS)]:
        leaf = held[str(value.name).removeprefix("input.")]
        if leaf.ndim != _AXES:
            graph.inputs.remove(value)
            value.const_value = onnx_ir.tensor(leaf.numpy(), name=value.name)
            graph.register_initializer(value)
    for value in [value for value in graph.outputs if value.name and value.name.startswith(PRESENT_OUTPUTS)]:
        if held[str(value.name).removeprefix("output.")].ndim != _AXES:
            graph.outputs.remove(value)


def _no_cache(checkpoint: Checkpoint, why: str) -> InputError:
    return InputError(
        f"{checkpoint.source} keeps no cache of keys and values that a program could go on from: {why}.",
        "Add --no-kv-cache: the program then scores texts, and writes none.",
    )


def without_cache(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Inputs or outputs that a caller knows of."""
    return [spec for spec in specs if not spec.name.startswith((PAST_INPUTS, PRESENT_OUTPUTS)) and spec.name != ROWS]


def with_rows(batch: Mapping[str, torch.Tensor]) -> Batch:
    """Whole texts, int64 [batch, sequence] by name, as inputs of a stateful program."""
    rows = torch.arange(len(batch["input_ids"]), dtype=torch.int32)
    return {**batch, POSITIONS: positions_of(batch["attention_mask"]), ROWS: rows}


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """The place of each token in its text, int64 [batch, sequence], wherever its padding is; 0 for padding itself."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def feed_whole_texts(inputs: Sequence[Any], batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What an ONNX Runtime session takes, to read whole texts: where it has a cache, an empty one.

    Args:
        inputs: `session.get_inputs()`.
        batch: int64 [batch, sequence] by name.

    Raises:
        InputError: the batch lacks an input.
    """
    past = [spec for spec in inputs if spec.name.startswith(PAST_INPUTS)]
    rows = len(next(iter(batch.values())))
    return {**feed_of(batch, [spec.name for spec in inputs if spec not in past]), **empty_cache(past, rows)}


def empty_cache(past: Sequence[Any], rows: int) -> dict[str, np.ndarray]:
    """The cache of so many texts before anything is read, for inputs of shape [batch, heads, past, size]."""
    return {spec.name: np.zeros((rows, spec.shape[1], 0, spec.shape[3]), _TYPES[spec.type]) for spec in past}


def feed_of(batch: Mapping[str, torch.Tensor], inputs: Sequence[str]) -> dict[str, Any]:
    """The inputs of a program, as NumPy arrays by name; what else is in the batch is left out. The places of tokens in
    their texts follow from the mask.

    Raises:
        InputError: the batch lacks one.
    """
    if POSITIONS in inputs and POSITIONS not in batch and "attention_mask" in batch:
        batch = {**batch, POSITIONS: positions_of(batch["attention_mask"])}
    for name in inputs:
        if name not in batch:
            raise InputError(
                f"The program takes {name}, which the batch does not have: its tokenizer is not the model's.",
                "Give the artifact its own tokenizer: export it again.",
            )
    return {name: batch[name].numpy() for name in inputs}
