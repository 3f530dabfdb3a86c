"""Sentence embeddings: an encoder with its pooling and normalisation as one module, as sentence-transformers lays
them out on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..files import path_inside, read_json

MODULES_FILE = "modules.json"
_POOLING_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one sentence vector."""

    mode: str = "mean"
    normalize: bool = True
    max_length: int | None = None
    """Tokens a text is cut at (`max_seq_length` of sentence-transformers)."""


def read_pooling(folder: Path) -> Pooling:
    """The pooling of a sentence-transformers folder; mean and normalised where the folder says nothing.

    Raises:
        InputError: a pooling that limbeck does not have.
    """
    if not (folder / MODULES_FILE).exists():
        return Pooling()
    mode, normalize = "mean", False
    for module in read_json(folder / MODULES_FILE):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            mode = _pooling_mode(read_json(path_inside(folder, module["path"]) / "config.json"), folder)
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise InputError(f"{folder} has a {kind} module after its encoder, which limbeck cannot export.")
    length_file = folder / "sentence_bert_config.json"
    max_length = read_json(length_file).get("max_seq_length") if length_file.exists() else None
    return Pooling(mode, normalize, max_length)


def _pooling_mode(config: dict[str, Any], folder: Path) -> str:
    if "pooling_mode" in config:
        modes = [str(config["pooling_mode"])]
    else:
        modes = [
            _POOLING_FLAGS.get(flag, flag) for flag, on in config.items() if flag.startswith("pooling_mode") and on
        ]
    if len(modes) != 1 or modes[0] not in _POOLING_FLAGS.values():
        raise InputError(
            f"{folder} pools by {', '.join(modes) or 'nothing'}; limbeck knows {', '.join(_POOLING_FLAGS.values())}."
        )
    return modes[0]


class SentenceEmbedder(nn.Module):
    """An encoder that ends in a pooled (and normalised) `sentence_embedding`.

    The encoder's unused pooler head is dropped: it would only be dead weight in the exported graph.
    """

    def __init__(self, encoder: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            setattr(encoder, "pooler", None)  # noqa: B010  # mypy knows modules and tensors only
        self.encoder = encoder
        self.pooling = pooling

    @property
    def config(self) -> Any:
        """The encoder's configuration (transformers' exporters read it)."""
        return self.encoder.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
        """int64 [batch, sequence] -> float `sentence_embedding` [batch, width]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        embedding = pool(hidden, attention_mask, self.pooling.mode)
        if self.pooling.normalize:
            embedding = nn.functional.normalize(embedding.float(), dim=-1).to(hidden.dtype)
        return {"sentence_embedding": embedding}


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor, mode: str) -> torch.Tensor:
    """Token vectors [batch, sequence, width] -> [batch, width], padding left out; sums run in float32, since a long
    text's sum overflows float16."""
    if mode == "cls":
        return hidden[:, 0]
    mask = attention_mask.unsqueeze(-1).to(torch.float32)
    if mode == "max":
        return hidden.float().masked_fill(mask == 0, float("-inf")).amax(dim=1).to(hidden.dtype)
    return ((hidden.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)).to(hidden.dtype)
