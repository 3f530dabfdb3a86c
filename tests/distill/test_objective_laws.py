"""What holds for every objective, whatever its formula; among it that two processes find what one finds."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st
from torch import distributed, nn

from limbeck.distill.objectives import OBJECTIVES, build_objectives
from limbeck.distill.objectives.base import Comparison, Objective, Outputs, Shape, Sides
from limbeck.models.tasks import get_task

LENGTHS = (5, 4, 2, 1)  # of the four texts: two processes hold 9 and 3 real tokens
SEQUENCE, WIDTH, HEADS, ANSWERS = 5, 12, 2, 5
CLASSIFICATION, TOKENS, GENERATION = "text-classification", "token-classification", "text-generation"
SIMILARITY, FILLING = "sentence-similarity", "fill-mask"


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective as it may be asked for; `wider` is a teacher of another width."""

    name: str
    task: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wider: bool = False

    @property
    def objective(self) -> Objective:
        return build_objectives({self.name: self.settings}, get_task(self.task), has_labels=True)[0]

    @property
    def teacher_width(self) -> int:
        return WIDTH * 3 // 2 if self.wider else WIDTH


CASES = {
    "kl-of-texts": Case("logits-kl", CLASSIFICATION),
    "kl-of-tokens": Case("logits-kl", TOKENS, {"temperature": 1}),
    "kl-of-masked-tokens": Case("logits-kl", FILLING, {"divergence": "reverse"}),
    "kl-of-next-tokens": Case("logits-kl", GENERATION, {"divergence": "jensen-shannon", "mix": 0.3}),
    "kl-of-top-tokens": Case("logits-kl", GENERATION, {"top_k": 2}),
    "labels-of-texts": Case("labels", CLASSIFICATION),
    "labels-of-tokens": Case("labels", TOKENS),
    "labels-of-next-tokens": Case("labels", GENERATION),
    "hidden-states": Case("hidden-states", FILLING),
    "hidden-states-cosine": Case("hidden-states", SIMILARITY, {"distance": "cosine"}),
    "hidden-states-projected": Case("hidden-states", GENERATION, wider=True),
    "embedding-layer": Case("embedding-layer", CLASSIFICATION),
    "embedding-layer-projected": Case("embedding-layer", CLASSIFICATION, wider=True),
    "attention-maps": Case("attention-maps", CLASSIFICATION),
    "attention-relations": Case("attention-relations", SIMILARITY),
    "attention-relations-of-other-widths": Case("attention-relations", TOKENS, wider=True),
    "embedding-cosine": Case("embedding-cosine", SIMILARITY),
    "embedding-cosine-projected": Case("embedding-cosine", SIMILARITY, {"project": True}, wider=True),
    "pairwise-similarity": Case("pairwise-similarity", SIMILARITY),
    "pairwise-similarity-of-other-widths": Case("pairwise-similarity", SIMILARITY, wider=True),
    "relational": Case("relational", SIMILARITY),
    "relational-of-other-widths": Case("relational", SIMILARITY, wider=True),
    "contrastive": Case("contrastive", SIMILARITY, {"temperature": 0.5}),
    "contrastive-projected": Case("contrastive", SIMILARITY, {"project": True}, wider=True),
    "queue-similarity": Case("queue-similarity", SIMILARITY, {"temperature": 0.5}),
    "queue-similarity-projected": Case("queue-similarity", SIMILARITY, {"project": True, "size": 3}, wider=True),
}
TAUGHT = [id_ for id_, case in CASES.items() if case.name != "labels"]
IN_BATCH = ("pairwise-similarity", "relational", "contrastive", "queue-similarity")
every_case = pytest.mark.parametrize("id_", CASES)


def test_every_objective_has_a_case() -> None:
    assert {case.name for case in CASES.values()} == set(OBJECTIVES)


def mask() -> torch.Tensor:
    return (torch.arange(SEQUENCE) < torch.tensor(LENGTHS)[:, None]).long()


