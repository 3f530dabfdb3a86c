"""The training set, tokenised once into Arrow on disk and mapped into memory, and the order in which it is seen."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from torch.utils.data import Sampler

from ..errors import InputError
from ..files import read_json, sha256_of_json, staged_folder, write_json
from ..models.batching import Batch, Feature, pad
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.tasks.base import has_content
from .teacher import TEACHER_PREFIX

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_SCHEMA = 1
_TOKENS, _LENGTHS, _SUMMARY = "tokens.arrow", "lengths.npy", "training_data.json"
_TOKEN_TASKS = ("fill-mask", "text-generation")
"""Tasks that predict tokens of a vocabulary: two vocabularies have nothing in common to compare."""


@dataclass
class TrainingData:
    """Examples on disk. The Arrow file is mapped, so its pages are shared by all processes and given back under
    pressure: private memory grows by the few bytes an example of `lengths`."""

    dataset: Dataset
    """The student's inputs, `labels` where there are any, `row` (its own position), and the teacher's inputs under
    `teacher/` where it cannot use the student's."""
    lengths: np.ndarray
    """The student's tokens of each example, int32 [examples]."""
    fingerprint: str
    """SHA-256 over everything that the tokens depend on, as 64 hex digits."""
    max_length: int
    """Tokens that a text was cut at."""
    has_labels: bool
    """Whether anything is labelled: token-classification marks what it scores even where the data has no tags."""
    student: Checkpoint
    teacher: Checkpoint | None
    """Where it has inputs of its own."""
    frozen: bool = False
    """Show every example as in epoch 0: what was computed from it once is then right at every epoch."""
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """What is drawn at random in an example (masks) is drawn anew for this epoch."""
        self.epoch = epoch

    def sampler(self, batch_size: int, seed: int, processes: int = 1) -> LengthGroups:
        """The order in which the examples are seen; it tells this data which epoch it is."""
        return LengthGroups(self.lengths, batch_size, seed, processes, on_epoch=self.set_epoch)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """These examples as one batch."""
        return self.collate(self.dataset.__getitems__([int(row) for row in rows]))

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Examples of `dataset` as a batch, int64 [batch, sequence] each, padded on the right; the teacher's inputs
        have a sequence of their own. `row` [batch] says which they are."""
        rows = [feature["row"] for feature in features]
        ours = [{name: feature[name] for name in feature if _is_students(name)} for feature in features]
        batch = self._padded(ours, rows, self.student)
        if self.teacher is not None:
            theirs = self._padded([_teachers(feature) for feature in features], rows, self.teacher)
            batch |= {TEACHER_PREFIX + name: values for name, values in theirs.items()}
        return {**batch, "row": torch.tensor(rows)}

    def _padded(self, features: list[Feature], rows: list[int], side: Checkpoint) -> Batch:
        epoch = 0 if self.frozen else self.epoch
        drawn = [
            side.task.at_epoch(feature, row, epoch, side.tokenizer) for feature, row in zip(features, rows, strict=True)
        ]
        return pad(drawn, side.tokenizer)


def _is_students(name: str) -> bool:
    return name != "row" and not name.startswith(TEACHER_PREFIX)


def _teachers(feature: Mapping[str, Any]) -> Feature:
    start = len(TEACHER_PREFIX)
    return {name[start:]: value for name, value in feature.items() if name.startswith(TEACHER_PREFIX)}


_PROBE = "The naïve Fox's  ÉCOLE, 東京 & 3.14 – don't\tstop!\n<b>snake_case</b> 🦊"


def same_tokens(student: Checkpoint, teacher: Checkpoint) -> bool:
    """Whether both split text alike, so that one's token ids mean the same to the other: the same vocabulary, and the
    same ids for a text of all kinds of characters."""
    ours, theirs = student.tokenizer, teacher.tokenizer
    if ours is theirs:
        return True
    return bool(ours.get_vocab() == theirs.get_vocab() and ours(_PROBE)["input_ids"] == theirs(_PROBE)["input_ids"])


def tokenise(
    data: Data,
    student: Checkpoint,
    teacher: Checkpoint | None,
    max_length: int,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainingData:
    """Tokenise the rows, some at a time, into `folder`; what is there already for the same rows and tokenizers is used
    as it is, and a second process waits for the first. Rows without text are left out, which is said.

    Args:
        teacher: `None` where nothing is read of a teacher.
        max_length: tokens a text is cut at, within what both sides take; text-generation cuts into windows and drops
            nothing.
        folder: one for any number of training sets; each has a folder of its own in it.
        progress: rows done and rows in all.

    Raises:
        InputError: no rows, none with text, a row that is all padding, a label that the model does not have, or (for
            tasks that predict tokens) a teacher of another vocabulary.
    """
    if len(data) == 0:
        raise InputError(f"{data.source} has no rows.", "Give a data file with at least one row.")
    alike = teacher is None or same_tokens(student, teacher)
    if teacher is not None and not alike and student.task.name in _TOKEN_TASKS:
        raise InputError(
            f"Teacher and student split text differently ({len(teacher.tokenizer)} and {len(student.tokenizer)} "
            f"tokens), so in {student.task.name} there is no token that both could predict.",
            "Draw the student from the teacher, or give it the teacher's tokenizer.",
        )
    length = min(max_length, *(side.max_length for side in (student, teacher) if side is not None))
    # A teacher can be asked about the student's inputs if they are all that it takes (token types may be missing).
    shared = teacher is None or (alike and {*teacher.input_names} <= {*student.tokenizer.model_input_names})
    own_inputs = None if shared else teacher
    key = _key(data, student, own_inputs, length)
    target = folder / key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{target.name}.lock"):
        if not target.is_dir():
            with staged_folder(target) as staging:
                _Writer(data, student, own_inputs, length).write(staging, progress)
    return _open(target, key, length, student, own_inputs)


def _open(folder: Path, key: str, max_length: int, student: Checkpoint, teacher: Checkpoint | None) -> TrainingData:
    from datasets import Dataset

    summary = read_json(folder / _SUMMARY)
    try:
        dataset = Dataset.from_file(str(folder / _TOKENS))
        lengths = np.load(folder / _LENGTHS)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise InputError(f"{folder} holds no training data that can be read: {error}.", "Delete the folder.") from error
    if len(dataset) != len(lengths):
        raise InputError(f"{folder} holds {len(dataset)} examples of {len(lengths)}.", "Delete the folder.")
    return TrainingData(dataset, lengths, key, max_length, summary["has_labels"], student, teacher)


def _key(data: Data, student: Checkpoint, teacher: Checkpoint | None, max_length: int) -> str:
    sides = [
        [_tokenizer_hash(side), side.tokenizer.model_input_names, max_length]
        for side in (student, teacher)
        if side is not None
    ]
    labels = getattr(student.model.config, "label2id", None)
    return sha256_of_json([_SCHEMA, data.exact_hash(), student.task.name, labels, sides])


_USE = ("padding", "truncation", "version")
"""What a tokenizer was last used for: no part of what it is."""


def _tokenizer_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 over how text becomes ids."""
    tokenizer = checkpoint.tokenizer
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if not tokenizer.is_fast:
        return sha256_of_json([type(tokenizer).__name__, special, tokenizer.get_vocab()])
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return sha256_of_json([special, {name: part for name, part in whole.items() if name not in _USE}])


