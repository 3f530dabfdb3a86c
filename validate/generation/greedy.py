"""Greedy text: what a language model writes after a prompt, whatever computes it, and where a candidate's text parts
from its teacher's."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats

from ...backends.rereading import decoder_of
from ...backends.writing import Enough, Writer, WritingSettings
from ...errors import UsageError
from ...models.batching import Run
from ...models.checkpoint import Checkpoint
from ...models.tasks.base import texts_of
from ...models.tasks.language_modeling import TextGeneration
from ..records.report import Metric
from ..statistics.intervals import Interval, bootstrap_interval, wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..standard import Answering, Standard

_DEFAULT_PROMPTS = 20
_FEWEST_PROMPTS = 2
_PIECE = 2000
"""Characters of a row that give one prompt: a row may be a book."""
_PROMPT_TOKENS = 32
_NEW_TOKENS = 32
_BATCH_SIZE = 8
_ENOUGH_FOR_A_MEDIAN = 6
"""Values whose smallest and largest enclose the median with 95 % confidence."""


@dataclass(frozen=True)
class LanguageModel:
    """Whatever computes next-token logits, with the tokenizer it was made for."""

    run: Run
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens that a text may have, what is written included."""

    def write(
        self, prompts: Sequence[Sequence[int]], count: int, enough: Enough = lambda place, written: False
    ) -> list[list[int]]:
        """The likeliest token after each prompt, and so on until there are `count`, the end token is written (and kept)
        or `enough` says so: by the program's cache where it has one, else the whole text is run again for every token.

        Args:
            prompts: token ids, at least one each; with `count` more they fit in `max_length`.

        Raises:
            InputError: a prompt that is empty or too long.
        """
        writer = Writer(decoder_of(self.run), self.tokenizer, self.max_length)
        settings = WritingSettings(max_new_tokens=count)
        written: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))  # little padding
        for start in range(0, len(order), _BATCH_SIZE):
            places = order[start : start + _BATCH_SIZE]
            of_batch = functools.partial(_at_places, enough, places)
            found = writer.texts([prompts[place] for place in places], settings, of_batch)
            for place, tokens in zip(places, found, strict=True):
                written[place] = tokens
        return written


def _at_places(enough: Enough, places: Sequence[int], row: int, written: list[int]) -> bool:
    return enough(places[row], written)


def check_prompts(prompts: int | None, task: str) -> None:
    """Refuse a comparison of texts that cannot be made.

    Raises:
        UsageError: fewer than two prompts, which have no interval, or a task that writes nothing.
    """
    if prompts is None:
        return
    if prompts < 0 or 0 < prompts < _FEWEST_PROMPTS:
        raise UsageError(
            f"{prompts} prompts cannot be compared; generation takes at least {_FEWEST_PROMPTS}, or 0 to leave it out."
        )
    if prompts and task != TextGeneration.name:
        raise UsageError(f"Greedy text is compared for {TextGeneration.name}; this model is for {task}.")


@dataclass(frozen=True)
class Generation:
    """What the teacher writes after a few prompts, which every candidate's text is held against."""

    texts: Sequence[str]
    prompt_tokens: int
    """At most so many tokens of each text, as a side's own tokenizer splits it, are its prompt."""
    written: Sequence[Sequence[int]]
    """The teacher's tokens after each prompt."""
    data_name: str

    def __call__(self, candidate: Answering) -> list[Metric]:
        """Where the candidate's greedy text leaves the teacher's."""
        model = LanguageModel(candidate.run, candidate.tokenizer, candidate.max_length)
        prompts = [_prompt(text, model.tokenizer, self.prompt_tokens) for text in self.texts]
        count = max(len(row) for row in self.written)
        ours = model.write(prompts, count, lambda place, row: row != list(self.written[place][: len(row)]))
        kept = [_shared(*pair) for pair in zip(ours, self.written, strict=True)]
        return divergence_metrics(np.array(kept), np.array([len(row) for row in self.written]), self.data_name)


