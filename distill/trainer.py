"""The trainer: transformers' own, whose loss is a weighted sum of objectives against a teacher given as a callable.

What comes with it: mixed precision, gradient accumulation, checkpoints, resuming, TensorBoard and MLflow, and
DistributedDataParallel, FSDP and DeepSpeed through `accelerate launch`.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import distributed, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from ..environment import multiplies_bf16
from ..errors import InputError, UsageError
from ..models.batching import Batch
from ..models.checkpoint import Checkpoint
from ..models.lineage import Curve
from .callbacks import Modifier
from .module import Distillation
from .objectives.base import Outputs
from .on_policy import OnPolicyText
from .reduction import processes, total
from .settings import DistillSettings
from .training_data import LengthGroups, TrainingData

_LOGS = 60
"""Points of a curve: enough to see its shape."""
_SAVES = 10
_TRACED = ("loss", "learning_rate", "grad_norm", "throughput")


class TrainingDiverged(InputError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Evaluation:
    """How a student is measured while it trains."""

    measure: Callable[[Checkpoint], Mapping[str, float]]
    """Student -> metrics by name."""
    metric: str
    """The one that decides which weights are kept."""
    higher_is_better: bool


class DistillationTrainer(Trainer):
    """Adds to `Trainer` the loss, the running mean of every objective between two logs, and the task's own metrics."""

    # A BERT-like forward takes **kwargs, from which Trainer concludes a loss normalised by the number of items.
    model_accepts_loss_kwargs = False

    def __init__(
        self,
        *,
        module: Distillation,
        teacher: Callable[[Batch], Outputs] | None,
        args: TrainingArguments,
        data: TrainingData,
        evaluation: Evaluation | None,
        on_policy: OnPolicyText | None,
        modifier: Modifier | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        self._student, self._teacher, self._data = module.checkpoint, teacher, data
        self._evaluation, self._on_policy, self._modifier = evaluation, on_policy, modifier
        self._prefix = next(f"{name}." for name, part in module.named_modules() if part is self._student.model)
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self._batches, self._rows, self._since = 0, 0, time.monotonic()
        super().__init__(
            model=module,
            args=args,
            train_dataset=data.dataset,
            eval_dataset=data.dataset if evaluation else None,  # asked for, though `evaluate` below reads its own
            data_collator=data.collate,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # set anew by Trainer's own __init__
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, *_: Any) -> LengthGroups:
        sampler = self._data.sampler(self.args.train_batch_size, self.args.seed, processes())
        self.add_callback(_TellEpoch(sampler))
        return sampler

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the objectives."""
        if self._on_policy is not None:
            inputs = self._on_policy.replace(inputs, step=self.state.global_step)
        teacher = self._teacher(inputs) if self._teacher is not None else {}
        done = self.state.global_step / max(self.state.max_steps, 1)
        values = model(batch=inputs, teacher=teacher, done=done)
        loss = values.pop("loss")
        for name, value in values.items():
            self._sums[name] += value.detach().double().cpu()
        self._batches += 1
        self._rows += len(inputs["input_ids"])
        if not math.isfinite(float(loss.detach())):
            raise TrainingDiverged(
                f"The loss became {float(loss.detach())} at step {self.state.global_step}.", self._where_to_go_on()
            )
        return (loss, values) if return_outputs else loss

    def _where_to_go_on(self) -> str:
        mend = "Lower --learning-rate, or look for broken rows in the data"
        kept = sorted(Path(self.args.output_dir).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        return f"{mend}; the last good weights are in {kept[-1]}." if kept else f"{mend}."

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the task's own metrics on the student as it is now; every process does, so that none waits."""
        assert self._evaluation is not None  # Trainer evaluates only where a strategy asks for it
        self._student.module.eval()  # Trainer puts it back before the next step
        found = self._evaluation.measure(self._student)
        metrics = {f"eval_{name}": float(value) for name, value in found.items()}
        self.log(metrics)
        control: TrainerControl = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._batches and "loss" in logs:
            now = time.monotonic()
            means = {name: float(total(value)) / processes() / self._batches for name, value in self._sums.items()}
            speed = self._rows * processes() / max(now - self._since, 1e-9)
            traced = self._modifier.traced() if self._modifier is not None else {}
            objectives = {f"objective/{name}": value for name, value in means.items()}
            logs = {**logs, **objectives, **traced, "throughput": speed}
            self._sums.clear()
            self._batches, self._rows, self._since = 0, 0, now
        super().log(logs, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A modifier may have most of its work before it: the best are chosen among finished students only."""
        if self._modifier is not None and not self._modifier.settled:
            return False
        return bool(super()._determine_best_metric(metrics, trial))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights and projections, as safetensors that may share tensors; FSDP and DeepSpeed bring their own state."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and state_dict is None:
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(folder / SAFE_WEIGHTS_NAME))
            if self._modifier is not None:  # not in on_save, which comes after the checkpoint counts as whole
                self._modifier.save_state(folder)
        elif self.args.should_save:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        if self.is_fsdp_enabled or not path.exists():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_model(model or self.model, path)
            if self._modifier is not None:
                self._modifier.load_state(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def put_weights_into(self, model: nn.Module) -> None:
        """The trained weights, whole, in `model`: FSDP and DeepSpeed leave each process a shard of them."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            state = self.accelerator.get_state_dict(self.model_wrapped)
            if self.args.should_save:
                prefix = self._prefix
                own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
                model.load_state_dict(own, strict=False)  # of tied weights one is saved
            self.accelerator.wait_for_everyone()

    def curves(self) -> list[Curve]:
        """What was logged, a killed run's part included, in the order in which it first appeared."""
        points: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        traced = {*_TRACED, *(self._modifier.traced() if self._modifier is not None else ())}
        for entry in self.state.log_history:
            for name, value in entry.items():
                shown = name if name in traced else _curve_name(name)
                if shown is not None:
                    points[shown][0].append(entry["step"])
                    points[shown][1].append(float(value))
        units = {"throughput": "texts/s"}
        return [
            Curve(name=name, unit=units.get(name, ""), steps=steps, values=values)
            for name, (steps, values) in points.items()
        ]


def _curve_name(name: str) -> str | None:
    if name.startswith("objective/"):
        return name.removeprefix("objective/")
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else None


class _TellEpoch(TrainerCallback):
    """The order of the rows depends on the epoch alone, so that a resumed run sees what a whole one would."""

    def __init__(self, sampler: LengthGroups) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))


