"""A checkpoint or artifact as a model of EleutherAI's lm-evaluation-harness.

`validate --harness` makes its models here. The harness finds models by import and has no entry points for them, so its
own command line is reached through this module, which registers `limbeck` first:

    python -m limbeck.validate.generation.harness_model run --model limbeck --model_args pretrained=FOLDER --tasks piqa
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from scipy.special import log_softmax

from ...errors import InputError, UsageError
from ...models.batching import Examples, batches_by_length
from .greedy import LanguageModel

logger = logging.getLogger(__name__)

_BATCH_SIZE = 8
_NEW_TOKENS = 256
"""The harness's own default of how many tokens a task may have written."""
Scored = tuple[Any, list[int], list[int]]
"""What the harness asked for, the tokens of the context, and those of the continuation."""


@register_model("limbeck")
class LimbeckLM(TemplateLM):
    """Log-likelihoods by forwards of whole texts, and greedy text by the cache of a program that has one.

    Args:
        pretrained: folder of an artifact or a checkpoint for text-generation, or a model that is loaded already.
        max_length: tokens of context; the model's own where not given.
        batch_size: texts a forward; `auto` is 8.
        max_batch_size, device: taken because the harness gives them; an artifact runs where it was compiled for.

    Raises:
        InputError: no such folder, or it is for another task.
        UsageError: a device other than the CPU.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if device not in (None, "cpu"):
            raise UsageError(f"limbeck does not move a model to {device}: an artifact runs where it was compiled for.")
        model = pretrained if isinstance(pretrained, LanguageModel) else open_language_model(Path(pretrained))
        self._model = model
        self.tokenizer = model.tokenizer
        self.max_length = min(max_length or model.max_length, model.max_length)
        self._batch_size = int(batch_size) if batch_size and str(batch_size) != "auto" else _BATCH_SIZE
        self.progress: Callable[[int, int], None] = lambda done, total: None

    @property
    def eot_token_id(self) -> int:
        """The end token, or the beginning one where there is no other."""
        return _first([self.tokenizer.eos_token_id, self.tokenizer.bos_token_id])

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: the beginning token, or the end token."""
        return _first([self.tokenizer.bos_token_id, self.tokenizer.eos_token_id])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them unless told."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **special)["input_ids"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the harness's own, without its bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood (nats) of whole texts, in windows of `max_length` of which each token is scored once."""
        windows: list[Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of each continuation after its context: the log-likelihood (nats), and whether it is the greedy one. Answers
        to one question share a forward where they differ in their last token only."""
        places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise InputError(
                    f"A continuation of {len(continuation)} tokens is longer than the model's {self.max_length}."
                )
            places[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(place)
        self._say_cut([len(context) + len(continuation) - 1 for _, context, continuation in requests])
        inputs = list(places)
        examples = Examples([{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in inputs])
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for positions, batch in batches_by_length(examples, self.tokenizer, self._batch_size):
            logits = np.asarray(self._model.run(batch)["logits"])
            for row, position in zip(logits, positions, strict=True):
                ids = inputs[position]
                for place in places[ids]:
                    found[place] = _scored(row[: len(ids)], requests[place][2])
            done += len(positions)
            self.progress(done, len(inputs))
        for (asked, _, _), answer in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy text after each context, which is cut on the left to leave room for it, up to the first stop.

        Raises:
            InputError: a task that samples, or wants more tokens than the model has.
        """
        wishes = [self._wishes(request.args[1]) for request in requests]
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        self._say_cut([len(prompt) + count for prompt, (count, _) in zip(prompts, wishes, strict=True)])
        written: list[list[int]] = [[] for _ in requests]
        for wanted in sorted({count for count, _ in wishes}):
            places = [place for place, (count, _) in enumerate(wishes) if count == wanted]
            for place, tokens in zip(places, self._write(places, wanted, prompts, wishes), strict=True):
                written[place] = tokens
        texts = [
            postprocess_generated_text(self._decode(row), stops, None)
            for row, (_, stops) in zip(written, wishes, strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _write(
        self, places: list[int], count: int, prompts: list[list[int]], wishes: list[tuple[int, list[str]]]
    ) -> list[list[int]]:
        """What follows these of the prompts, for which the same number of tokens is wanted."""

        def enough(row: int, written: list[int]) -> bool:
            return any(stop in self._decode(written) for stop in wishes[places[row]][1] if stop)

        kept = [prompts[place][-(self.max_length - count) :] for place in places]
        return self._model.write(kept, count, enough)

    def _wishes(self, asked: dict[str, Any]) -> tuple[int, list[str]]:
        """How many tokens a request wants, and what stops it."""
        wanted = normalize_gen_kwargs(asked, _NEW_TOKENS)
        if wanted["do_sample"]:
            raise InputError("The task samples its text, and a limbeck model writes greedily.", "Set do_sample: false.")
        count = wanted["max_gen_toks"]
        if count >= self.max_length:
            raise InputError(
                f"The task wants {count} new tokens, and the model has room for {self.max_length} in all.",
                "Set max_gen_toks in the task's generation_kwargs.",
            )
        return count, handle_stop_sequences(wanted["until"], eos=self.tokenizer.eos_token)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _say_cut(self, lengths: list[int]) -> None:
        cut = sum(length > self.max_length for length in lengths)
        if cut:
            logger.warning("%d of %d texts lost their beginning: over %d tokens", cut, len(lengths), self.max_length)


def open_language_model(folder: Path) -> LanguageModel:
    """An artifact or checkpoint for text-generation.

    Raises:
        InputError: no such folder, or it is for another task.
    """
    from ...backends.registry import load_runner
    from ...backends.torch_eager import EagerRunner
    from ...exporters.artifact import MANIFEST_FILE, read_manifest
    from ...models.checkpoint import load_checkpoint, load_tokenizer

    if not (folder / MANIFEST_FILE).exists():
        checkpoint = load_checkpoint(folder)
        _check_task(folder, checkpoint.task.name)
        return LanguageModel(EagerRunner(checkpoint), checkpoint.tokenizer, checkpoint.max_length)
    _check_task(folder, read_manifest(folder).task)
    runner, manifest = load_runner(folder)
    return LanguageModel(runner, load_tokenizer(folder), manifest.max_length)


def _check_task(folder: Path, task: str) -> None:
    if task != "text-generation":
        raise InputError(f"{folder} is for {task}; the lm-evaluation-harness asks for text-generation.")


def _first(ids: list[int | None]) -> int:
    found = next((token for token in ids if token is not None), None)
    if found is None:
        raise InputError("The tokenizer has no beginning and no end token, so a text without context has no start.")
    return int(found)


def _scored(logits: np.ndarray, continuation: list[int]) -> tuple[float, bool]:
    """Of logits [tokens, vocabulary], the last ones of which predict the continuation."""
    last = logits[-len(continuation) :]
    values = log_softmax(last.astype(np.float64), axis=-1)[np.arange(len(continuation)), continuation]
    return float(values.sum()), bool((last.argmax(axis=-1) == continuation).all())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
