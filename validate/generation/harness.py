"""Tasks of the lm-evaluation-harness as metrics: teacher and candidates run on the same documents, so that gates can
name `lm_eval/TASK/METRIC`."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...backends.torch_eager import EagerRunner
from ...environment import installed_version, is_importable
from ...errors import BackendUnavailable, InputError, LimbeckError, UsageError, first_line
from ...models.checkpoint import Checkpoint
from ..predictions import Progress
from ..records.report import Metric
from ..statistics.intervals import Interval, bootstrap_interval, newcombe_interval, wilson_interval
from .greedy import LanguageModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from ..standard import Answering

_SEED = 1234
"""The harness's own, by which examples are drawn for few-shot prompts."""
_RESAMPLES = 1000
_95_PERCENT = 1.959964
_NEAR = 5
_ONE_PROCESS = "DISABLE_MULTIPROC"
"""The variable that keeps the harness from forking processes to bootstrap in."""


@dataclass(frozen=True)
class HarnessAsked:
    """Which tasks, groups or globs of them; a folder of task files beside the harness's own; how many documents of each
    task (all where not given)."""

    tasks: Sequence[str] = ()
    folder: Path | None = None
    documents: int | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and not self.tasks:
            raise UsageError(f"No task of {self.folder} was named.", "Name some: --harness TASK,TASK.")


@dataclass(frozen=True)
class Figure:
    """One metric of one task, as the harness found it on one model."""

    value: float
    standard_error: float | None
    documents: np.ndarray | None
    """The metric's value on each document, float [documents] or [documents, parts]; `None` where it is no number."""
    aggregate: Callable[[np.ndarray], float]
    """From documents to the value."""
    higher_is_better: bool
    count: int
    about: str

    @property
    def is_share(self) -> bool:
        """Whether it is the mean of yes or no."""
        rows = self.documents
        return rows is not None and rows.ndim == 1 and bool(np.isin(rows, (0, 1)).all()) and self.value == rows.mean()


class Harness:
    """Tasks that are loaded once, and the teacher's figures on them.

    Raises:
        BackendUnavailable: the harness is not installed.
        InputError: a task that is not known, or whose data cannot be had.
    """

    def __init__(
        self, asked: HarnessAsked, teacher: LanguageModel, progress: Progress = lambda done, total: None
    ) -> None:
        check_installed()
        self._asked, self._progress = asked, progress
        self._tasks = _load(asked)
        self._teacher = self.figures(teacher)

    def __call__(self, candidate: Answering) -> list[Metric]:
        """The candidate's figures beside the teacher's, and the differences where documents have numbers."""
        found = self.figures(LanguageModel(candidate.run, candidate.tokenizer, candidate.max_length))
        metrics = []
        for name, figure in found.items():
            theirs = self._teacher[name]
            value = _metric(name, figure, figure.value, _interval(figure))
            metrics.append(value.model_copy(update={"teacher": theirs.value}))
            difference = _difference(figure, theirs)
            if difference is not None:
                metrics.append(_metric(f"{name}_difference", figure, difference.point, difference))
        return metrics

    def figures(self, model: LanguageModel) -> dict[str, Figure]:
        """Every metric of every task on a model, by the name that gates have for it.

        Raises:
            InputError: the harness fails on a task.
        """
        from lm_eval import evaluate

        from .harness_model import LimbeckLM

        for task in self._tasks["tasks"].values():
            task.set_fewshot_seed(seed=_SEED)
        lm = LimbeckLM(model)
        lm.progress = self._progress
        with _quiet():
            try:
                results = evaluate(lm, self._tasks, limit=self._asked.documents, bootstrap_iters=_RESAMPLES)
            except LimbeckError:
                raise
            except Exception as error:  # tasks are code of others
                names = ", ".join(self._asked.tasks)
                raise InputError(f"The lm-evaluation-harness failed on {names}: {first_line(error)}.") from error
        return dict(self._figures(results))

    def _figures(self, results: Any) -> Iterator[tuple[str, Figure]]:
        for name, found in {**results["results"], **results.get("groups", {})}.items():
            for key, value in found.items():
                metric, comma, chosen = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = found.get(f"{metric}_stderr,{chosen}")
                documents, aggregate = self._documents(results, name, metric, chosen, value)
                better = results["higher_is_better"].get(name, {}).get(metric)
                figure = Figure(
                    value=float(value),
                    standard_error=float(error) if isinstance(error, int | float) else None,
                    documents=documents,
                    aggregate=aggregate,
                    higher_is_better=better is not False,
                    count=int(found.get("sample_len", 0)),
                    about=self._about(results, name, metric),
                )
                yield f"lm_eval/{name}/{metric}{'' if chosen == 'none' else f',{chosen}'}", figure

    def _documents(
        self, results: Any, name: str, metric: str, chosen: str, value: float
    ) -> tuple[np.ndarray | None, Callable[[np.ndarray], float]]:
        """The values by document whose aggregate is the task's value, where there are such."""
        samples = [row for row in results["samples"].get(name, ()) if row["filter"] == chosen and metric in row]
        own = self._tasks["tasks"][name].aggregation().get(metric) if samples else None

        def aggregate(rows: np.ndarray) -> float:
            assert own is not None
            return float(own(rows.tolist() if rows.ndim == 1 else [tuple(row) for row in rows.tolist()]))

        try:
            rows = np.array([row[metric] for row in samples], dtype=np.float64)
        except (TypeError, ValueError):  # texts, or lists of unequal length
            return None, aggregate
        if own is None or rows.ndim > 2 or not np.isclose(aggregate(rows), value):
            return None, aggregate
        return rows, aggregate

    def _about(self, results: Any, name: str, metric: str) -> str:
        shots, version = results["n-shot"].get(name), results["versions"].get(name)
        told = [f"{metric} of the task {name}, lm-evaluation-harness {installed_version('lm_eval')}"]
        told += [f"task version {version}"] if version is not None else []
        return ", ".join(told + ([f"{shots}-shot"] if shots is not None else []))