def training_arguments(
    settings: DistillSettings,
    rows: int,
    folder: Path,
    *,
    evaluation: Evaluation | None,
    keep: bool,
    report_to: Sequence[str],
    inner_only: bool,
) -> TrainingArguments:
    """Trainer's arguments for these settings; nothing is written but into `folder`.

    Args:
        rows: training examples.
        keep: write checkpoints to resume from.
        inner_only: no objective reads the output, so the layers above those that are compared get no gradient.
    """
    gpu = torch.cuda.is_available()
    precision = _precision(settings, gpu)
    world = int(distributed.get_world_size()) if distributed.is_initialized() else 1
    steps_an_epoch = math.ceil(rows / (settings.batch_size * settings.gradient_accumulation * world))
    steps = settings.max_steps or max(1, round(steps_an_epoch * settings.epochs))
    every = max(1, steps // _SAVES)
    measure_every = settings.evaluate_every or every
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not gpu,
        remove_unused_columns=False,  # it would drop what the objectives read
        dataloader_pin_memory=gpu,
        ddp_find_unused_parameters=inner_only,
        logging_steps=max(1, steps // _LOGS),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluation else "no",
        eval_steps=measure_every if evaluation else None,
        metric_for_best_model=evaluation.metric if evaluation else None,
        greater_is_better=evaluation.higher_is_better if evaluation else None,
        load_best_model_at_end=evaluation is not None,
        save_strategy="steps" if keep or evaluation else "no",
        save_steps=measure_every if evaluation else settings.save_every or every,
        save_total_limit=2,
        report_to=list(report_to),
        disable_tqdm=True,
        seed=settings.seed,
        data_seed=settings.seed,
    )


def _precision(settings: DistillSettings, gpu: bool) -> str:
    if settings.precision == "fp16" and not gpu:
        raise UsageError("Training in fp16 needs a CUDA GPU, and there is none here.", "Take --precision auto.")
    if settings.precision == "auto":
        return "bf16" if (torch.cuda.is_bf16_supported() if gpu else multiplies_bf16()) else "fp32"
    return settings.precision
