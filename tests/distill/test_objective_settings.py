"""Objectives as they are asked for: settings, what they say of themselves, and what is said of those that cannot be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.distill.objectives import DEFAULT_OBJECTIVES, OBJECTIVES, Objective, build_objectives
from limbeck.distill.objectives.base import Shape, Sides, value_at
from limbeck.errors import UsageError
from limbeck.models.tasks import TASKS, get_task

SIMILARITY, CLASSIFICATION = get_task("sentence-similarity"), get_task("text-classification")
GENERATION = get_task("text-generation")


def sides(width: int = 4, teacher_width: int = 4, heads: int = 2, teacher_heads: int = 2) -> Sides:
    return Sides(
        Shape(depth=2, width=width, heads=heads, output_width=width),
        Shape(depth=4, width=teacher_width, heads=teacher_heads, output_width=teacher_width),
        lambda: np.eye(2, 4),
    )


def build(name: str, task: Any = None, **settings: Any) -> Objective:
    kind = OBJECTIVES[name]
    return build_objectives({name: settings}, task or get_task(kind.tasks[0]), has_labels=True)[0]


def test_objectives_are_built_with_their_weights() -> None:
    asked = {"logits-kl": 0.5, "labels": {"start": 2, "end": 0}, "hidden-states": {"weight": 3, "layers": "last"}}
    built = build_objectives(asked, CLASSIFICATION, has_labels=True)
    assert [objective.name for objective in built] == list(asked)
    assert [value_at(objective.weight, 0.5) for objective in built] == [0.5, 1.0, 3.0]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_has_default_objectives_that_fit(task: str) -> None:
    assert build_objectives(DEFAULT_OBJECTIVES[task], get_task(task), has_labels=False)


def test_settings_survive_the_lineage() -> None:
    """They are kept as JSON, whose keys are text."""
    objective = build("hidden-states", SIMILARITY, layers={0: 1, -1: -1}, weight={"start": 1, "end": 0})
    kept = objective.model_dump(mode="json")
    assert build_objectives({"hidden-states": kept}, SIMILARITY, has_labels=False) == [objective]


def test_what_compares_tokens() -> None:
    tokens = {
        name: {task for task in kind.tasks if kind().compares_tokens(get_task(task))}
        for name, kind in OBJECTIVES.items()
    }
    assert tokens["logits-kl"] == {"token-classification", "fill-mask", "text-generation"}
    assert all(tokens[name] == set(TASKS) for name in ("hidden-states", "embedding-layer"))
    assert all(tokens[name] == set(TASKS) for name in ("attention-maps", "attention-relations"))
    assert not any(tokens[name] for name in ("labels", "embedding-cosine", "pairwise-similarity", "relational"))
    assert not tokens["contrastive"]


def test_labels_read_nothing_of_the_teacher() -> None:
    assert build("labels").teacher_view({"logits": torch.ones(2, 3)}, CLASSIFICATION, []) == {}


@pytest.mark.parametrize(
    ("asked", "task", "said"),
    [
        ({}, CLASSIFICATION, "There is no objective to train for"),
        ({"logit-kl": 1.0}, CLASSIFICATION, "no objective 'logit-kl'; there are .*Did you mean 'logits-kl'"),
        ({"zzz": 1.0}, CLASSIFICATION, "there are logits-kl, .*queue-similarity.$"),
        ({"logits-kl": 1.0}, SIMILARITY, "does not fit sentence-similarity; what fits is hidden-states,"),
        ({"relational": 1.0}, GENERATION, "does not fit text-generation; what fits is logits-kl, labels"),
        ({"labels": 1.0}, CLASSIFICATION, "'labels' needs labels, and the data has none"),
        (
            {"logits-kl": -1},
            CLASSIFICATION,
            "'weight' of the objective 'logits-kl' is -1: it should be greater",
        ),
        ({"logits-kl": math.nan}, CLASSIFICATION, "'weight' .* is nan: it should be a finite number"),
        ({"logits-kl": math.inf}, CLASSIFICATION, "'weight' .* is inf: it should be a finite number"),
        ({"logits-kl": None}, CLASSIFICATION, "'weight' .* is None: it should be a valid number"),
        ({"logits-kl": "much"}, CLASSIFICATION, "'weight' .* is 'much': it should be a valid number"),
        ({"logits-kl": {"start": 1}}, CLASSIFICATION, "'weight' .*: end is missing"),
        ({"logits-kl": {"start": 1, "end": 0, "form": 2}}, CLASSIFICATION, "'weight' .*: form has no place there"),
        (
            {"logits-kl": {"temprature": 1}},
            CLASSIFICATION,
            "no setting 'temprature'; it has weight, temperature.*Did",
        ),
        ({"logits-kl": {"temperature": 0}}, CLASSIFICATION, "'temperature' .* is 0: it should be greater than 0"),
        ({"logits-kl": {"temperature": {"start": 1, "end": 0}}}, CLASSIFICATION, "'temperature' .*greater than 0"),
        (
            {"logits-kl": {"top_k": 4, "temperature": {"start": 2, "end": 1}}},
            CLASSIFICATION,
            "top_k .*be a ramp",
        ),
        ({"logits-kl": {"divergence": "js"}}, CLASSIFICATION, "'js': it should be 'forward', 'reverse' or 'jensen"),
        ({"logits-kl": {"mix": 1}}, CLASSIFICATION, "'mix' .* is 1: it should be less than 1"),
        (
            {"hidden-states": {"layers": "middle"}},
            CLASSIFICATION,
            "'middle': it should be 'uniform', 'last'",
        ),
        ({"hidden-states": {"layers": {"a": 0}}}, CLASSIFICATION, "'layers' .*: a should be a valid integer"),
        ({"attention-relations": {"heads": 0}}, CLASSIFICATION, "'heads' .*greater than or equal to 1"),
    ],
)
def test_objectives_that_cannot_be_are_refused(asked: dict[str, Any], task: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_objectives(asked, task, has_labels=False)


def test_other_answers_are_refused_before_training() -> None:
    with pytest.raises(UsageError, match="the student has 4 and the teacher 5 "):
        build("logits-kl").pairs(sides(width=4, teacher_width=5))


def test_another_number_of_heads_is_refused_before_training() -> None:
    with pytest.raises(UsageError, match="the student has 2 heads and the teacher 4") as error:
        build("attention-maps").pairs(sides(heads=2, teacher_heads=4))
    assert error.value.hint and "attention-relations" in error.value.hint
