"""Whole distillations that reach sparsity on the way: what they end with, what they trace, and resuming them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from limbeck.distill.callbacks import KeepZeros, Modification
from limbeck.distill.distillation import Surroundings, distill
from limbeck.distill.settings import DistillSettings, StudentSettings
from limbeck.distill.student import draw_student
from limbeck.distill.trainer import Evaluation
from limbeck.errors import UsageError
from limbeck.models.anatomy import ANATOMIES, anatomy_of, reduction_axis
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.models.sparsity import is_semi_structured
from limbeck.prune.pruning import prune
from limbeck.prune.settings import PruneSettings
from limbeck.prune.sparsify_settings import SparsifySettings
from limbeck.recipes.steps import sparsification

TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def teacher(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint("bert"), task="sentence-similarity")


@pytest.fixture
def data(teacher: Checkpoint, texts: list[str], write_jsonl: Callable[..., Path], tmp_path: Path) -> Data:
    return teacher.read(write_jsonl(tmp_path / "data" / "rows.jsonl", [{"text": text} for text in texts]))


def drawn(teacher: Checkpoint) -> Checkpoint:
    return draw_student(teacher, StudentSettings(layers=1))


def change(**settings: Any) -> Modification:
    return sparsification(SparsifySettings(**settings))


def curves_of(checkpoint: Checkpoint) -> dict[str, dict[float, float]]:
    return {
        curve.name: dict(zip(curve.steps, curve.values, strict=True)) for curve in checkpoint.lineage.steps[-1].curves
    }


def zero_shares(checkpoint: Checkpoint) -> dict[str, float]:
    matrices = anatomy_of(checkpoint.model).linear_layers(checkpoint.model)
    return {name: float((module.weight == 0).float().mean()) for name, module in matrices}


TRAINED = DistillSettings(max_steps=20, batch_size=8, learning_rate=3e-3, save_every=3, weight_decay=0.1)
KINDS: dict[str, dict[str, Any]] = {
    "magnitude": {"target": 0.8, "every": 3},
    "movement": {"target": 0.8, "method": "movement", "every": 1, "allocation": "global", "schedule": "exponential"},
    "sr-ste": {"pattern": "2:4", "method": "sr-ste"},
    "fixed": {"pattern": "2:4", "begin": 0.3},
}


def test_a_distillation_ends_at_the_sparsity_and_says_so(teacher: Checkpoint, data: Data) -> None:
    wanted = {"target": 0.8, "schedule": "linear", "begin": 0.2, "end": 0.6, "every": 2}
    measured: list[float] = []

    def measure(student: Checkpoint) -> dict[str, float]:
        measured.append(sum(zero_shares(student).values()) / 6)
        return {"agreement": 1 - measured[-1]}  # the denser, the better

    evaluation = Evaluation(measure, "agreement", higher_is_better=True)
    settings = TRAINED.model_copy(update={"evaluate_every": 7, "patience": 1})
    around = Surroundings(evaluation=evaluation, modification=change(**wanted))
    after = distill(drawn(teacher), teacher, settings, data, around)
    assert all(share == pytest.approx(0.8, abs=1e-3) for share in zero_shares(after).values())
    curves = curves_of(after)
    # A point says what was trained until then: at 6 the first mask with zeros is still to come.
    shares = {at: round(value, 2) for at, value in curves["sparsity"].items()}
    assert [shares[at] for at in (4, 6, 7, 8, 9, 10, 12, 13, 19, 20)] == [0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.8, 0.8, 0.8]
    kept = {at: round(1 - value, 2) for at, value in curves["eval/agreement"].items()}
    assert kept == {6: 0, 7: 0.2, 8: 0.2, 10: 0.4, 12: 0.6, 14: 0.8, 20: 0.8}  # before each cut, and every 7
    step = after.lineage.steps[-1]
    assert step.method.startswith("embedding-cosine + ") and step.method.endswith(", 80 % zeros by magnitude")
    assert step.settings["sparsify"] == SparsifySettings(**wanted).model_dump(mode="json")
    assert step.note == "79.98 % of 8,192 weights in 6 of 6 matrices are zero."


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.thorough] * (kind != "magnitude")) for kind in KINDS]
)
def test_a_killed_run_ends_in_the_same_weights(teacher: Checkpoint, data: Data, tmp_path: Path, kind: str) -> None:
    class Killed(Exception):
        pass

    def dying(done: int, total: int) -> None:
        if done == 14:
            raise Killed

    whole = distill(drawn(teacher), teacher, TRAINED, data, Surroundings(modification=change(**KINDS[kind])))
    work = tmp_path / "work"
    around = Surroundings(work=work, progress=dying, modification=change(**KINDS[kind]))
    with pytest.raises(Killed):
        distill(drawn(teacher), teacher, TRAINED, data, around)
    with pytest.raises(UsageError, match="its modification is not the same"):
        distill(drawn(teacher), teacher, TRAINED, data, Surroundings(work=work))
    steps: list[int] = []
    around = Surroundings(
        work=work, progress=lambda done, total: steps.append(done), modification=change(**KINDS[kind])
    )
    resumed = distill(drawn(teacher), teacher, TRAINED, data, around)
    assert steps[0] == 12
    assert resumed.hash == whole.hash
    assert curves_of(resumed)["sparsity"] == curves_of(whole)["sparsity"]
    assert sum(zero_shares(whole).values()) > 2.9


@pytest.mark.parametrize("kind", ["sr-ste", "fixed"])
def test_a_pattern_is_there_at_the_end(teacher: Checkpoint, data: Data, kind: str) -> None:
    after = distill(drawn(teacher), teacher, TRAINED, data, Surroundings(modification=change(**KINDS[kind])))
    for _, module in anatomy_of(after.model).linear_layers(after.model):
        assert is_semi_structured(module.weight.detach().numpy(), reduction_axis(module))


def test_accumulated_batches_are_one_step(teacher: Checkpoint, data: Data) -> None:
    """The same rows in one batch of 16 and in two of 8 give the same masks; the objective is a mean over rows."""
    settings = TRAINED.model_copy(update={"objectives": {"embedding-cosine": 1}, "max_steps": 6, "batch_size": 16})
    halves = settings.model_copy(update={"batch_size": 8, "gradient_accumulation": 2})
    around = Surroundings(modification=change(target=0.5, method="movement", begin=0.3, every=1))
    whole = distill(drawn(teacher), teacher, settings, data.head(16), around)
    parts = distill(drawn(teacher), teacher, halves, data.head(16), around)
    for (name, one), (_, two) in zip(
        anatomy_of(whole.model).linear_layers(whole.model),
        anatomy_of(parts.model).linear_layers(parts.model),
        strict=True,
    ):
        same = float(((one.weight == 0) == (two.weight == 0)).float().mean())
        assert same > 0.99, name


def test_zeros_survive_a_later_distillation(teacher: Checkpoint, data: Data, tmp_path: Path) -> None:
    short = TRAINED.model_copy(update={"max_steps": 4})
    sparse = distill(drawn(teacher), teacher, short, data, Surroundings(modification=change(**KINDS["movement"])))
    sparse.save(tmp_path / "sparse")
    later = distill(load_checkpoint(tmp_path / "sparse", "sentence-similarity"), teacher, short, data)
    assert zero_shares(later) == zero_shares(sparse)
    assert later.hash != sparse.hash


@pytest.mark.parametrize("family", sorted(ANATOMIES))
def test_a_pattern_survives_the_steps_of_an_optimiser_in_every_family(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    sparse = prune(load_checkpoint(tiny_checkpoint(family)), PruneSettings(pattern="2:4"))
    before = {name: module.weight.detach().clone() for name, module in patterned(sparse)}
    assert before
    optimizer = torch.optim.AdamW(sparse.model.parameters(), lr=1e-2, weight_decay=0.1)
    callback = KeepZeros(sparse.module)
    for step in range(2):
        for parameter in sparse.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        callback.on_optimizer_step(None, TrainerState(), None)
    for name, weight in before.items():
        after = sparse.model.get_submodule(name).weight
        assert torch.equal(after == 0, weight == 0) and not torch.equal(after, weight)
    sparse.save(tmp_path / "trained")
    assert {name for name, _ in patterned(load_checkpoint(tmp_path / "trained"))} == set(before)


def patterned(checkpoint: Checkpoint) -> list[tuple[str, Any]]:
    """The matrices that are 2:4, by name."""
    matrices = anatomy_of(checkpoint.model).linear_layers(checkpoint.model)
    return [
        (name, module)
        for name, module in matrices
        if is_semi_structured(module.weight.detach().numpy(), reduction_axis(module))
    ]