class _Writer:
    """Writes one training set into an empty folder."""

    def __init__(self, data: Data, student: Checkpoint, teacher: Checkpoint | None, max_length: int) -> None:
        self._data, self._student, self._teacher, self._max_length = data, student, teacher, max_length
        self._lengths: list[np.ndarray] = []
        self._left_out = 0
        self._has_labels = student.task.name in _TOKEN_TASKS

    def write(self, folder: Path, progress: Callable[[int, int], None]) -> None:
        examples = 0
        writer: pa.RecordBatchStreamWriter | None = None
        with pa.OSFile(str(folder / _TOKENS), "wb") as file:
            for chunk in self._data.chunks():
                features = self._features(chunk)
                if features:
                    table = _table(features, examples)
                    writer = writer or pa.ipc.new_stream(file, table.schema)
                    writer.write_table(table)
                    self._lengths.append(np.array([len(one["input_ids"]) for one in features], dtype=np.int32))
                    examples += len(features)
                progress(chunk.first_row - self._data.first_row + len(chunk), len(self._data))
            if writer is None:
                raise InputError(f"{self._data.source} holds no text: every row is empty.")
            writer.close()
        if self._left_out:
            said = "1 row without text is" if self._left_out == 1 else f"{self._left_out} rows without text are"
            logger.warning("%s: %s left out", Path(self._data.source).name, said)
        np.save(folder / _LENGTHS, np.concatenate(self._lengths))
        write_json(folder / _SUMMARY, {"schema_version": _SCHEMA, "has_labels": self._has_labels})

    def _features(self, chunk: Data) -> list[Feature]:
        ours = self._examples(chunk, self._student)
        if self._teacher is not None:
            theirs = self._examples(chunk, self._teacher)
            names = self._teacher.input_names
            ours = [
                {**mine, **{TEACHER_PREFIX + name: other[name] for name in names}}
                for mine, other in zip(ours, theirs, strict=True)
            ]
        if self._student.task.name == "text-generation":  # packed: its rows were looked at one by one
            return ours
        rows = len(chunk)  # pairs of sentences are two features a row: all first ones, then all second ones
        kept = [
            one for i, one in enumerate(ours) if has_content(one["input_ids"], self._student.tokenizer, chunk, i % rows)
        ]
        self._left_out += len(ours) - len(kept)
        self._has_labels = self._has_labels or any(np.max(one.get("labels", -1), initial=-1) >= 0 for one in kept)
        return kept

    def _examples(self, chunk: Data, side: Checkpoint) -> list[Feature]:
        return side.task.training_examples(chunk, side.tokenizer, self._max_length, side.model.config).features