def outputs(case: Case, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Everything a side may give, at random; one layer."""
    rows, tokens = len(LENGTHS), (len(LENGTHS), SEQUENCE)
    shapes = dict.fromkeys(("embeddings", "hidden.0", "query.0", "key.0", "value.0"), (*tokens, width))
    shapes["logits"] = (rows, ANSWERS) if case.task == CLASSIFICATION else (*tokens, ANSWERS)
    shapes["sentence_embedding"] = (rows, width)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    scores = torch.randn(rows, HEADS, SEQUENCE, SEQUENCE, generator=generator)
    made["attention.0"] = scores.masked_fill(mask()[:, None, None, :] == 0, -torch.inf).softmax(dim=-1)
    return made


def situation(case: Case, seed: int = 0) -> Comparison:
    """Four texts: random outputs of both sides, the student's with gradient."""
    generator = torch.Generator().manual_seed(seed)
    task, objective = get_task(case.task), case.objective
    student = outputs(case, WIDTH, generator)
    teacher = outputs(case, case.teacher_width, generator)
    shapes = [Shape(1, width, HEADS, ANSWERS if "logits" in task.output else width) for width in widths(case)]
    sides = Sides(shapes[0], shapes[1], lambda: torch.eye(1).numpy())
    pairs = objective.pairs(sides)
    label_shape = (len(LENGTHS),) if case.task == CLASSIFICATION else (len(LENGTHS), SEQUENCE)
    labels = torch.randint(0, ANSWERS, label_shape, generator=generator)
    batch = {"attention_mask": mask(), "labels": labels if labels.ndim == 1 else labels.where(mask().bool(), -100)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        learned = objective.learned(sides)
    student = {name: values.requires_grad_() for name, values in student.items()}
    return Comparison(student, objective.teacher_view(teacher, task, pairs), batch, task, pairs, learned)


def widths(case: Case) -> tuple[int, int]:
    return WIDTH, case.teacher_width


def with_sides(seen: Comparison, student: Outputs, teacher: Outputs) -> Comparison:
    return dataclasses.replace(seen, student=student, teacher=teacher)


def loss_of(case: Case, seen: Comparison) -> float:
    return float(case.objective.loss(seen).detach())


@pytest.mark.parametrize("id_", [id_ for id_ in TAUGHT if not CASES[id_].wider])
@given(seed=st.integers(0, 1000))
@runs(max_examples=25)
def test_an_objective_is_least_where_both_sides_agree(id_: str, seed: int) -> None:
    case, seen = CASES[id_], situation(CASES[id_], seed)
    same = {name: values.detach() for name, values in seen.student.items()}
    view = case.objective.teacher_view(same, seen.task, seen.pairs)
    agreed = loss_of(case, with_sides(seen, same, view))
    # Among other texts' vectors one's own is the nearest, but not the only one: that is 0 at temperature 0 alone.
    assert agreed == pytest.approx(0, abs=1e-5) if case.name != "contrastive" else agreed < loss_of(case, seen)
    assert loss_of(case, seen) > agreed + 1e-3


@every_case
def test_descending_its_gradient_makes_it_smaller(id_: str) -> None:
    case, seen = CASES[id_], situation(CASES[id_])
    before = case.objective.loss(seen)
    before.backward()
    read = {name: values for name, values in seen.student.items() if values.grad is not None}
    assert any(values.grad.any() for values in read.values())  # type: ignore[union-attr]
    moved = {name: (values - 0.01 * values.grad).detach() for name, values in read.items()}  # type: ignore[operator]
    assert loss_of(case, with_sides(seen, moved, seen.teacher)) < float(before.detach())


@every_case
def test_what_is_learnt_beside_the_student_gets_a_gradient(id_: str) -> None:
    case, seen = CASES[id_], situation(CASES[id_])
    projects = case.wider and case.name not in ("pairwise-similarity", "relational", "attention-relations")
    assert bool(list((seen.learned or nn.Module()).parameters())) == projects
    if projects:
        assert seen.learned is not None
        case.objective.loss(seen).backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in seen.learned.parameters())


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(id_: str, dtype: torch.dtype) -> None:
    case, seen = CASES[id_], situation(CASES[id_])
    halves = [
        {name: values.detach().to(dtype) if values.is_floating_point() else values for name, values in side.items()}
        for side in (seen.student, seen.teacher)
    ]
    floats = [{name: v.float() if v.is_floating_point() else v for name, v in side.items()} for side in halves]
    found = case.objective.loss(with_sides(seen, *halves))
    assert found.dtype == torch.float32 and found.ndim == 0
    assert float(found.detach()) == pytest.approx(loss_of(case, with_sides(seen, *floats)), rel=1e-6)


@pytest.mark.parametrize("id_", [id_ for id_, case in CASES.items() if case.name not in ("relational", "contrastive")])
def test_repeating_the_batch_keeps_the_size_of_the_term(id_: str) -> None:
    case, seen = CASES[id_], situation(CASES[id_])
    twice = [{name: torch.cat([v, v]) for name, v in side.items()} for side in (seen.student, seen.teacher, seen.batch)]
    repeated = dataclasses.replace(seen, student=twice[0], teacher=twice[1], batch=twice[2])
    # A text and its copy cost nothing: 48 of the 56 pairs are the 12 from before, four times over.
    expected = loss_of(case, seen) * (48 / 56 if case.name == "pairwise-similarity" else 1)
    assert loss_of(case, repeated) == pytest.approx(expected, rel=1e-4)


@every_case
def test_what_stands_at_padding_does_not_matter(id_: str) -> None:
    case, seen = CASES[id_], situation(CASES[id_])
    sides = (seen.student, seen.teacher)
    changed = [{name: spoilt(values.detach()) for name, values in side.items()} for side in sides]
    assert loss_of(case, with_sides(seen, *changed)) == pytest.approx(loss_of(case, seen), rel=1e-5)


def spoilt(values: torch.Tensor) -> torch.Tensor:
    padding = ~mask().bool()
    if values.ndim == 4:  # maps [batch, heads, queries, keys]
        return values.masked_fill(padding[:, None, :, None] | padding[:, None, None, :], 0.5)
    per_token = values.ndim == 3 and values.is_floating_point()
    return values.masked_fill(padding[..., None], 100.0) if per_token else values


@every_case
def test_a_row_of_nothing_but_padding_is_no_nan(id_: str) -> None:
    case, seen = CASES[id_], situation(CASES[id_])
    hidden = seen.batch["attention_mask"].clone()
    hidden[-1] = 0
    loss = case.objective.loss(dataclasses.replace(seen, batch={**seen.batch, "attention_mask": hidden}))
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(values.grad.isfinite().all()) for values in seen.student.values() if values.grad is not None)


