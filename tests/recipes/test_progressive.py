"""Progressive distillation: stages with their own text and teacher, the teacher's outputs kept for all of them, weights
chosen on rows of their own, and training that goes on where it was killed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from limbeck.errors import InputError, UsageError
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.recipes.progress import SILENT, Progress
from limbeck.recipes.runner import RecipeRun
from limbeck.recipes.schema import load_recipe

Recipe = dict[str, Any]


@pytest.fixture(scope="module")
def recipe(
    tiny_checkpoint: Callable[..., Path],
    texts: list[str],
    write_jsonl: Callable[[Path, Iterable[dict[str, Any]]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recipe:
    """Without stages."""
    folder = tmp_path_factory.mktemp("progressive-data")
    parts = {"train": texts[:24], "more": texts[24:40], "development": texts[40:52], "validation": texts[52:]}
    for name, part in parts.items():
        write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in part])
    return {
        "name": "tiny",
        "teacher": str(tiny_checkpoint("bert")),
        "task": "sentence-similarity",
        "data": {name: str(folder / f"{name}.jsonl") for name in ("train", "development", "validation")},
        "bench": {"sequence_length": 16, "threads": 1, "rounds": 1},
    }


def stage(name: str, **values: Any) -> dict[str, Any]:
    """A stage that trains for two steps."""
    own = {key: values.pop(key) for key in ("start", "teacher", "data") if key in values}
    objectives = {"embedding-cosine": 1}
    return {"name": name, **own, "distill": {"max_steps": 2, "batch_size": 8, "objectives": objectives, **values}}


def read(recipe: Recipe, folder: Path, *stages: dict[str, Any]) -> Any:
    path = folder / "recipe.yaml"
    exports = [{"name": "onnx", "start": stages[-1]["name"], "backend": "onnx"}]
    path.write_text(yaml.safe_dump({**recipe, "stages": list(stages), "exports": exports}), encoding="utf-8")
    return load_recipe(path)


class AfterStages(Progress):
    """Ends a run where its exports begin, or at a step of its training."""

    def __init__(self, step: int | None = None) -> None:
        self.step, self.steps = step, []

    def begin(self, stage: str) -> None:
        if stage == "onnx":
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        return

    def advance(self, done: int, total: int) -> None:
        self.steps.append(done)
        if done == self.step:
            raise KeyboardInterrupt


def trained(recipe: Recipe, folder: Path, *stages: dict[str, Any], progress: Progress | None = None) -> Path:
    """Run the stages, nothing after them; the folder of the run."""
    folder.mkdir(exist_ok=True)
    with pytest.raises(KeyboardInterrupt):
        RecipeRun(read(recipe, folder, *stages), folder, folder / "run", progress or AfterStages()).run()
    return folder / "run"


def result(out: Path, name: str) -> Checkpoint:
    (found,) = (path for path in out.glob(f"{name}-*") if path.is_dir() and not path.name.endswith(".training"))
    return load_checkpoint(found)


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    """What is used of the result: an embedder has no pooler, and transformers makes one up."""
    parameters = result(out, name).model.named_parameters()
    return {name: value for name, value in parameters if not name.startswith("pooler.")}


def test_an_assistant_teaches_with_text_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    more = str(Path(recipe["data"]["train"]).with_name("more.jsonl"))
    assistant = stage("assistant", student={"layers": 2})
    student = stage("student", start="teacher", teacher="assistant", data=more, student={"layers": 1})
    out = trained(recipe, tmp_path, assistant, student)
    (step,) = result(out, "student").lineage.steps
    assert step.teacher == result(out, "assistant").hash
    assert step.parent != result(out, "assistant").hash
    assert step.data is not None and (step.data.source, step.data.rows) == ("more.jsonl", 16)


def test_a_student_drawn_from_the_assistant_is_taught_by_the_teacher(recipe: Recipe, tmp_path: Path) -> None:
    out = trained(recipe, tmp_path, stage("wide", student={"ffn": 48}), stage("small", student={"layers": 1}))
    steps, teacher = result(out, "small").lineage.steps, load_checkpoint(recipe["teacher"])
    assert [each.teacher for each in steps] == [teacher.hash] * 2
    assert result(out, "small").model.config.intermediate_size == 48


def test_layer_by_layer_only_that_layer_learns(recipe: Recipe, tmp_path: Path) -> None:
    hidden = {"objectives": {"hidden-states": {"layers": {0: 0}}}, "train_layers": [0]}
    out = trained(recipe, tmp_path, stage("first", student={"ffn": 48}), stage("second", **hidden))
    before, after = (weights(out, name) for name in ("first", "second"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("encoder.layer.0.") for name in moved)


def test_stages_that_read_the_same_of_the_teacher_share_its_outputs(recipe: Recipe, tmp_path: Path) -> None:
    cached = {**recipe, "teacher_cache": True}
    alike = {"objectives": {"pairwise-similarity": 2, "embedding-cosine": 1}}
    other = {"objectives": {"hidden-states": {"layers": {-1: -1}}}}
    out = trained(cached, tmp_path, stage("a", student={"layers": 1}), stage("b", **alike), stage("c", **other))
    assert len(list((out / "teacher-outputs").glob("*/manifest.json"))) == 2
    plain = trained(recipe, tmp_path / "plain", stage("a", student={"layers": 1}))
    kept, asked = weights(out, "a"), weights(plain, "a")
    assert all(torch.allclose(kept[name], asked[name], atol=1e-5) for name in kept)


def test_weights_are_chosen_on_the_development_rows(recipe: Recipe, tmp_path: Path) -> None:
    measured = {"student": {"layers": 1}, "max_steps": 4, "evaluate_every": 2}
    out = trained(recipe, tmp_path, stage("student", **measured))
    (step,) = result(out, "student").lineage.steps
    curves = {curve.name: curve.steps for curve in step.curves}
    assert curves["eval/agreement_spearman"] == [2, 4]


def test_a_killed_training_goes_on_to_the_same_weights(recipe: Recipe, tmp_path: Path) -> None:
    long = stage("student", student={"layers": 1}, max_steps=8, save_every=2)
    out = trained(recipe, tmp_path, long, progress=AfterStages(step=5))
    assert [path.name.endswith(".training") for path in out.iterdir()] == [True]
    resumed = AfterStages()
    trained(recipe, tmp_path, long, progress=resumed)
    assert resumed.steps[0] == 4
    assert not list(out.glob("*.training"))
    whole = trained(recipe, tmp_path / "whole", long)
    found, wanted = weights(out, "student"), weights(whole, "student")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_was_the_default_may_be_said_without_training_again(recipe: Recipe, tmp_path: Path) -> None:
    out = trained(recipe, tmp_path, stage("a", student={"layers": 1}), stage("b"))
    before = result(out, "b").lineage
    renamed = read(recipe, tmp_path, stage("a", student={"layers": 1}), stage("b", start="a", teacher="teacher"))
    with pytest.raises(KeyboardInterrupt):
        RecipeRun(renamed, tmp_path, out, AfterStages()).run()
    assert result(out, "b").lineage == before


@pytest.mark.parametrize(
    ("stages", "changed", "said"),
    [
        ([stage("a", teacher="b"), stage("b")], {}, "a is taught by b, which no stage above it makes"),
        ([{"name": "a", "prune": {"pattern": "2:4"}, "teacher": "teacher"}], {}, "has no use for a teacher"),
        (
            [stage("a", patience=2)],
            {"development": None},
            r"chooses its weights .*\(patience\).* needs data.development",
        ),
        ([stage("a")], {"development": "VALIDATION"}, "data.development is data.validation"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(
    stages: list[dict[str, Any]], changed: dict[str, Any], said: str, recipe: Recipe, tmp_path: Path
) -> None:
    same = {key: recipe["data"]["validation"] if value == "VALIDATION" else value for key, value in changed.items()}
    with pytest.raises(InputError, match=said):
        read({**recipe, "data": {**recipe["data"], **same}}, tmp_path, *stages)


def test_a_cache_cannot_answer_for_text_that_is_yet_to_be_written(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"on_policy.*no teacher_cache can answer"):
        read({**recipe, "teacher_cache": True}, tmp_path, stage("a", on_policy={}))


def cycle(**values: Any) -> dict[str, Any]:
    whole = {"prune": {"structure": "ffn", "keep": 0.8}, "distill": {}, "rounds": 2, "floor": {"cosine_mean": 0}}
    return {"name": "a", "cycle": {**whole, **values}}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (cycle(prune={"pattern": "2:4"}), "a pattern is whole after one round"),
        (cycle(prune={"structure": "ffn", "keep": 1}), "cuts nothing"),
        (cycle(distill={"student": {"layers": 1}}), "draw the student there"),
        (cycle(floor={}), "needs until, floor or both"),
        (cycle(until={}), "until states no cost"),
        (cycle(until={"size_mb": 3}), "until needs export"),
        (cycle(until={"size_mb": 3, "export": "onx"}), "names the export onx; there are onnx"),
        (cycle(until={"latency_p50": 3}), "did you mean 'latency_p50_ms'"),
    ],
)
def test_a_cycle_that_contradicts_itself_is_refused(
    broken: dict[str, Any], said: str, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        read(recipe, tmp_path, broken)


def test_an_objective_that_does_not_exist_is_refused_before_any_stage(recipe: Recipe, tmp_path: Path) -> None:
    wrong = read(recipe, tmp_path, stage("a", student={"layers": 1}), stage("b", objectives={"embedding-cosin": 1}))
    with pytest.raises(UsageError, match="Did you mean 'embedding-cosine'"):
        RecipeRun(wrong, tmp_path, tmp_path / "run", SILENT).run()
    assert not (tmp_path / "run").exists()