def check_installed() -> None:
    """Raises BackendUnavailable where the harness is not installed."""
    if not is_importable("lm_eval"):
        raise BackendUnavailable("The lm-evaluation-harness is not installed.", 'pip install "limbeck[harness]"')


def open_harness(asked: HarnessAsked, teacher: Checkpoint, progress: Progress) -> Harness:
    """The tasks, and the teacher's figures on them.

    Raises:
        UsageError: a teacher that is not for text-generation.
        BackendUnavailable, InputError: see `Harness`.
    """
    if teacher.task.name != "text-generation":
        raise UsageError(
            f"The lm-evaluation-harness asks models for text-generation; {teacher.source} is for {teacher.task.name}."
        )
    eager = EagerRunner(teacher, torch.get_num_threads())
    return Harness(asked, LanguageModel(eager, teacher.tokenizer, teacher.max_length), progress)


def _load(asked: HarnessAsked) -> Any:
    if asked.folder is not None and not asked.folder.is_dir():
        raise InputError(f"{asked.folder} is not a folder of task files.")
    with _quiet():
        from lm_eval.tasks import TaskManager

        names: list[str] = []
        manager = TaskManager(include_path=str(asked.folder), include_defaults=False) if asked.folder else None
        if manager is None or not all(manager.match_tasks([name]) for name in asked.tasks):
            manager = TaskManager(include_path=str(asked.folder) if asked.folder else None)  # thousands of files
        for name in asked.tasks:
            names += matching(name, manager)
        try:
            loaded = manager.load(list(dict.fromkeys(names)))
        except Exception as error:  # tasks are code of others, which may raise anything
            said = f"{', '.join(asked.tasks)} could not be loaded: {first_line(error)}"
            raise InputError(
                f"The lm-evaluation-harness tasks {said}.", "Check the task file, its data and the network."
            ) from error
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
    return loaded


def matching(name: str, manager: TaskManager) -> list[str]:
    """The tasks and groups of that name or glob.

    Raises:
        InputError: there is none; the near are listed.
    """
    found: list[str] = manager.match_tasks([name])
    if not found:
        near = difflib.get_close_matches(name, manager.all_tasks, n=_NEAR, cutoff=0.4)
        said = f" Near it are {', '.join(near)}." if near else ""
        raise InputError(
            f"The lm-evaluation-harness has no task {name!r}.{said}", "Add the folder of your own: --harness-tasks DIR."
        )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness without its bars, log lines and prints, and without the processes that it forks to bootstrap in."""
    import lm_eval.api.task

    module, log = lm_eval.api.task, logging.getLogger("lm_eval")
    bar, level, forking = module.tqdm, log.level, os.environ.get(_ONE_PROCESS)
    module.tqdm = lambda items, **settings: items
    log.setLevel(logging.CRITICAL)
    os.environ[_ONE_PROCESS] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        module.tqdm = bar
        log.setLevel(level)
        if forking is None:
            del os.environ[_ONE_PROCESS]


def _interval(figure: Figure) -> Interval | None:
    """Over documents where they have numbers: of a share Wilson's, which has a width at 0 and 1 too. Else, as for
    corpus metrics and groups, by the harness's own standard error."""
    if figure.is_share and figure.documents is not None:
        return wilson_interval(int(figure.documents.sum()), len(figure.documents))
    if figure.documents is not None:
        return _bootstrap(figure.documents, figure.aggregate)
    if figure.standard_error is None:
        return None
    reach = _95_PERCENT * figure.standard_error
    return Interval(figure.value, figure.value - reach, figure.value + reach, 0.95, "normal")


def _difference(ours: Figure, theirs: Figure) -> Interval | None:
    if ours.documents is None or theirs.documents is None or ours.documents.shape != theirs.documents.shape:
        return None
    if ours.is_share and theirs.is_share:
        first, second = ours.documents > 0, theirs.documents > 0
        counts = (first & second, first & ~second, ~first & second, ~first & ~second)
        return newcombe_interval(*(int(side.sum()) for side in counts))
    rows = np.stack([ours.documents, theirs.documents], axis=1)
    return _bootstrap(rows, lambda drawn: ours.aggregate(drawn[:, 0]) - theirs.aggregate(drawn[:, 1]))


def _bootstrap(rows: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Interval | None:
    try:
        return bootstrap_interval(rows, statistic, _RESAMPLES)
    except InputError:  # one document, or a figure that is not finite
        return None


def _metric(name: str, figure: Figure, value: float, found: Interval | None) -> Metric:
    return Metric(
        name=name,
        value=value,
        low=found.low if found else None,
        high=found.high if found else None,
        count=figure.count,
        higher_is_better=figure.higher_is_better,
        description=figure.about + (" (minus the teacher's, same documents)" if name.endswith("_difference") else ""),
    )
