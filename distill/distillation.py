"""Distillation as a whole: bind the objectives, train the student against its teacher, write down how it went."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback

from ..environment import is_importable
from ..errors import BackendUnavailable, InputError, UsageError
from ..models.anatomy import ANATOMIES, anatomy_of
from ..models.batching import Batch
from ..models.checkpoint import Checkpoint
from ..models.data import Data
from ..models.features import showing_attention
from ..models.lineage import Curve, DataRecord, LayerSimilarity, Step
from .callbacks import KeepZeros, LiveTrace, Modification, Modifier, Progress, ProgressCallback
from .launch import is_main
from .module import Distillation, TeacherViews, Term, bind, shape_of, student_features, teacher_features
from .objectives import DEFAULT_OBJECTIVES, OBJECTIVES, build_objectives
from .objectives.base import Objective, Outputs, Sides
from .on_policy import OnPolicyText
from .settings import DistillSettings
from .similarity import layer_similarity
from .teacher import TeacherCall, eager_teacher
from .teacher_cache import CacheKey, cached_teacher
from .trainer import DistillationTrainer, Evaluation, training_arguments
from .training_data import TrainingData, same_tokens, tokenise
from .work_folder import newest_checkpoint, work_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Runtime = Callable[[Checkpoint], AbstractContextManager[TeacherCall]]
"""A teacher that records features -> its outputs, for as long as the context is open."""

_TOKENS_A_CHANNEL = 8
"""Layers are compared on so many times the tokens that they have channels: with fewer, everything looks alike."""
_SIMILARITY_NUMBERS = 2**28
"""The most products of channels that the comparison of layers may hold: models beyond it are trained without."""
_TRACKERS = {"tensorboard": "tensorboard", "mlflow": "mlflow"}


@contextmanager
def eager(teacher: Checkpoint) -> Iterator[TeacherCall]:
    """The teacher in torch, as it is."""
    yield eager_teacher(teacher)


@dataclass(frozen=True)
class Surroundings:
    """What a distillation is given beside its settings."""

    teacher_runtime: Runtime = eager
    teacher_cache: Path | None = None
    """A folder that keeps the teacher's outputs for the next run on the same data."""
    evaluation: Evaluation | None = None
    work: Path | None = None
    """Where checkpoints to resume from are kept while training goes on; none when not given."""
    report_to: Sequence[str] = ()
    """`tensorboard`, `mlflow`."""
    modification: Modification | None = None
    """What else happens to the student while it trains; nothing else here changes what it becomes."""
    rationale: str | None = None
    progress: Progress = field(default=lambda done, total: None)


def distill(
    student: Checkpoint,
    teacher: Checkpoint,
    settings: DistillSettings,
    data: Data,
    around: Surroundings | None = None,
) -> Checkpoint:
    """Train `student` in place against `teacher` on `data`, and return it with its history.

    Raises:
        InputError: data that cannot be used, models that do not fit each other, another run's checkpoints in `work`,
            or a loss that diverges.
        UsageError: objectives or settings that do not fit the task, the models or the data.
    """
    around = around or Surroundings()
    key = {
        "student": student.hash,
        "teacher": teacher.hash,
        "data": data.fingerprint,
        "settings": settings.model_dump(),
        "modification": dict(around.modification.settings) if around.modification is not None else None,
    }
    with work_folder(around.work, key) as folder:
        return _Run(student, teacher, settings, data, around, folder).result()


