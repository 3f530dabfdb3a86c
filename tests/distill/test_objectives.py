"""Objectives against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.distill.objectives import DEFAULT_OBJECTIVES, OBJECTIVES, build_objectives
from limbeck.errors import UsageError
from limbeck.models.tasks import TASKS, get_task

SIMILARITY, CLASSIFICATION = get_task("sentence-similarity"), get_task("text-classification")
TOKENS, GENERATION = get_task("token-classification"), get_task("text-generation")
ALL = sorted(OBJECTIVES)


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def value(name: str, student: Any, teacher: Any, batch: Any, task: Any) -> float:
    return float(OBJECTIVES[name]()(student, teacher, batch, task).detach())


def test_embedding_cosine_by_hand() -> None:
    student = {"sentence_embedding": tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])}
    teacher = {"sentence_embedding": tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])}
    # The cosines are 0.6, 0 and -1; lengths do not matter.
    assert value("embedding-cosine", student, teacher, {}, SIMILARITY) == pytest.approx((0.4 + 1 + 2) / 3)


def test_pairwise_similarity_by_hand() -> None:
    student = {"sentence_embedding": tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])}
    teacher = {"sentence_embedding": tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0]])}
    # Cosines of the pairs 12, 13, 23: the student's 0, 0.6, 0.8; the teacher's 1, 0, 0.
    by_hand = (1.0 + 0.36 + 0.64) / 3
    assert value("pairwise-similarity", student, teacher, {}, SIMILARITY) == pytest.approx(by_hand)


def test_pairwise_similarity_of_one_text_is_nothing() -> None:
    one = {"sentence_embedding": tensor([[1.0, 2.0]])}
    assert value("pairwise-similarity", one, one, {}, SIMILARITY) == pytest.approx(0, abs=1e-6)


def test_hidden_mse_by_hand() -> None:
    student = {"last_hidden_state": tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 3.0], [99.0, -99.0]]])}
    teacher = {"last_hidden_state": tensor([[[1.0, 0.0], [2.0, 0.0]], [[4.0, 5.0], [7.0, 7.0]]])}
    batch = {"attention_mask": torch.tensor([[1, 1], [1, 0]])}  # the last token is padding
    # Squared differences 0, 4, 4, 0, 1, 4 over six numbers; the teacher's own numbers are 1, 0, 2, 0, 4, 5.
    mean = 12 / 6
    variance = sum((number - mean) ** 2 for number in (1, 0, 2, 0, 4, 5)) / 5
    assert value("hidden-mse", student, teacher, batch, SIMILARITY) == pytest.approx((13 / 6) / variance)


def softened(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def kl(teacher: list[float], student: list[float]) -> float:
    """`T^2 KL` of one answer at T = 2."""
    t, s = softened(teacher, 2.0), softened(student, 2.0)
    return 4 * sum(a * math.log(a / b) for a, b in zip(t, s, strict=True))


def test_logits_kl_by_hand() -> None:
    student, teacher = [[1.0, 0.0, -1.0], [0.0, 3.0, 0.0]], [[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    by_hand = (kl(teacher[0], student[0]) + kl(teacher[1], student[1])) / 2
    found = value("logits-kl", {"logits": tensor(student)}, {"logits": tensor(teacher)}, {}, CLASSIFICATION)
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_logits_kl_is_a_mean_over_real_tokens() -> None:
    student = [[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [50.0, -50.0]]]
    teacher = [[[0.0, 1.0], [0.0, 0.0]], [[2.0, 0.0], [-50.0, 50.0]]]
    batch = {"attention_mask": torch.tensor([[1, 1], [1, 0]])}
    real = [(teacher[i][j], student[i][j]) for i, j in ((0, 0), (0, 1), (1, 0))]
    by_hand = sum(kl(t, s) for t, s in real) / 3
    for task in (TOKENS, GENERATION):
        found = value("logits-kl", {"logits": tensor(student)}, {"logits": tensor(teacher)}, batch, task)
        assert found == pytest.approx(by_hand, rel=1e-5)


def test_labels_is_the_cross_entropy_by_hand() -> None:
    student, labels = {"logits": tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}, torch.tensor([0, 2])
    by_hand = -(math.log(softened([2, 0, 0], 1)[0]) + math.log(softened([0, 1, 0], 1)[2])) / 2
    assert value("labels", student, {}, {"labels": labels}, CLASSIFICATION) == pytest.approx(by_hand, rel=1e-5)


def test_labels_of_the_next_token() -> None:
    student = {"logits": tensor([[[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])}
    batch = {"labels": torch.tensor([[1, 0, 0]])}  # position t predicts token t + 1
    by_hand = -(math.log(softened([2, 0], 1)[0]) + math.log(softened([0, 1], 1)[0])) / 2
    assert value("labels", student, {}, batch, GENERATION) == pytest.approx(by_hand, rel=1e-5)


def test_a_batch_without_any_label_adds_nothing() -> None:
    logits = torch.ones(1, 2, 3, requires_grad=True)
    found = OBJECTIVES["labels"]()({"logits": logits}, {}, {"labels": torch.full((1, 2), -100)}, TOKENS)
    assert float(found.detach()) == 0
    found.backward()  # the step still goes through
    assert logits.grad is not None and not logits.grad.any()


def situation(name: str, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Any, Any]:
    """Random outputs of student and teacher, a batch and a task that fit the objective."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"sentence_embedding": (4, 6), "last_hidden_state": (4, 3, 6), "logits": (4, 5)}
    sides = [
        {output: torch.randn(shape, generator=generator, requires_grad=True) for output, shape in shapes.items()}
        for _ in range(2)
    ]
    batch = {"attention_mask": torch.tensor([[1, 1, 1]] * 3 + [[1, 0, 0]]), "labels": torch.tensor([0, 1, 2, 3])}
    return sides[0], sides[1], batch, get_task(OBJECTIVES[name].tasks[0])


