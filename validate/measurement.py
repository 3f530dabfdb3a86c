"""Measuring one candidate: what it answers, how that compares with its teacher, how big it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..backends.torch_eager import EagerRunner
from ..errors import InputError
from ..exporters.artifact import Manifest, artifact_size
from ..models.batching import Examples, Run
from ..models.checkpoint import Checkpoint, load_tokenizer
from ..models.data import Data
from .generation.divergence import BesideTeacher
from .metrics.changed import most_changed
from .metrics.quality import Quality, measure_quality, score
from .predictions import Predictions, Progress, broken, predict
from .records.report import Candidate, Check, Metric
from .slices.measuring import measure_slices
from .standard import Answering, Standard, examples_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLAP_LIMIT = 0.01
"""Share of validation rows that training may have seen before the figures stop meaning anything."""
_MEGABYTE = 1e6


def score_checkpoint(checkpoint: Checkpoint, standard: Standard, batch_size: int = 32) -> dict[str, float]:
    """A checkpoint's metrics by name, without intervals: quick enough to be asked while it trains. Its module is left
    in evaluation mode.

    Raises:
        InputError: too few examples.
    """
    examples = examples_for(standard.teacher, standard.data, checkpoint.tokenizer, checkpoint.max_length)
    checkpoint.module.eval()  # it may be in the middle of its training
    answers = predict(checkpoint.run, examples, checkpoint.task, checkpoint.tokenizer, batch_size=batch_size)
    return scores_of(answers, standard)


def score_run(run: Run, standard: Standard) -> dict[str, float]:
    """The same of whatever computes a batch's outputs, on the examples as the standard's tokenizer splits them.

    Raises:
        InputError: too few examples.
    """
    teacher = standard.teacher
    examples = examples_for(teacher, standard.data, teacher.tokenizer, standard.max_length or teacher.max_length)
    return scores_of(predict(run, examples, teacher.task, teacher.tokenizer), standard)


def scores_of(answers: Predictions, standard: Standard) -> dict[str, float]:
    """The metrics of a run's answers by name, without intervals."""
    return score(
        standard.teacher.task.name,
        standard.predictions,
        answers,
        standard.references,
        label_names=standard.label_names,
        pairs=standard.pairs,
    )


def require_same_task(folder: Path, manifest: Manifest, teacher: Checkpoint) -> None:
    """Refuse an artifact that serves another task than its teacher.

    Raises:
        InputError: it does.
    """
    if manifest.task != teacher.task.name:
        raise InputError(
            f"{folder} is for {manifest.task}, and the teacher is for {teacher.task.name}: they cannot be compared."
        )


def describe_artifact(name: str, folder: Path, manifest: Manifest) -> Candidate:
    """A compiled artifact as its folder describes it, before anything is run."""
    record = Candidate(
        name=name,
        kind="artifact",
        backend=manifest.format,
        precision=manifest.settings.precision
        + (f", {manifest.settings.sparsity}" if manifest.settings.sparsity else ""),
        path=folder.name,
        artifact_id=manifest.artifact_id,
        parameters=manifest.parameters,
        size_bytes=artifact_size(folder),
        unverified=manifest.unverified,
        checks=[Check(**check.model_dump()) for check in manifest.checks],
    )
    return record.model_copy(update={"metrics": [_size_metric(record)]})


def measure_artifact(
    name: str, folder: Path, manifest: Manifest, run: Run, standard: Standard, progress: Progress
) -> tuple[Candidate, Predictions]:
    """A compiled artifact, run with the tokenizer that it ships, and what it answers.

    Raises:
        InputError: it serves another task than the teacher.
    """
    require_same_task(folder, manifest, standard.teacher)
    record = describe_artifact(name, folder, manifest)
    asked = _Asked(run, load_tokenizer(folder), manifest.max_length, standard, progress)
    candidate, answers = _with_quality(record, asked, standard)
    return candidate.model_copy(update={"metrics": [*candidate.metrics, *record.metrics]}), answers