# Two processes.


def rows_of(seen: Comparison, rows: slice) -> Comparison:
    """A part of the batch, its student with gradients of its own."""
    return dataclasses.replace(
        seen,
        student={name: values[rows].detach().clone().requires_grad_() for name, values in seen.student.items()},
        teacher={name: values[rows] for name, values in seen.teacher.items()},
        batch={name: values[rows] for name, values in seen.batch.items()},
    )


def found_by(case: Case, seen: Comparison) -> dict[str, torch.Tensor]:
    """The loss, and its gradient in every output of the student and in what is learnt beside it."""
    loss = case.objective.loss(seen)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {name: values.grad for name, values in seen.student.items() if values.grad is not None}
    for name, parameter in (seen.learned or nn.Module()).named_parameters():
        assert parameter.grad is not None
        found[f"learned/{name}"] = parameter.grad
    return found


def in_a_process(rank: int, folder: Path) -> None:
    """What each of two processes does, with its half of every batch."""
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    half = slice(2 * rank, 2 * rank + 2)
    found = {id_: found_by(case, rows_of(situation(case), half)) for id_, case in CASES.items()}
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_find_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for id_, case in CASES.items():
        alone = found_by(case, situation(case))
        assert first[id_].keys() == second[id_].keys() == alone.keys()
        for name, expected in alone.items():
            parts = first[id_][name], second[id_][name]
            # The trainer averages over processes. A row's gradient goes on to weights that all of them share.
            shared = name == "loss" or name.startswith("learned/")
            averaged = sum(parts) / 2 if shared else torch.cat(parts) / 2
            assert torch.allclose(averaged, expected, rtol=1e-4, atol=1e-6), f"{id_}: {name}"
        if case.name in IN_BATCH:  # and each of them sees the whole batch
            assert torch.allclose(first[id_]["loss"], second[id_]["loss"])


if __name__ == "__main__":
    in_a_process(int(sys.argv[1]), Path(sys.argv[2]))
