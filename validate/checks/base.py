"""What a check of an artifact is, and what it gets to see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from ...backends.registry import backend_of_format
from ...errors import BackendUnavailable, InputError
from ...exporters.inputs import token_stream, vocabulary_of
from ...exporters.kv_cache import POSITIONS
from ...exporters.layer_facts import ProgramFacts
from ...files import read_json
from ...models.batching import Batch, Examples, pad
from ...models.checkpoint import Checkpoint, load_tokenizer
from ..predictions import Predictions, predict
from ..records.report import Check
from ..standard import Standard, examples_for
from ..student import Descent, find_student

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...backends.base import Runner
    from ...exporters.artifact import Manifest

_ROWS = 128
"""Validation rows that the checks run: enough for what they look for, whatever the data's size."""


@dataclass(frozen=True)
class Unchecked:
    """A check that would apply and could not be made."""

    reason: str


@dataclass(frozen=True)
class Subject:
    """An artifact with what it is held against. What is `None` is not at hand; `limbeck verify` has the files alone."""

    folder: Path
    manifest: Manifest
    tokenizer: PreTrainedTokenizerBase
    """The artifact's own."""
    runner: Runner | None = None
    student: Checkpoint | None = None
    """The checkpoint that the artifact was made from."""
    student_missing: str = "its student was not looked for"
    """Why there is no student."""
    standard: Standard | None = None
    """The teacher, the validation rows and its answers to them."""

    @property
    def reference(self) -> Checkpoint | None:
        """Whose tokenizer and labels the artifact's have to be: the student's, else those of a teacher that started
        from the same model."""
        if self.student is not None or self.standard is None:
            return self.student
        teacher = self.standard.teacher
        return teacher if teacher.lineage.origin == self.manifest.lineage.origin else None

    @cached_property
    def examples(self) -> Examples:
        """The first validation rows as the artifact's tokenizer splits them."""
        assert self.standard is not None
        rows = self.standard.data.head(_ROWS)
        return examples_for(self.standard.teacher, rows, self.tokenizer, self.manifest.max_length)

    @cached_property
    def answers(self) -> Predictions:
        """The artifact's answers to `examples`."""
        assert self.standard is not None and self.runner is not None
        return predict(self.runner, self.examples, self.standard.teacher.task, self.tokenizer)

    @cached_property
    def stream(self) -> torch.Tensor:
        """The tokens of `examples` in one row, int64 [tokens], without those that the model has no embedding for (of a
        tokenizer that is not its own)."""
        config = read_json(self.folder / "config.json")
        stream = token_stream([pad(self.examples.features, self.tokenizer)])
        assert stream is not None
        return stream[stream < vocabulary_of(config, self.folder)]

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the program takes."""
        return min(self.manifest.max_length, self.manifest.settings.shapes.max_sequence)

    def program_facts(self) -> ProgramFacts | Unchecked:
        """What the program's files tell of its layers, or why they tell nothing."""
        manifest = self.manifest
        try:
            facts = backend_of_format(manifest.format).program_facts(self.folder, manifest, 1, self.longest)
        except BackendUnavailable as error:
            return Unchecked(error.message)
        return facts or Unchecked(f"the layers of a {manifest.format} artifact are not shown to anybody")

    def batch_of(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Batch:
        """The program's inputs for these token ids, int64 [batch, sequence]; all of them real without a mask."""
        named = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        names = [spec.name for spec in self.manifest.inputs if spec.name != POSITIONS]  # which follow from the mask
        return {name: named.get(name, torch.zeros_like(ids)) for name in dict.fromkeys([*named, *names])}

    def real_tokens(self, batch: int, sequence: int) -> torch.Tensor:
        """Tokens of validation texts, int64 [batch, sequence], repeated where the texts are too short."""
        count = batch * sequence
        return self.stream.repeat(-(-count // len(self.stream)))[:count].reshape(batch, sequence)


def subject_of(
    folder: Path,
    manifest: Manifest,
    runner: Runner | None = None,
    standard: Standard | None = None,
    *,
    student: str | Path | None = None,
    at_hand: Checkpoint | None = None,
) -> Subject:
    """A verified artifact with its student, where that is at hand.

    Args:
        student: where the checkpoint lies that it was made from; where the manifest says when not given.
        at_hand: a loaded checkpoint that may be the one.

    Raises:
        InputError: a `student` that is another checkpoint.
    """
    known = [at_hand, standard.teacher if standard is not None else None]
    own = next((one for one in known if one is not None and one.hash == manifest.parent_hash), None)
    descent = Descent(own) if own is not None and student is None else _descent(manifest, student)
    tokenizer = load_tokenizer(folder)
    return Subject(folder, manifest, tokenizer, runner, descent.student, descent.missing, standard)


def _descent(manifest: Manifest, student: str | Path | None) -> Descent:
    try:
        return find_student(manifest, student)
    except InputError as error:
        if student is not None:
            raise
        return Descent(None, error.message.removesuffix("."))


class SubjectCheck(ABC):
    """One property that an artifact must have. A subclass says in its docstring what it sees, and what it cannot."""

    name: ClassVar[str]
    """Of its line in the report."""
    from_files: ClassVar[bool] = False
    """Nothing is run for it: it is a part of `limbeck verify` as well."""

    @abstractmethod
    def look(self, subject: Subject) -> Check | Unchecked | None:
        """The proof, why there is none, or `None` where the property means nothing (causality of an encoder)."""

    def passes(self, detail: str) -> Check:
        """The property holds."""
        return Check(name=self.name, passed=True, detail=detail)

    def fails(self, detail: str, rows: list[dict[str, str | float | int | bool]] | None = None) -> Check:
        """It does not, and what the cause is."""
        return Check(name=self.name, passed=False, detail=detail, rows=rows or [])


def relative_difference(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest difference of any output, as a share of that output's largest magnitude; infinite where one side has
    NaN or another shape."""
    worst = 0.0
    for name, values in expected.items():
        if name not in found or found[name].shape != values.shape:
            return float("inf")
        scale = float(np.max(np.abs(values), initial=0.0)) or 1.0
        largest = float(np.max(np.abs(found[name] - values), initial=0.0)) / scale
        worst = max(worst, largest if np.isfinite(largest) else float("inf"))
    return worst
