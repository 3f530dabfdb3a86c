"""What every candidate is held against: the teacher's answers on the validation rows, and on slices of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..models.batching import Examples, Run
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from .predictions import Predictions, Progress, predict
from .records.report import Metric, SliceKind
from .rows.pairs import PairRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Standard:
    """What every candidate is held against: the teacher's own answers on one data set."""

    teacher: Checkpoint
    data: Data
    references: np.ndarray | None
    predictions: Predictions
    pairs: bool = False
    """The examples are pairs of texts."""
    max_length: int | None = None
    """Tokens that texts are cut at; the teacher's own limit where not given."""
    rows: np.ndarray = field(default_factory=lambda: np.arange(0))
    """The row of the data, counted from 0, that each example is from."""
    slices: tuple[SliceStandard, ...] = ()
    """Parts of the data, and data beside them, that candidates are measured on as well (see
    `slices.choosing.with_slices`)."""
    observers: tuple[Observer, ...] = ()
    """What else is to be learnt of a candidate once it has answered."""

    @property
    def data_name(self) -> str:
        """The data set's name in the report."""
        return Path(self.data.source).name

    @property
    def label_names(self) -> list[str]:
        """The labels in the order of their ids; made up by transformers where none are named."""
        names = self.teacher.model.config.id2label or {}
        return [str(names[index]) for index in sorted(names)]


@dataclass(frozen=True)
class SliceStandard:
    """What every candidate is held against on one slice: the teacher's answers there, asked once."""

    name: str
    kind: SliceKind
    standard: Standard
    positions: np.ndarray | None = None
    """Which of the whole's examples these are; `None` where the slice has rows of its own, which have to be run."""
    tokens: tuple[slice, ...] | None = None
    """Which of the tokens that are scored of each of these examples; all where not given."""
    together: PairRows | None = None
    """Which of its rows belong together, where that is what it is about."""
    examples: Examples | None = None
    """Its rows in tokens, where these are given and not what a candidate's tokenizer makes of them."""

    def part_of(self, answers: Predictions) -> Predictions:
        """Its part of the answers to the whole, where it has `positions`."""
        return part_of(answers, self.positions, self.tokens)

    @property
    def count(self) -> int:
        """Examples: a pair of texts is one, and so are rows that belong together."""
        if self.together is not None:
            return len(self.together.groups)
        return len(self.standard.rows) // (2 if self.standard.pairs else 1)


def part_of(answers: Predictions, positions: np.ndarray | None, tokens: Sequence[slice] | None = None) -> Predictions:
    """The answers to some examples, int64 [examples]; of each only those to some of its tokens, where these are
    given."""
    found = {name: values[positions] for name, values in answers.items()}
    for values in found.values():
        for row, some in enumerate(tokens or ()):
            values[row] = values[row][some]
    return found


@dataclass(frozen=True)
class Answering:
    """A candidate that has answered all rows, and may be asked more."""

    name: str
    run: Run
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    answers: Predictions


Observer = Callable[[Answering], list[Metric]]
"""Told each candidate, says what metrics it adds."""


def examples_for(task_of: Checkpoint, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
    """The rows as a candidate's own tokenizer splits them."""
    return task_of.task.examples(data, tokenizer, max_length, task_of.model.config)


def set_standard(
    teacher: Checkpoint,
    data: Data,
    run: Run | None = None,
    *,
    max_length: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Standard:
    """Run the teacher (eager torch unless `run` is another way to it) over the data."""
    examples = examples_for(teacher, data, teacher.tokenizer, max_length or teacher.max_length)
    answers = predict(run or teacher.run, examples, teacher.task, teacher.tokenizer, progress=progress)
    return Standard(teacher, data, examples.references, answers, examples.pairs, max_length, examples.rows)