@pytest.mark.parametrize("name", sorted(set(ALL) - {"labels"}))
@given(seed=st.integers(0, 1000))
def test_an_objective_is_least_where_student_and_teacher_agree(name: str, seed: int) -> None:
    student, teacher, batch, task = situation(name, seed)
    assert value(name, teacher, teacher, batch, task) == pytest.approx(0, abs=1e-5)
    assert value(name, student, teacher, batch, task) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_descending_its_gradient_makes_it_smaller(name: str) -> None:
    student, teacher, batch, task = situation(name)
    targets = {output: values.detach() for output, values in teacher.items()}
    before = OBJECTIVES[name]()(student, targets, batch, task)
    before.backward()
    moved = {
        output: values.detach() - 0.01 * (values.grad if values.grad is not None else 0)
        for output, values in student.items()
    }
    assert value(name, moved, targets, batch, task) < float(before.detach())


@pytest.mark.parametrize("name", ALL)
def test_half_precision_outputs_are_compared_in_float32(name: str) -> None:
    student, teacher, batch, task = situation(name)
    halves = [{output: values.detach().half() for output, values in side.items()} for side in (student, teacher)]
    found = OBJECTIVES[name]()(halves[0], halves[1], batch, task)
    assert found.dtype == torch.float32 and found.ndim == 0
    assert float(found) == pytest.approx(value(name, student, teacher, batch, task), rel=2e-2)


@pytest.mark.parametrize("name", ALL)
def test_repeating_the_batch_keeps_the_size_of_the_term(name: str) -> None:
    student, teacher, batch, task = situation(name)
    double = [{key: torch.cat([values, values]) for key, values in side.items()} for side in (student, teacher, batch)]
    once, twice = value(name, student, teacher, batch, task), value(name, *double, task)
    # A text and its copy cost nothing: 48 of the 56 pairs are the 12 from before, four times over.
    expected = once * 48 / 56 if name == "pairwise-similarity" else once
    assert twice == pytest.approx(expected, rel=5e-2 if name == "hidden-mse" else 1e-4)


def test_objectives_are_built_with_their_weights() -> None:
    built = build_objectives({"logits-kl": 0.5, "labels": 2}, CLASSIFICATION, has_labels=True)
    assert [(objective.name, weight) for objective, weight in built] == [("logits-kl", 0.5), ("labels", 2.0)]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_has_default_objectives_that_fit(task: str) -> None:
    assert build_objectives(DEFAULT_OBJECTIVES[task], get_task(task), has_labels=False)


@pytest.mark.parametrize(
    ("weights", "task", "said"),
    [
        ({"logit-kl": 1.0}, CLASSIFICATION, "no objective 'logit-kl'; there are .*Did you mean 'logits-kl'"),
        ({"zzz": 1.0}, CLASSIFICATION, "there are embedding-cosine, .*labels.$"),
        ({"logits-kl": 1.0}, SIMILARITY, "does not fit sentence-similarity; what fits is embedding-cosine,"),
        ({"hidden-mse": 1.0}, GENERATION, "does not fit text-generation; what fits is logits-kl, labels"),
        ({"labels": 1.0}, CLASSIFICATION, "'labels' needs labels, and the data has none"),
    ],
)
def test_objectives_that_cannot_be_are_refused(weights: dict[str, float], task: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_objectives(weights, task, has_labels=False)
