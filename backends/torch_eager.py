"""Eager PyTorch in float32: the reference that everything is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..environment import available_cpus
from ..exporters.kv_cache import POSITIONS
from ..models.checkpoint import Checkpoint
from .base import Runner
from .decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EagerRunner(Runner):
    """A checkpoint's module, called as a user of transformers would call it."""

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        self._checkpoint = checkpoint
        torch.set_num_threads(threads or available_cpus())
        self.properties = {
            "runtime": f"torch {torch.__version__} eager",
            "dtype": str(next(checkpoint.module.parameters()).dtype).removeprefix("torch."),
            "threads": str(torch.get_num_threads()),
        }

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return self._checkpoint.run(batch)

    def prepare(self, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
        module = self._checkpoint.module
        inputs = {**self._checkpoint.model_inputs(batch), **self._checkpoint.task.forward_flags()}

        def call() -> object:
            with torch.inference_mode():
                return module(**inputs)

        return call

    def decoder(self) -> Decoder:
        return EagerDecoder(self._checkpoint.model)


class EagerDecoder(Decoder):
    """transformers' own cache, and the model as its `generate` calls it: logits of the last token alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._forward: Callable[..., Any] = model
        accepted = inspect.signature(model.forward).parameters
        self._flags = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = POSITIONS in accepted
        self._cache: Any = None

    def start(self, rows: int) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        device = self._model.device
        inputs = {"input_ids": ids, "attention_mask": mask, **({POSITIONS: positions} if self._positions else {})}
        given = {name: torch.tensor(value, device=device) for name, value in inputs.items()}
        found = self._forward(**given, past_key_values=self._cache, use_cache=True, **self._flags)
        logits: np.ndarray = found.logits[:, -1].float().cpu().numpy()
        return logits

    def cache_bytes(self) -> int:
        kept = [side for layer in self._cache.layers for side in (layer.keys, layer.values)] if self._cache else []
        return sum(side.numel() * side.element_size() for side in kept if side is not None)