def measure_checkpoint(name: str, checkpoint: Checkpoint, standard: Standard, progress: Progress) -> Candidate:
    """A checkpoint in eager torch."""
    candidate = Candidate(
        name=name,
        kind="checkpoint",
        backend="torch",
        precision="fp32",
        path=Path(checkpoint.source).name,
        checkpoint_hash=checkpoint.hash,
        parameters=checkpoint.parameters,
    )
    run = EagerRunner(checkpoint, torch.get_num_threads())
    asked = _Asked(run, checkpoint.tokenizer, checkpoint.max_length, standard, progress)
    return _with_quality(candidate, asked, standard)[0]


def describe_teacher(teacher: Checkpoint) -> Candidate:
    """The teacher's own record; its metrics stand beside each candidate's as `Metric.teacher`."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in teacher.module.parameters())
    record = Candidate(
        name="teacher",
        kind="teacher",
        backend="torch",
        precision="fp32",
        path=Path(teacher.source).name,
        checkpoint_hash=teacher.hash,
        parameters=teacher.parameters,
        size_bytes=size,
    )
    return record.model_copy(update={"metrics": [_size_metric(record)]})


@dataclass(frozen=True)
class _Asked:
    """A candidate that answers to rows, split by its own tokenizer."""

    run: Run
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    standard: Standard
    progress: Progress

    def __call__(self, rows: Data | Examples) -> Predictions:
        teacher, cut = self.standard.teacher, self.standard.max_length or self.max_length
        if not isinstance(rows, Examples):
            rows = examples_for(teacher, rows, self.tokenizer, min(self.max_length, cut))
        run = BesideTeacher(self.run, teacher.run) if teacher.task.name == "text-generation" else self.run
        return predict(run, rows, teacher.task, self.tokenizer, progress=self.progress)


def _with_quality(candidate: Candidate, answer: _Asked, standard: Standard) -> tuple[Candidate, Predictions]:
    answers = answer(standard.data)
    if broken(answers):
        check = Check(name="finite outputs", passed=False, detail=f"{candidate.name} answers with NaN or infinity")
        return candidate.model_copy(update={"checks": [*candidate.checks, check]}), answers
    quality = quality_of(answers, standard)
    slices, checks = measure_slices(standard, answers, answer)
    answering = Answering(candidate.name, answer.run, answer.tokenizer, answer.max_length, answers)
    found = {
        "metrics": [*quality.metrics, *(metric for observe in standard.observers for metric in observe(answering))],
        "reliability": quality.reliability,
        "temperature": quality.temperature,
        "slices": slices,
        "changed": most_changed(standard, answers),
        "checks": [*candidate.checks, *checks],
    }
    return candidate.model_copy(update=found), answers


def quality_of(answers: Predictions, standard: Standard) -> Quality:
    """Every metric of a run's answers with its interval.

    Raises:
        InputError: too few examples.
    """
    return measure_quality(
        standard.teacher.task.name,
        standard.predictions,
        answers,
        standard.references,
        standard.data_name,
        label_names=standard.label_names,
        pairs=standard.pairs,
    )


def _size_metric(candidate: Candidate) -> Metric:
    return Metric(
        name="size_mb",
        value=(candidate.size_bytes or 0) / _MEGABYTE,
        unit="MB",
        higher_is_better=False,
        description="weights, graph, tokenizer and manifest on disk",
    )


def check_overlap(data: Data, training_rows: set[str], where: str = "") -> Check:
    """How many validation rows the artifact's training has seen, by row hashes: a figure on those says nothing."""
    seen = sum(row in training_rows for row in data.row_hashes)
    share = seen / len(data)
    return Check(
        name=f"unseen data{where}",
        passed=share <= OVERLAP_LIMIT,
        detail=f"{seen} of {len(data)} validation rows were also trained on ({share:.1%}, limit {OVERLAP_LIMIT:.0%})",
    )