def _table(features: Sequence[Feature], first: int) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for name, value in features[0].items():
        kind = pa.list_(pa.int32()) if np.ndim(value) else pa.int64()
        columns[name] = pa.array([feature[name] for feature in features], type=kind)
    columns["row"] = pa.array(np.arange(first, first + len(features), dtype=np.int64))
    return pa.table(columns)


class LengthGroups(Sampler[int]):
    """Positions of examples so that every batch holds texts of like length (little padding) and batches come in random
    order. Trainer's own grouping goes from long to short, over and over: the loss then swings with the length, and
    training ends on nothing but short texts.

    The order depends on seed and epoch alone, so a run that is resumed sees what it would have seen. Examples are
    grouped by the *global* batch, which the loader deals out to the processes: several of them together see the batches
    that one process with the whole batch sees. Every batch is full: the last one is filled up from its neighbours in
    length, so that all processes hold equally many.
    """

    _BATCHES_SORTED_TOGETHER = 50

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        processes: int = 1,
        on_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        """`batch_size` is that of one process; `on_epoch` is told which epoch begins."""
        self._lengths = np.asarray(lengths, dtype=np.int32)
        self._batch, self._seed, self._on_epoch = batch_size * processes, seed, on_epoch
        if processes == 1:
            self._batch = min(self._batch, len(self._lengths))
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next pass is."""
        self._epoch = epoch
        self._on_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._batch) * self._batch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self._seed, self._epoch))
        order = random.permutation(len(self._lengths)).astype(np.int32)
        order = np.resize(order, max(len(order), self._batch))  # fewer examples than one batch of all processes
        batches = np.empty((len(self) // self._batch, self._batch), dtype=np.int32)
        together = self._BATCHES_SORTED_TOGETHER * self._batch
        for start in range(0, len(order), together):
            group = order[min(start, len(order) - self._batch) : start + together]
            group = group[np.argsort(self._lengths[group], kind="stable")]
            for i, place in enumerate(range(0, len(group), self._batch), start=start // self._batch):
                batches[i] = group[min(place, len(group) - self._batch) :][: self._batch]
        for batch in random.permutation(len(batches)):
            yield from batches[batch].tolist()