@dataclass
class _Run:
    """One distillation, in the order in which things are decided."""

    student: Checkpoint
    teacher: Checkpoint
    settings: DistillSettings
    data: Data
    around: Surroundings
    folder: Path

    def result(self) -> Checkpoint:
        started = time.monotonic()
        _refuse_trackers(self.around.report_to)
        weights = self.settings.objectives or DEFAULT_OBJECTIVES[self.student.task.name]
        taught = any(name not in OBJECTIVES or OBJECTIVES[name].needs_teacher for name in weights)
        rows = self._tokenise(self.teacher if taught else None)
        asked = build_objectives(weights, self.student.task, rows.has_labels)
        if taught and not same_tokens(self.student, self.teacher):
            _refuse_other_tokens(asked, self.student, self.teacher)
        before = self._similarity(rows) if taught else None
        terms = bind(asked, self._sides(before), self.settings.seed)
        trained, curves, note = self._train(terms, rows)
        after = self._similarity(rows) if before is not None else None
        similarity = None
        if before is not None and after is not None:
            similarity = LayerSimilarity(before=before.tolist(), after=after.tolist())
        method, given = " + ".join(weights), {**self.settings.model_dump(mode="json"), "objectives": dict(weights)}
        if (change := self.around.modification) is not None:
            method, given[change.name] = f"{method}, {change.summary}", dict(change.settings)
        step = Step(
            verb="distill",
            method=method,
            settings=given,
            rationale=self.around.rationale,
            parent=self.student.hash,
            teacher=self.teacher.hash if taught else None,
            data=DataRecord.of(self.data),
            seconds=round(time.monotonic() - started, 1),
            curves=curves,
            similarity=similarity,
            note=note,
        )
        learnt = self.student.after(trained, step, self.data)
        return replace(learnt, terms=self.student.terms.joined_by(self.teacher.terms)) if taught else learnt

    def _tokenise(self, teacher: Checkpoint | None) -> TrainingData:
        length = min(self.settings.max_length or self.student.max_length, self.student.max_length)
        return tokenise(self.data, self.student, teacher, length, self.folder / "tokens")

    def _sides(self, similarity: np.ndarray | None) -> Sides:
        def measured() -> np.ndarray:
            if similarity is None:
                raise UsageError(
                    "The layer map 'similar' needs models whose layers can be compared here.",
                    "Take `uniform`, `last`, or name the pairs.",
                )
            return similarity

        return Sides(shape_of(self.student), shape_of(self.teacher), measured)

    def _similarity(self, rows: TrainingData) -> np.ndarray | None:
        """What the student's layers have in common with the teacher's, on the first texts; `None` where the
        architecture is not known or the comparison would take too much memory."""
        sides = (self.student, self.teacher)
        if any(side.model.config.model_type not in ANATOMIES for side in sides):
            return None
        channels = [len(anatomy_of(side.model).layers(side.model)) * side.model.config.hidden_size for side in sides]
        if channels[0] * channels[1] > _SIMILARITY_NUMBERS:
            return None
        tokens = _TOKENS_A_CHANNEL * max(side.model.config.hidden_size for side in sides)
        return layer_similarity(self.student, self.teacher, _first_batches(rows, self.settings.batch_size, tokens))

    def _train(self, terms: Sequence[Term], rows: TrainingData) -> tuple[PreTrainedModel, list[Curve], str | None]:
        """Train, with everything that the student must get back afterwards put back: the trained model, the curves,
        and what the modifier has to say."""
        settings, student = self.settings, self.student
        recorded = self.teacher.recording(teacher_features(terms))
        with ExitStack() as stack:
            for side, features in ((student, student_features(terms)), (self.teacher, recorded.recorded)):
                if any(name.startswith("attention.") for name in features):
                    stack.enter_context(showing_attention(side.model))
            stack.enter_context(_without_dropout(student.module))
            stack.enter_context(_learning(student, settings))
            modifier = self.around.modification.start(student) if self.around.modification is not None else None
            teacher = self._teacher(recorded, terms, rows, stack)
            module = Distillation(student, terms)
            whole = copy.deepcopy(student.model) if os.environ.get("ACCELERATE_USE_FSDP") == "true" else student.model
            trainer = self._trainer(module, teacher, rows, modifier)
            trainer.train(resume_from_checkpoint=newest_checkpoint(self.folder) if self.around.work else None)
            trainer.put_weights_into(whole)
        whole.to("cpu").requires_grad_(True).eval()
        return whole, trainer.curves(), modifier.note() if modifier is not None else None

    def _teacher(
        self, recorded: Checkpoint, terms: Sequence[Term], rows: TrainingData, stack: ExitStack
    ) -> Callable[[Batch], Outputs] | None:
        """What the objectives read of the teacher, computed batch by batch or read from its cache."""
        if not any(term.objective.needs_teacher for term in terms):
            return None

        def views() -> TeacherViews:
            return TeacherViews(stack.enter_context(self.around.teacher_runtime(recorded)), terms, recorded)

        if self.around.teacher_cache is None:
            return views()
        if self.settings.on_policy is not None:
            raise UsageError(
                "A teacher's cache cannot answer for text that the student is yet to write.",
                "Leave out the cache, or on_policy.",
            )
        key = CacheKey.of(recorded, rows, terms)
        return cached_teacher(self.around.teacher_cache, key, views, rows, self.around.progress)

    def _trainer(
        self,
        module: Distillation,
        teacher: Callable[[Batch], Outputs] | None,
        rows: TrainingData,
        modifier: Modifier | None,
    ) -> DistillationTrainer:
        settings, around = self.settings, self.around
        callbacks: list[TrainerCallback] = [KeepZeros(self.student.module)]
        if modifier is not None:
            callbacks.append(modifier.callback)
        if is_main():
            callbacks.append(ProgressCallback(around.progress))
        if around.work is not None:
            callbacks.append(LiveTrace(self.folder / "trace.jsonl"))
        if settings.patience is not None:
            if around.evaluation is None:
                raise UsageError("patience needs data to measure on.", "Give --eval-data, or leave --patience out.")
            callbacks.append(EarlyStoppingCallback(settings.patience))
        own_text = None
        if settings.on_policy is not None:
            own_text = OnPolicyText(self.student, settings.on_policy, settings.seed)
        arguments = training_arguments(
            settings,
            len(rows),
            self.folder,
            evaluation=around.evaluation,
            keep=around.work is not None,
            report_to=around.report_to,
            inner_only=all(term.pairs for term in module.terms),
        )
        return DistillationTrainer(
            module=module,
            teacher=teacher,
            args=arguments,
            data=rows,
            evaluation=around.evaluation,
            on_policy=own_text,
            modifier=modifier,
            callbacks=callbacks,
        )


