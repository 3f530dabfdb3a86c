"""A run does each stage once: it resumes, redoes just what a change concerns, and refuses first what cannot be had."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck.errors import BackendUnavailable, InputError, UsageError
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.progress import SILENT, Progress
from limbeck.recipes.runner import RecipeRun
from limbeck.recipes.schema import Constraints, load_recipe
from limbeck.recipes.sources import Sources
from limbeck.validate.records.report import Report, load_report

Recipe = dict[str, Any]
EXPORTS = ("onnx", "openvino")
STAGES = ("plan", "student", "narrow", *EXPORTS, "measurement")


@dataclass(frozen=True)
class Finished:
    """One run: what it reported, the stages that it did, and those that it found done."""

    report: Report
    done: list[str]
    resumed: list[str]
    folders: dict[str, Path]


def run(recipe: Recipe, out: Path, progress: Progress = SILENT) -> Finished:
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    execution = RecipeRun(load_recipe(path), path.parent, out, progress)
    report = execution.run()
    records = execution.records
    return Finished(
        report,
        [record.name for record in records if not record.resumed],
        [record.name for record in records if record.resumed],
        {record.name: out / record.folder for record in records},
    )


def changed(recipe: Recipe, part: str, index: int, **values: Any) -> Recipe:
    """The recipe with other values in one entry of one of its lists."""
    entries = list(recipe[part])
    entries[index] = {**entries[index], **values}
    return {**recipe, part: entries}


@pytest.fixture(scope="module")
def recipe(
    tiny_checkpoint: Callable[..., Path],
    texts: list[str],
    write_jsonl: Callable[[Path, Iterable[dict[str, Any]]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe-data")
    train = write_jsonl(folder / "train.jsonl", [{"text": text} for text in texts[:32]])
    held_out = write_jsonl(folder / "held-out.jsonl", [{"text": text} for text in texts[32:]])
    return {
        "name": "tiny",
        "teacher": str(tiny_checkpoint("bert")),
        "task": "sentence-similarity",
        "data": {"train": str(train), "validation": str(held_out)},
        "constraints": [{"artifact": "onnx", "size_mb": 5, "quality": {"agreement_spearman": -1}}],
        "stages": [
            {
                "name": "student",
                "distill": {"student": {"layers": 1}, "max_steps": 2, "batch_size": 8},
                "rationale": "half the depth",
            },
            {"name": "narrow", "prune": {"structure": "ffn", "keep": 0.5, "method": "taylor"}},
        ],
        "exports": [{"name": name, "start": "narrow", "backend": name} for name in EXPORTS],
        "bench": {"sequence_length": 16, "threads": 1, "rounds": 1},
        "gates": [{"metric": "cosine_mean", "candidate": "o*", "min": -1}],
    }


@pytest.fixture(scope="module")
def first(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(recipe, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def out(first: Finished) -> Path:
    """The folder of the first run."""
    return first.folders["student"].parent


@pytest.fixture
def trained_nothing(tmp_path: Path) -> Path:
    """A folder for a run that must be refused."""
    return tmp_path / "refused"


def test_a_run_does_every_stage_and_reports(first: Finished, out: Path) -> None:
    assert first.done == list(STAGES)
    assert first.report.verdict == "pass"
    assert [candidate.name for candidate in first.report.candidates] == list(EXPORTS)
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        "report.html", "report.json", "report.md", "junit.xml", "monitoring.json"
    }  # fmt: skip
    assert load_report(out).gates == first.report.gates
    assert load_checkpoint(first.folders["narrow"]).lineage.steps[-1].verb == "prune"


@pytest.mark.thorough
def test_slices_are_measured_with_what_was_made_already(first: Finished, recipe: Recipe, out: Path) -> None:
    slices = {"files": {"seen": recipe["data"]["train"]}, "by": ["text"], "builtin": ["case"]}
    wanted = {**recipe, "slices": slices}
    with pytest.raises(InputError, match=r"'text' of .* has 32 values"):
        run(wanted, out)
    slices["by"] = []
    again = run(wanted, out)
    assert again.done == ["measurement"]
    assert [part.name for part in again.report.candidates[0].slices] == ["seen", "case"]
    failed = {check.name for _, check in again.report.checks() if not check.passed}
    assert failed == {"unseen data, slice seen"}


def test_constraints_are_gates_of_the_result(first: Finished) -> None:
    judged = [(result.gate.metric, result.candidate) for result in first.report.gates]
    assert judged[:2] == [("size_mb", "onnx"), ("agreement_spearman", "onnx")]
    assert [candidate for metric, candidate in judged if metric == "cosine_mean"] == list(EXPORTS)
    assert first.report.constraints[0].startswith("size_mb of onnx")


def test_a_constraint_on_quality_holds_it_from_its_worse_side() -> None:
    limits = Constraints(quality={"spearman_kept": 0.97, "perplexity_ratio": 1.2})
    assert [(gate.metric, gate.min, gate.max) for gate in limits.gates()] == [
        ("spearman_kept", 0.97, None), ("perplexity_ratio", None, 1.2)
    ]  # fmt: skip


def test_the_plan_says_what_the_artifact_will_cost(first: Finished) -> None:
    (prediction,) = json.loads((first.folders["plan"] / "plan.json").read_text())["predictions"]
    found = first.report.candidates[0].metric("size_mb")
    assert found is not None
    assert prediction["artifact"] == "onnx"
    assert prediction["parameters"] == load_checkpoint(first.folders["narrow"]).parameters
    assert prediction["costs"]["size_mb"] == pytest.approx(found.value, rel=0.1)


def test_the_rationale_reaches_lineage_and_report(first: Finished, out: Path) -> None:
    lineage = json.loads((first.folders["narrow"] / "lineage.json").read_text())
    assert lineage["steps"][0]["rationale"] == "half the depth"
    assert first.report.steps[0].rationale == "half the depth"
    assert all("half the depth" in (out / name).read_text() for name in ("report.html", "report.md"))


def test_a_second_run_resumes_everything(first: Finished, recipe: Recipe, out: Path) -> None:
    started = time.monotonic()
    again = run(recipe, out)
    assert time.monotonic() - started < 2
    assert again.resumed == list(STAGES)
    assert again.report.gates == first.report.gates


def test_a_changed_gate_does_nothing_again_and_changes_the_verdict(recipe: Recipe, out: Path) -> None:
    again = run(changed(recipe, "gates", 0, min=2), out)
    assert again.done == []
    assert again.report.verdict == "fail"
    assert load_report(out).verdict == "fail"


def test_a_changed_export_does_itself_and_the_measurement_again(recipe: Recipe, out: Path) -> None:
    again = run(changed({**recipe, "constraints": []}, "exports", 0, shapes={"max_batch": 4}), out)
    assert again.done == ["onnx", "measurement"]
    assert again.resumed == ["student", "narrow", "openvino"]


class StopAt(Progress):
    """Ctrl-C when a stage says a certain thing."""

    def __init__(self, stage: str, text: str) -> None:
        self.wanted, self.now = (stage, text), ""

    def begin(self, stage: str) -> None:
        self.now = stage

    def say(self, text: str) -> None:
        if (self.now, text) == self.wanted:
            raise KeyboardInterrupt

    def advance(self, done: int, total: int) -> None:
        return


def folders_of(out: Path) -> dict[str, int]:
    """Stage to when its folder was made."""
    return {path.name.rpartition("-")[0]: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.thorough
def test_an_interrupted_stage_is_done_anew_and_those_before_it_are_not(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    one = {**recipe, "constraints": [], "exports": recipe["exports"][:1]}
    with pytest.raises(KeyboardInterrupt):
        run(one, out, StopAt("onnx", "auditing the weights"))
    before = folders_of(out)
    assert set(before) == {"student", "narrow"}
    with pytest.raises(KeyboardInterrupt):
        run(one, out, StopAt("measurement", "onnx"))
    after = folders_of(out)
    assert set(after) == {"student", "narrow", "onnx"}
    assert all(after[stage] == made for stage, made in before.items())


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"size_mb": 0.001}, "size_mb = 0.001 cannot be met"),
        pytest.param({"speedup_p50": 100_000}, "speedup_p50 = 100000 cannot be met", marks=pytest.mark.thorough),
        ({"energy_mj": 1e-6}, "energy_mj on onnx cannot be checked here|energy_mj = 1e-06 cannot be met"),
    ],
)
def test_an_impossible_constraint_is_refused_before_training(
    limits: dict[str, float], said: str, recipe: Recipe, trained_nothing: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        run({**recipe, "constraints": [{"artifact": "onnx", **limits}]}, trained_nothing)
    assert not trained_nothing.exists() or list(trained_nothing.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"backend": "openvno"}, "no backend 'openvno'.*Did you mean 'openvino'"),
        ({"precision": "fp8"}, "onnx has no precision fp8"),
        ({"sparsity": "2:4"}, "onnx makes no use of 2:4"),
    ],
)
def test_an_impossible_export_is_refused_before_training(
    values: dict[str, str], said: str, recipe: Recipe, trained_nothing: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        run(changed(recipe, "exports", 0, **values), trained_nothing)
    assert not trained_nothing.exists()


def test_unusable_validation_data_is_refused_before_training(
    recipe: Recipe, trained_nothing: Path, write_jsonl: Callable[..., Path]
) -> None:
    odd = write_jsonl(trained_nothing.parent / "odd.jsonl", [{"words": "Go."}])
    with pytest.raises(InputError, match=r"odd\.jsonl has no column"):
        run({**recipe, "data": {**recipe["data"], "validation": str(odd)}}, trained_nothing)
    assert not trained_nothing.exists()


def test_a_teacher_in_a_package_that_is_not_installed(recipe: Recipe, trained_nothing: Path) -> None:
    with pytest.raises(BackendUnavailable) as raised:
        run({**recipe, "teacher": "package:no_such_package_of_models/model"}, trained_nothing)
    assert raised.value.hint == "pip install no-such-package-of-models"


def test_a_built_in_text_that_is_not_there() -> None:
    with pytest.raises(InputError, match="builtin:train, builtin:validation"):
        Sources(Path()).data("builtin:tain")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda r: {**r, "stagse": []}, "a recipe has no key 'stagse' .did you mean 'stages'?"),
        (lambda r: changed(r, "stages", 0, distill={"max_stepz": 1}), "stages.0.distill has no key 'max_stepz'"),
        (lambda r: changed(r, "exports", 1, precison="fp32"), "exports.1 has no key 'precison'"),
        (lambda r: changed(r, "constraints", 0, speedup=2), "did you mean 'speedup_p50'"),
        (lambda r: changed(r, "exports", 0, start="narow"), "onnx starts from narow"),
        (lambda r: changed(r, "exports", 1, name="onnx"), "name onnx is given twice"),
        (lambda r: changed(r, "stages", 1, name="measurement"), "name measurement is taken"),
        (lambda r: changed(r, "stages", 1, prune=None), "exactly one of distill, prune and cycle"),
        (lambda r: changed(r, "stages", 1, prune={"structure": "ffn", "keep": 2}), "more than 0 and at most 1"),
        (lambda r: changed(r, "constraints", 0, artifact="onx"), "names onx"),
        (lambda r: changed(r, "gates", 0, candidate="onx*"), r"cosine_mean names onx\*"),
        (lambda r: changed(r, "gates", 0, slice="typos"), "names the slice typos, but the recipe has no slices"),
        (
            lambda r: {**r, "slices": {"builtin": ["typo"]}},
            "slices.builtin.0: Input should be 'length', 'position', 'typos'",
        ),
        (lambda r: {**r, "task": None}, "task: "),
    ],
)
def test_an_error_in_a_recipe_names_its_key(
    broken: Callable[[Recipe], Recipe], said: str, recipe: Recipe, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(broken(recipe)), encoding="utf-8")
    with pytest.raises(InputError, match=said) as raised:
        load_recipe(path)
    assert str(path) in raised.value.message


@pytest.mark.parametrize(("content", "said"), [("a: [", "not valid YAML"), ("- a", "no mapping"), (None, "not exist")])
def test_a_file_that_is_no_recipe(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        load_recipe(path)
