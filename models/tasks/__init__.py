"""Tasks by name: what a model is for, hence how rows become batches and outputs become predictions."""

from __future__ import annotations

from ...errors import UsageError, did_you_mean
from .base import Task
from .language_modeling import FillMask, TextGeneration
from .sentence_similarity import SentenceSimilarity
from .text_classification import TextClassification
from .token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (TextClassification, TokenClassification, SentenceSimilarity, FillMask, TextGeneration)
}

__all__ = ["TASKS", "Task", "get_task"]


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UsageError: there is no such task; the message lists them.
    """
    if name not in TASKS:
        raise UsageError(f"There is no task {name!r}; the tasks are {', '.join(TASKS)}.{did_you_mean(name, TASKS)}")
    return TASKS[name]()