def _refuse_other_tokens(objectives: Sequence[Objective], student: Checkpoint, teacher: Checkpoint) -> None:
    bound = [objective.name for objective in objectives if objective.compares_tokens(student.task)]
    if bound:
        raise InputError(
            f"Teacher and student split text differently ({len(teacher.tokenizer)} and {len(student.tokenizer)} "
            f"tokens), so {', '.join(bound)} would compare different words.",
            "Draw the student from the teacher, or match whole texts only: embedding-cosine, pairwise-similarity, "
            "relational, contrastive, queue-similarity; logits-kl for text-classification.",
        )


def _refuse_trackers(names: Sequence[str]) -> None:
    for name in names:
        if name not in _TRACKERS:
            raise UsageError(f"There is no tracker {name!r} to report to; there are {', '.join(_TRACKERS)}.")
        if not is_importable(_TRACKERS[name]):
            raise BackendUnavailable(f"{name} is not installed.", 'pip install "limbeck[tracking]"')


def _first_batches(rows: TrainingData, size: int, tokens: int) -> Iterator[Batch]:
    enough = int(np.searchsorted(np.cumsum(rows.lengths), tokens)) + 1
    count = min(enough, len(rows))
    for start in range(0, count, size):
        yield rows.batch(range(start, min(start + size, count)))


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """A student this small, trained this briefly, underfits: dropout would only add noise to its targets."""
    dropouts = [(part, part.p) for part in module.modules() if isinstance(part, nn.Dropout)]
    for part, _ in dropouts:
        part.p = 0.0
    try:
        yield
    finally:
        for part, probability in dropouts:
            part.p = probability


@contextmanager
def _learning(student: Checkpoint, settings: DistillSettings) -> Iterator[None]:
    """Only what is meant to learn does, and activations are kept or computed twice as asked.

    Raises:
        UsageError: `train_layers` names a layer that the student does not have.
    """
    model = student.model
    if settings.train_layers is not None:
        layers = anatomy_of(model).layers(model)
        wrong = [index for index in settings.train_layers if not 0 <= index < len(layers)]
        if wrong or not settings.train_layers:
            raise UsageError(f"train_layers names {settings.train_layers}; the student has 0 to {len(layers) - 1}.")
        model.requires_grad_(False)
        for index in settings.train_layers:
            layers[index].requires_grad_(True)
    if settings.freeze_embeddings:
        embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
        embeddings.requires_grad_(False)
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            kind = model.config.model_type
            raise UsageError(
                f"A {kind} model cannot compute its activations twice.", "Leave gradient_checkpointing out."
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.requires_grad_(True).eval()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()
