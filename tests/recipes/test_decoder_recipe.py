"""The recipe of a decoder, whole, on a tiny Llama: cut, distilled, made 2:4, distilled with its zeros held, judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from limbeck.backends.writing import WritingSettings
from limbeck.errors import InputError, UsageError
from limbeck.models.sparsity import is_semi_structured
from limbeck.recipes.generating import LanguageProgram, generate
from limbeck.recipes.progress import SILENT
from limbeck.recipes.runner import RecipeRun
from limbeck.recipes.schema import load_recipe
from limbeck.validate.records.report import Report, load_report
from limbeck.validate.rendering import render_html, render_markdown

EXAMPLE = Path(__file__).parents[2] / "examples" / "recipes" / "decoder.yaml"
LENGTH = 32
STAGES = ["shallow", "narrow", "recovered", "sparse", "sparse-recovered"]
EXPORTS = ["onnx", "openvino"]


def miniature(teacher: Path, train: Path, validation: Path) -> dict[str, Any]:
    """The example with another model and text, few steps and tokens, a program a kind, and limits that a model of
    random weights holds."""
    recipe: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    recipe |= {"teacher": str(teacher), "data": {"train": str(train), "validation": str(validation)}}
    for stage in recipe["stages"]:
        for verb in ("prune", "distill"):
            if verb in stage:
                stage[verb] |= {"max_length": LENGTH, **({"max_steps": 3} if verb == "distill" else {"samples": 8})}
    recipe["stages"][0]["prune"]["keep"] = 0.5  # of two layers
    recipe["stages"][1]["prune"]["keep"] = 0.5  # of 64 channels: what sparse kernels take
    exports = [export for export in recipe["exports"] if export["name"] in EXPORTS]
    for export in exports:
        export["shapes"] = {"max_sequence": LENGTH}
    recipe["constraints"] = [{"artifact": "*", "quality": {"perplexity_ratio": 2}}]
    recipe["gates"] = [{**gate, "min": 0.001} for gate in recipe["gates"]]
    texts = {"batch_size": [1, 2], "prompt_length": [8], "new_tokens": 8}
    bench = {"sequence_length": 16, "threads": 1, "rounds": 1, "generate": texts}
    small = {"teacher_runtime": "eager", "bench": bench}
    return {**recipe, "exports": exports, **small}


@pytest.fixture(scope="module")
def run(
    tiny_checkpoint: Callable[..., Path],
    texts: list[str],
    write_jsonl: Callable[[Path, Iterable[dict[str, Any]]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Report, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("decoder")
    parts = {"train": texts[:40], "validation": texts[40:]}
    files = [write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in part]) for name, part in parts.items()]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(miniature(tiny_checkpoint("llama", "text-generation"), *files)), encoding="utf-8")
    execution = RecipeRun(load_recipe(path), folder, folder / "run", SILENT)
    report = execution.run()
    return report, {record.name: folder / "run" / record.folder for record in execution.records}


@pytest.mark.thorough
def test_the_whole_way_is_gone(run: tuple[Report, dict[str, Path]]) -> None:
    report, folders = run
    assert list(folders) == ["plan", *STAGES, *EXPORTS, "measurement"]
    assert [stage.name for stage in report.stages] == STAGES
    assert [candidate.name for candidate in report.candidates] == EXPORTS
    judged = {(result.gate.metric, result.candidate, result.verdict) for result in report.gates}
    asked = ("perplexity_ratio", "token_agreement", "ttft_speedup_p50", "tpot_speedup_p50")
    assert judged == {(metric, name, "pass") for metric in asked for name in EXPORTS}
    failed = {check.name for _, check in report.checks() if not check.passed}
    assert failed == {"teacher"}  # random weights are no better than chance, which is said


@pytest.mark.thorough
def test_each_stage_is_measured_against_the_one_before(run: tuple[Report, dict[str, Path]]) -> None:
    report, folders = run
    before = report.candidates[0].metric("perplexity")
    assert before is not None and before.teacher is not None
    value = before.teacher
    for stage in report.stages:
        found = stage.metric("perplexity")
        assert found is not None and stage.loss is not None and stage.loss.metric == "perplexity"
        assert stage.loss.value == pytest.approx(found.value - value, abs=1e-6)
        assert stage.loss.low is not None and stage.loss.high is not None
        assert stage.loss.low <= stage.loss.value <= stage.loss.high
        value = found.value
    whole, shallow, narrow, *others = [report.teacher, *report.stages]
    assert whole is not None and whole.parameters is not None
    assert whole.parameters > shallow.parameters > narrow.parameters
    assert {stage.parameters for stage in others} == {narrow.parameters}
    assert [stage.verb for stage in report.stages] == ["prune", "prune", "distill", "prune", "distill"]
    exported = next(candidate for candidate in report.candidates if candidate.name == "onnx")
    student = next(stop for stop in exported.waypoints if stop.name == "student")
    assert student.metrics == [metric for metric in report.stages[-1].metrics if metric.data is not None]
    assert load_report(folders["measurement"]).stages == report.stages


@pytest.mark.thorough
def test_zeros_stay_while_it_learns(run: tuple[Report, dict[str, Path]]) -> None:
    report, folders = run
    zeros = {stage.name: stage.zeros for stage in report.stages}
    assert zeros["recovered"] == 0 and zeros["sparse"] > 0.05  # embeddings are most of it
    assert zeros["sparse-recovered"] >= zeros["sparse"]
    before, after = (load_file(folders[name] / "model.safetensors") for name in ("sparse", "sparse-recovered"))
    matrices = [name for name in after if ".layers." in name and after[name].ndim == 2]
    sparse = [name for name in matrices if is_semi_structured(after[name], axis=1)]
    assert len(sparse) == sum(is_semi_structured(before[name], axis=1) for name in matrices) >= 5
    assert all(not np.any(after[name][before[name] == 0]) for name in sparse)
    assert any(np.any(after[name] != before[name]) for name in sparse)


@pytest.mark.thorough
def test_the_table_has_teacher_stages_and_programs(run: tuple[Report, dict[str, Path]]) -> None:
    report, _ = run
    text, page = render_markdown(report), render_html(report)
    table = text.partition("### What each stage cost\n\n")[2].partition("\n\n")[0].splitlines()
    assert table[0].startswith("| Stage | What was done | Parameters | Zeros | Size | Perplexity | Lost")
    assert [row.split(" | ")[0].removeprefix("| ") for row in table[2:]] == ["teacher", *STAGES, *EXPORTS]
    assert "| prune: 2:4 by sparsegpt |" in table[6]
    assert 'id="stages"' in page and "distill: logits-kl" in page


@pytest.mark.thorough
def test_what_came_of_it_writes_as_its_student_does(run: tuple[Report, dict[str, Path]]) -> None:
    _, folders = run
    asked = WritingSettings(max_new_tokens=8)
    student, *programs = (
        generate(LanguageProgram.open(str(folders[subject]), threads=1), ["The kettle"], asked).continuations[0]
        for subject in ("sparse-recovered", *EXPORTS)
    )
    assert programs == [student, student] and student.tokens == 8


@pytest.mark.thorough
def test_every_step_says_how_fast_it_writes(run: tuple[Report, dict[str, Path]]) -> None:
    report, _ = run
    for row in (report.teacher, *report.stages, *report.candidates):
        assert row is not None
        names = [metric.name for metric in row.metrics]
        assert len(names) == len(set(names))  # memory and cold start once, though two benches saw them
        for name in ("ttft_p50_ms", "tokens_per_second", "tokens_per_second/2x8", "cache_mb"):
            metric = row.metric(name)
            assert metric is not None and metric.value > 0, (row.name, name)
    headings = render_markdown(report).partition("### What each stage cost\n\n")[2].splitlines()[0]
    assert "| First token (ms) | Tokens/s | Time |" in headings


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"task": "fill-mask"}, "bench.generate times text that is written, and fill-mask writes none"),
        ({"bench": {"generate": {"prompt_length": [250]}}}, r"texts of 282 tokens, and the export .* holds 256"),
        ({"bench": {"generate": {"new_tokens": 1}}}, "greater than or equal to 2"),
        ({"bench": {"generate": {"batch_size": []}}}, "at least 1 item"),
    ],
)
def test_texts_that_could_not_be_written_are_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    recipe = {**yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")), **changed}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        load_recipe(tmp_path / "recipe.yaml")


def test_texts_longer_than_the_model_has_positions_for_are_refused_before_any_stage(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "Rain"}])
    recipe = miniature(tiny_checkpoint("llama", "text-generation"), rows, rows)
    recipe["exports"] = [{**export, "shapes": {}} for export in recipe["exports"]]
    recipe["bench"]["generate"]["prompt_length"] = [60]  # and 8 new ones
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(UsageError, match=r"texts of 68 tokens, and .* has positions for 64"):
        RecipeRun(load_recipe(tmp_path / "recipe.yaml"), tmp_path, tmp_path / "run", SILENT).run()
    assert not (tmp_path / "run").exists()
