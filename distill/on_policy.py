"""Text that the student wrote itself: it is trained where its own mistakes lead it, not on others' text alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..models.batching import IGNORED_LABEL, Batch, padding_id
from ..models.checkpoint import Checkpoint
from .settings import OnPolicy


@dataclass(frozen=True)
class OnPolicyText:
    """Replaces batches by the student's continuations of their beginnings (GKD, Agarwal et al. 2024; MiniLLM, Gu et al.
    2024). No gradient flows through the sampling, as in GKD.

    Raises:
        UsageError: a task other than text-generation.
    """

    student: Checkpoint
    settings: OnPolicy
    seed: int

    def __post_init__(self) -> None:
        if self.student.task.name != "text-generation":
            raise UsageError(f"on_policy needs a model that writes text; {self.student.task.name} does not.")

    def replace(self, batch: Batch, step: int) -> Batch:
        """The batch itself, or (in `share` of the steps, the same ones at every run) one that the student continues.

        int64 [batch, sequence] -> int64 [batch, prompt_tokens + new_tokens], with labels at the new tokens only.
        """
        if random.Random(f"{self.seed}/{step}").random() >= self.settings.share:
            return batch
        prompt = batch["input_ids"][:, : self.settings.prompt_tokens]
        mask = batch["attention_mask"][:, : self.settings.prompt_tokens]
        written = self._continue(prompt, mask)
        new = written[:, prompt.shape[1] :]
        ended = _after_end(new, self.student.tokenizer.eos_token_id)
        own_mask = torch.cat([mask, (~ended).to(mask.dtype)], dim=1)
        labels = torch.cat([torch.full_like(prompt, IGNORED_LABEL), new.masked_fill(ended, IGNORED_LABEL)], dim=1)
        kept = {name: batch[name] for name in ("row",) if name in batch}
        return {**kept, "input_ids": written, "attention_mask": own_mask, "labels": labels}

    @torch.no_grad()
    def _continue(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        model = self.student.model
        was_training = model.training
        model.eval()
        written: torch.Tensor = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            do_sample=True,
            temperature=self.settings.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.settings.new_tokens,
            pad_token_id=padding_id(self.student.tokenizer),
        )
        model.train(was_training)
        return written


def _after_end(tokens: torch.Tensor, end: int | None) -> torch.Tensor:
    """Which positions come after a row's first end token, bool [batch, tokens]."""
    if end is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    seen = (tokens == end).cumsum(dim=1) > 0
    return torch.cat([torch.zeros_like(seen[:, :1]), seen[:, :-1]], dim=1)