def set_generation(standard: Standard, prompts: int | None, limit: int) -> Generation | None:
    """The teacher's continuations of the beginnings of some rows (of long ones, of every 2,000 characters), drawn with
    a fixed seed; `None` where the task is another, none were asked for, or fewer than two have tokens.

    Args:
        prompts: how many at most; 20 where not given.
        limit: tokens that every side can hold.
    """
    teacher = standard.teacher
    prompts = _DEFAULT_PROMPTS if prompts is None else prompts
    if teacher.task.name != TextGeneration.name or not prompts:
        return None
    tokens = min(_PROMPT_TOKENS, limit // 2)
    chosen: dict[str, list[int]] = {}
    rows = texts_of(standard.data, "text")
    texts = [text[start : start + _PIECE] for text in rows for start in range(0, len(text), _PIECE)]
    for row in np.random.default_rng(0).permutation(len(texts)):
        if len(chosen) == prompts:
            break
        if prompt := _prompt(texts[row], teacher.tokenizer, tokens):
            chosen[texts[row]] = prompt
    if len(chosen) < _FEWEST_PROMPTS:
        return None
    written = greedy(teacher, list(chosen.values()), min(_NEW_TOKENS, limit - tokens))
    return Generation(list(chosen), tokens, written, standard.data_name)


def _prompt(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """The first tokens of a text, without the end token that some tokenizers add."""
    ids = list(tokenizer(text, truncation=True, max_length=tokens)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


@torch.inference_mode()
def greedy(teacher: Checkpoint, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """What a model finds likeliest after each prompt, token by token, up to its end token and with it, by transformers'
    own `generate`. Whatever else its generation settings ask for: their penalties and samplers would fill what is left
    open. Prompts of one length share a batch, so that no padding is needed.

    Args:
        prompts: token ids, at least one each.
        count: tokens at most.
    """
    from transformers import GenerationConfig

    model, own = teacher.model, teacher.model.generation_config
    end = teacher.tokenizer.eos_token_id
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else end
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=end)
    by_length: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        by_length[len(prompt)].append(place)
    written: list[list[int]] = [[] for _ in prompts]
    try:
        for length, alike in by_length.items():
            for places in (alike[start : start + _BATCH_SIZE] for start in range(0, len(alike), _BATCH_SIZE)):
                ids = torch.tensor([list(prompts[place]) for place in places], device=model.device)
                found = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
                )
                for place, row in zip(places, found[:, length:].tolist(), strict=True):
                    written[place] = _to_the_end(row, ends)
    finally:
        model.generation_config = own
    return written


def _to_the_end(tokens: list[int], ends: int | list[int] | None) -> list[int]:
    known = ends if isinstance(ends, list) else [ends]
    first = next((place for place, token in enumerate(tokens) if token in known), len(tokens))
    return tokens[: first + 1]


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    differs = (place for place, (ours, theirs) in enumerate(zip(left, right, strict=False)) if ours != theirs)
    return next(differs, min(len(left), len(right)))


def divergence_metrics(kept: np.ndarray, lengths: np.ndarray, data: str) -> list[Metric]:
    """How far texts stay together. A prompt is the unit that intervals are over.

    Args:
        kept: int [prompts], tokens before the first that differs.
        lengths: int [prompts], tokens that the teacher wrote.
    """
    same = kept == lengths
    identical = wilson_interval(int(same.sum()), len(same))
    # all alike, a bootstrap would have no width
    shares = identical if same.all() else bootstrap_interval(kept / lengths, lambda rows: float(np.mean(rows)))
    about = f"greedy text of {int(lengths.max())} tokens at most after {len(kept)} prompts"
    told = {
        "generation_agreement": (shares, f"share of the teacher's tokens before the first that differs; {about}"),
        "generation_identical": (identical, f"share of texts that are the teacher's to the end; {about}"),
        "first_divergence": (
            median_interval(kept, int(lengths.max())),
            f"median number of tokens before the first that differs, all of them where none does; {about}",
        ),
    }
    return [
        Metric(
            name=name,
            value=found.point,
            low=found.low,
            high=found.high,
            unit="tokens" if name == "first_divergence" else "",
            count=len(kept),
            higher_is_better=True,
            description=description,
            data=data,
        )
        for name, (found, description) in told.items()
    ]


def median_interval(values: np.ndarray, largest: int) -> Interval:
    """Of a median, by the order statistics whose ranks a fair coin would give: free of the distribution, ties included
    (Conover, Practical Nonparametric Statistics, 3rd edition 1999, section 3.2). Below 6 values it is all there can
    be."""
    ordered, n = np.sort(values), len(values)
    point = float(np.median(ordered))
    if n < _ENOUGH_FOR_A_MEDIAN:
        return Interval(point, 0.0, float(largest), 0.95, "none: too few values")
    rank = int(stats.binom.ppf(0.025, n, 0.5)) - 1
    return Interval(point, float(ordered[rank]), float(ordered[n - 1 - rank]), 0.95, "order statistics")
