"""The trainer: transformers' own, whose loss is a weighted sum of objectives against a teacher given as a callable."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..errors import InputError
from ..models.batching import Batch, Examples, pad
from ..models.checkpoint import Checkpoint
from ..models.lineage import Curve
from .objectives import Objective
from .settings import DistillSettings

TeacherCall = Callable[[Batch], Mapping[str, torch.Tensor]]
"""int64 inputs [batch, sequence] -> the teacher's outputs by name; eager, compiled or cached, as the caller chose."""
Progress = Callable[[int, int], None]
"""Steps done and steps in all."""

_LOGS = 60
"""Points of a curve: enough to see its shape."""
_PRUNED_SHARE = 0.1
"""A matrix with more zeros than this was pruned: training never makes an exact zero."""


class TrainingDiverged(InputError):
    """The loss is no longer a number."""


class DistillationTrainer(Trainer):
    """Adds to `Trainer` the loss, and a running mean of every objective between two logs."""

    # A BERT-like forward takes **kwargs, from which Trainer concludes a loss normalised by the number of items.
    model_accepts_loss_kwargs = False

    def __init__(
        self,
        *,
        student: Checkpoint,
        teacher: TeacherCall,
        objectives: list[tuple[Objective, float]],
        args: TrainingArguments,
        examples: Examples,
        callbacks: list[TrainerCallback],
    ) -> None:
        self._student, self._teacher, self._objectives = student, teacher, objectives
        self._sums: dict[str, float] = defaultdict(float)
        self._batches = 0
        super().__init__(
            model=student.module,
            args=args,
            train_dataset=examples.features,
            data_collator=lambda features: pad(features, student.tokenizer),
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # set anew by Trainer's own __init__
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, *_: Any) -> LengthGroups:
        lengths = [len(feature["input_ids"]) for feature in self.train_dataset]
        return LengthGroups(lengths, self.args.train_batch_size, self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the objectives."""
        batch = self._student.model_inputs(inputs)
        teacher = self._teacher(batch)
        outputs = model(**batch, **self._student.task.forward_flags())
        total = torch.zeros((), device=inputs["input_ids"].device)
        for objective, weight in self._objectives:
            value = objective(outputs, teacher, inputs, self._student.task)
            self._sums[objective.name] += float(value.detach())
            total = total + weight * value
        self._batches += 1
        if not math.isfinite(float(total.detach())):
            raise TrainingDiverged(
                f"The loss became {float(total.detach())} at step {self.state.global_step}.",
                "Lower --learning-rate, or look for broken rows in the data.",
            )
        return (total, outputs) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._batches:
            logs = {**logs, **{f"objective/{name}": value / self._batches for name, value in self._sums.items()}}
            self._sums.clear()
            self._batches = 0
        super().log(logs, *args, **kwargs)


class LengthGroups(Sampler[int]):
    """Positions of examples so that every batch holds texts of like length (little padding) and batches come in random
    order. Trainer's own grouping goes from long to short, over and over: the loss then swings with the length, and
    training ends on nothing but short texts.
    """

    _BATCHES_SORTED_TOGETHER = 50

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size = np.asarray(lengths), batch_size
        self._generator = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = self._generator.permutation(len(self._lengths))
        batches: list[np.ndarray] = []
        together = self._BATCHES_SORTED_TOGETHER * self._batch_size
        for start in range(0, len(order), together):
            group = order[start : start + together]
            group = group[np.argsort(self._lengths[group], kind="stable")]
            batches += [group[i : i + self._batch_size] for i in range(0, len(group), self._batch_size)]
        # The loader cuts this stream every `batch_size` positions, so the one short batch has to come last.
        short = [batch for batch in batches if len(batch) < self._batch_size]
        full = [batch for batch in batches if len(batch) == self._batch_size]
        self._generator.shuffle(full)
        for batch in (*full, *short):
            yield from (int(position) for position in batch)


class TraceCallback(TrainerCallback):
    """Keeps every logged quantity as a curve."""

    _TRACED = ("loss", "learning_rate", "grad_norm")

    def __init__(self) -> None:
        self._points: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        for name, value in (logs or {}).items():
            if name in self._TRACED or name.startswith("objective/"):
                steps, values = self._points[name.removeprefix("objective/")]
                steps.append(state.global_step)
                values.append(float(value))

    def curves(self) -> list[Curve]:
        """What was logged, in the order in which it first appeared."""
        return [Curve(name=name, steps=steps, values=values) for name, (steps, values) in self._points.items()]


class ProgressCallback(TrainerCallback):
    """Tells a progress bar of ours about every step."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._progress(0, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps)


class KeepZeros(TrainerCallback):
    """Holds pruned weights at zero: what is zero in a sparse matrix when training starts stays zero after every step,
    so a 2:4 pattern survives distillation."""

    def __init__(self, module: nn.Module) -> None:
        matrices = [weight for weight in module.parameters() if weight.ndim == 2]
        self.masks = [(weight, weight != 0) for weight in matrices if _zero_share(weight) > _PRUNED_SHARE]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        for weight, mask in self.masks:
            weight.mul_(mask)


def _zero_share(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


def training_arguments(settings: DistillSettings, examples: Examples, folder: Path) -> TrainingArguments:
    """Trainer's arguments for these settings; nothing is written but into `folder`."""
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    steps = settings.max_steps or max(1, round(per_epoch * settings.epochs))
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,  # it would drop what the objectives read
        logging_steps=max(1, steps // _LOGS),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=settings.seed,
        data_seed=settings.seed,
    )
