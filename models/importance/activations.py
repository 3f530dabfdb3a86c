"""Importance by what text sends through the model: no gradients, so it costs a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..anatomy import anatomy_of
from ..batching import batches_by_length
from ..checkpoint import Checkpoint
from ..gates import residual_norms
from .base import Calibration, Importance, Scores
from .weights import output_projection, written_squares

Moments = dict[str, torch.Tensor]
"""Means over the real tokens of the examples, float64 on the CPU, by the names they are watched under."""
See = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What to add up, [tokens, ...], of a module's input and output at the real tokens, both [tokens, channels]."""


class Activation(Importance):
    """What a part carries, in the mean over the examples' tokens.

    | part | score |
    |---|---|
    | head | the energy that it writes, `mean |W_h o_h|^2` |
    | feed-forward channel | the energy that it writes, `mean a_c^2 * |down_c|^2` |
    | layer | block influence, `1 - mean cos(in, out)` |
    | residual channel | `sum over norms of mean |norm(x)_c|` |

    Importance from activations alone: Minitron (Muralidharan et al. 2024, "Compact Language Models via Pruning and
    Knowledge Distillation"), whose measure the residual channels have; times the weights that read them: Wanda (Sun et
    al. 2024, "A Simple and Effective Pruning Approach for Large Language Models"), which ranks heads and feed-forward
    channels better. Layers: ShortGPT (see `BlockInfluence`).
    """

    name = "activation"
    needs_data = True

    def _scores(self, checkpoint: Checkpoint, structures: frozenset[str], calibration: Calibration | None) -> Scores:
        assert calibration is not None
        model, anatomy = checkpoint.model, anatomy_of(checkpoint.model)
        size, layers = anatomy.head_size_of(model), anatomy.layers(model)
        observer = Observer()
        for index, layer in enumerate(layers):
            if "heads" in structures:
                observer.watch(layer.get_submodule(anatomy.output), f"heads.{index}", lambda x, _: products(x, size))
            if "ffn" in structures:
                observer.watch(layer.get_submodule(anatomy.down), f"ffn.{index}", lambda x, _: x.square())
            if "layers" in structures:
                observer.watch(layer, f"layers.{index}", cosine)
        if "width" in structures:
            for norm in residual_norms(model, model.base_model):
                observer.watch(norm, "width", lambda _, y: y.abs())
        seen = observer.run(checkpoint, calibration)
        places = range(len(layers))
        return Scores(
            heads=[_energies(output_projection(model, i), seen[f"heads.{i}"]) for i in places]
            if "heads" in structures
            else None,
            ffn=[seen[f"ffn.{i}"] * written_squares(block) for i, block in enumerate(anatomy.ffn(model))]
            if "ffn" in structures
            else None,
            layers=torch.stack([1 - seen[f"layers.{i}"] for i in places]) if "layers" in structures else None,
            width=seen.get("width"),
        )


class BlockInfluence(Importance):
    """`1 - mean cos(in, out)`: how far a layer turns the vectors that pass through it, in the mean over the examples'
    tokens.

    Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect".
    """

    name = "block-influence"
    structures = frozenset({"layers"})
    needs_data = True

    def _scores(self, checkpoint: Checkpoint, structures: frozenset[str], calibration: Calibration | None) -> Scores:
        return Activation()._scores(checkpoint, structures, calibration)


class Observer:
    """Means over real tokens of what passes through a model's modules."""

    def __init__(self) -> None:
        self._watched: list[tuple[nn.Module, str, See]] = []
        self._sums: Moments = {}
        self._real = torch.empty(0)

    def watch(self, module: nn.Module, name: str, see: See) -> None:
        """Add up what `see` makes of a module's input and output; modules under one name are summed."""
        self._watched.append((module, name, see))

    @torch.inference_mode()
    def run(self, checkpoint: Checkpoint, calibration: Calibration) -> Moments:
        """Run the model over the examples."""
        self._sums, tokens = {}, 0
        size, device = calibration.batch_size, checkpoint.model.device
        batches = -(-len(calibration.examples) // size)
        with ExitStack() as hooks:
            for module, name, see in self._watched:
                hooks.callback(module.register_forward_hook(self._hook(name, see), with_kwargs=True).remove)
            pairs = batches_by_length(calibration.examples, checkpoint.tokenizer, size)
            for done, (_, batch) in enumerate(pairs, start=1):
                batch = {name: value.to(device) for name, value in batch.items()}
                self._real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                checkpoint.module(**checkpoint.model_inputs(batch), **checkpoint.task.forward_flags())
                tokens += int(self._real.sum())
                if calibration.progress is not None:
                    calibration.progress(done, batches)
        return {name: total / tokens for name, total in self._sums.items()}

    def _hook(self, name: str, see: See) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, torch.Tensor) else output[0]
            real = self._real.to(after.device)
            seen = see(before[real].float(), after[real].float())
            total = seen.sum(dim=0, dtype=torch.float64).cpu()  # a batch in float32, the whole in float64
            self._sums[name] = self._sums.get(name, torch.zeros(())) + total

        return hook


def cosine(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """[tokens] of [tokens, channels]."""
    return nn.functional.cosine_similarity(before, after, dim=-1)


def products(values: torch.Tensor, size: int) -> torch.Tensor:
    """[tokens, heads * size] -> the products of each head's channels [1, heads, size, size], summed over the tokens."""
    by_head = values.view(len(values), -1, size)
    return torch.einsum("thi,thj->hij", by_head, by_head).unsqueeze(0)


def _energies(output: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """`mean |W_h o_h|^2` [heads], from the output projection [width, heads, size] and the mean products of what goes
    into it [heads, size, size]."""
    return torch.einsum("whi,hij,whj->h", output, context, output)
