"""What a checkpoint or program answers to the validation rows, how good that is, and what it lost to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...models.batching import Run
from ...models.checkpoint import Checkpoint
from ..measurement import quality_of
from ..metrics.comparison import paired_difference
from ..metrics.headline import higher_is_better
from ..predictions import Predictions, Progress, broken, predict
from ..records.report import Loss, Metric
from ..standard import Standard, examples_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answers_of(
    run: Run, of: Checkpoint, max_length: int, standard: Standard, progress: Progress
) -> tuple[Predictions, list[list[int]]]:
    """What a run answers to the rows as a checkpoint's tokenizer splits them, and those tokens."""
    examples = examples_for(standard.teacher, standard.data, of.tokenizer, max_length)
    answers = predict(run, examples, standard.teacher.task, of.tokenizer, progress=progress)
    return answers, [list(feature["input_ids"]) for feature in examples.features]


def longest_of(student: Checkpoint, standard: Standard) -> int:
    """Tokens that a checkpoint's texts are cut at: long texts make the same windows everywhere."""
    return min(student.max_length, standard.max_length or student.max_length)


def tokens_of(standard: Standard, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """The rows as this tokenizer splits them."""
    examples = examples_for(standard.teacher, standard.data, tokenizer, max_length)
    return [list(feature["input_ids"]) for feature in examples.features]


def metrics_of(answers: Predictions, standard: Standard) -> list[Metric]:
    """None where the answers are not numbers, or windows of other lengths make other examples of the rows."""
    if broken(answers) or count_of(answers) != count_of(standard.predictions):
        return []
    return quality_of(answers, standard).metrics


def loss_between(metric: str, before: Predictions, after: Predictions, standard: Standard) -> Loss | None:
    """How much worse the second is than the first, with the interval of the paired difference; `None` where they cannot
    be compared."""
    if broken(before) or broken(after) or count_of(before) != count_of(after):
        return None
    found = paired_difference(metric, [before], [after], standard)
    ends = (found.low, found.high) if higher_is_better(metric) else (-found.high, -found.low)
    return Loss(
        metric=metric, value=found.point if higher_is_better(metric) else -found.point, low=ends[0], high=ends[1]
    )


def count_of(answers: Predictions) -> int:
    """Examples that were answered."""
    return len(next(iter(answers.values())))
