"""Objectives by name: what a student is told to match, each with its formula and its paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ...errors import UsageError, did_you_mean
from ...models.tasks import Task
from .attention import AttentionMaps, AttentionRelations
from .base import LOGITS_TASKS, Objective
from .embeddings import Contrastive, EmbeddingCosine, PairwiseSimilarity, QueueSimilarity, Relational
from .hidden import EmbeddingLayer, HiddenStates
from .logits import Labels, LogitsKL

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        LogitsKL,
        Labels,
        HiddenStates,
        EmbeddingLayer,
        AttentionMaps,
        AttentionRelations,
        EmbeddingCosine,
        PairwiseSimilarity,
        Relational,
        Contrastive,
        QueueSimilarity,
    )
}

DEFAULT_OBJECTIVES: dict[str, dict[str, Any]] = {
    "sentence-similarity": {
        "embedding-cosine": 1.0,
        "pairwise-similarity": 1.0,
        "hidden-states": {"weight": 1.0, "layers": {-1: -1}},
    },
    **{task: {"logits-kl": 1.0} for task in LOGITS_TASKS},
}

__all__ = ["DEFAULT_OBJECTIVES", "OBJECTIVES", "Objective", "build_objectives"]


def build_objectives(asked: Mapping[str, Any], task: Task, has_labels: bool) -> list[Objective]:
    """The objectives of these names.

    Args:
        asked: name to weight (a number, or a ramp `{start, end}`), or to a mapping of settings.

    Raises:
        UsageError: none, an unknown objective, one that does not fit the task, one that needs labels where there are
            none, or a setting that is not valid.
    """
    if not asked:
        raise UsageError("There is no objective to train for.", f"Name one of {', '.join(_fitting(task))}.")
    return [_build(name, value, task, has_labels) for name, value in asked.items()]


def _build(name: str, value: Any, task: Task, has_labels: bool) -> Objective:
    if name not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise UsageError(f"There is no objective {name!r}; there are {known}.{did_you_mean(name, OBJECTIVES)}")
    kind = OBJECTIVES[name]
    if task.name not in kind.tasks:
        raise UsageError(f"The objective {name!r} does not fit {task.name}; what fits is {', '.join(_fitting(task))}.")
    if kind.needs_labels and not has_labels:
        raise UsageError(f"The objective {name!r} needs labels, and the data has none.", "Leave it out.")
    is_ramp = isinstance(value, Mapping) and ("start" in value or "end" in value)
    settings = dict(value) if isinstance(value, Mapping) and not is_ramp else {"weight": value}
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise UsageError(_problem(kind, settings, error)) from error


_PLAINER = {"Field required": "is missing", "Extra inputs are not permitted": "has no place there"}


def _fitting(task: Task) -> list[str]:
    return [name for name, kind in OBJECTIVES.items() if task.name in kind.tasks]


def _problem(kind: type[Objective], settings: Mapping[str, Any], error: ValidationError) -> str:
    """The first problem as a sentence that names the setting."""
    problems = error.errors(include_url=False)
    place = problems[0]["loc"]
    if not place:  # settings that contradict each other
        return f"The objective {kind.name!r}: {problems[0]['msg'].removeprefix('Value error, ')}."
    setting = str(place[0])
    if setting not in kind.model_fields:
        known = ", ".join(kind.model_fields)
        suggestion = did_you_mean(setting, kind.model_fields)
        return f"The objective {kind.name!r} has no setting {setting!r}; it has {known}.{suggestion}"
    # A number or a ramp, a name or a mapping: pydantic reports both readings, and the mapping's last.
    about = [problem for problem in problems if problem["loc"][:1] == place[:1]]
    problem = about[-1] if isinstance(settings[setting], Mapping) else about[0]
    inner = ".".join(str(part) for part in problem["loc"][2:] if part != "[key]")
    message = _PLAINER.get(problem["msg"], problem["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return (
        f"The setting {setting!r} of the objective {kind.name!r} is {settings[setting]!r}: "
        f"{inner or 'it'} {message[0].lower()}{message[1:]}."
    )
