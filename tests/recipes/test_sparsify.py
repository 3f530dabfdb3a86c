"""`sparsify` beside `distill`: in a recipe, on the command line, and with two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from limbeck.cli.distill import sparsify_settings
from limbeck.cli.main import _run
from limbeck.errors import InputError, UsageError
from limbeck.models.lineage import Lineage
from limbeck.prune.sparsify_settings import SparsifySettings
from limbeck.recipes.keys import Keys
from limbeck.recipes.progress import SILENT
from limbeck.recipes.runner import RecipeRun
from limbeck.recipes.schema import load_recipe
from limbeck.recipes.sources import Sources

Recipe = dict[str, Any]
SPARSIFY = {"target": 0.8, "method": "movement", "every": 1}


@pytest.fixture(scope="module")
def recipe(
    tiny_checkpoint: Callable[..., Path],
    texts: list[str],
    write_jsonl: Callable[[Path, Iterable[dict[str, Any]]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe-data")
    rows = [{"text": text} for text in texts]
    parts = {"train": rows[:32], "validation": rows[32:48], "development": rows[48:]}
    trained = {"student": {"layers": 1}, "max_steps": 10, "batch_size": 8, "evaluate_every": 5}
    return {
        "name": "sparse",
        "teacher": str(tiny_checkpoint("bert")),
        "task": "sentence-similarity",
        "data": {name: str(write_jsonl(folder / f"{name}.jsonl", part)) for name, part in parts.items()},
        "stages": [{"name": "sparse", "distill": trained, "sparsify": SPARSIFY, "rationale": "zeros compress"}],
        "exports": [{"name": "onnx", "start": "sparse", "backend": "onnx"}],
        "bench": {"rounds": 1, "sequence_length": 16},
    }


def run(recipe: Recipe, out: Path) -> dict[str, Path]:
    """The folder of each stage, after a run."""
    path = out.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    execution = RecipeRun(load_recipe(path), path.parent, out, SILENT)
    execution.run()
    return {record.name: out / record.folder for record in execution.records}


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """The matrices inside the layers."""
    weights = load_file(folder / "model.safetensors")
    return {name: weight for name, weight in weights.items() if ".layer." in name and weight.ndim == 2}


def zero_share(weights: Iterable[torch.Tensor]) -> float:
    zeros = torch.cat([(weight == 0).flatten() for weight in weights])
    return float(zeros.float().mean())


@pytest.mark.thorough
def test_a_stage_becomes_sparse_while_it_trains(recipe: Recipe, tmp_path: Path) -> None:
    folders = run(recipe, tmp_path / "run")
    found = matrices(folders["sparse"])
    assert len(found) == 6
    assert zero_share(found.values()) == pytest.approx(0.8, abs=1e-3)
    lineage = Lineage.load(folders["sparse"])
    assert lineage is not None
    step = lineage.steps[-1]
    assert step.method.endswith(", 80 % zeros by movement")
    assert step.settings["sparsify"] == SparsifySettings(**SPARSIFY).model_dump(mode="json")
    assert step.note == "79.98 % of 8,192 weights in 6 of 6 matrices are zero."
    traced = [json.loads(line) for line in (folders["sparse"] / "trace.jsonl").read_text().splitlines()]
    assert [round(line["sparsity"], 2) for line in traced] == [0, 0, 0.34, 0.56, 0.7, 0.77, 0.8, 0.8, 0.8, 0.8]
    cuts = [line for line in traced if "eval/agreement_spearman" in line]
    assert [line["training_step"] for line in cuts] == [2, 3, 4, 5, 6, 7, 10]
    assert all("loss" in line for line in cuts)


def test_other_sparsity_is_another_stage(recipe: Recipe, tmp_path: Path) -> None:
    stage = recipe["stages"][0]
    names = set()
    for sparsify in (SPARSIFY, {**SPARSIFY, "target": 0.7}, None):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, "stages": [{**stage, "sparsify": sparsify}]}))
        names.add(Keys(load_recipe(path), Sources(tmp_path), recipe["teacher"]).everything()["sparse"])
    assert len(names) == 3


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"prune": {"pattern": "2:4"}}, "needs a training beside it"),
        ({"distill": {}, "sparsify": {"target": 1.5}}, "must be more than 0 and less than 1"),
        ({"distill": {}, "sparsify": {"target": 0.5, "begin": 0.9}}, "0 <= begin < end <= 1"),
        ({"distill": {}, "sparsify": {"target": 0.5, "shedule": "cubic"}}, "did you mean 'schedule'"),
        ({"distill": {}, "sparsify": {"target": 0.5, "schedule": "cubical"}}, "Did you mean 'cubic'"),
        ({"distill": {}, "sparsify": {"pattern": 124}}, "reads as a number"),
    ],
)
def test_recipes_that_are_wrong(recipe: Recipe, stage: Recipe, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "stages": [{"name": "sparse", "sparsify": SPARSIFY, **stage}]}))
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert said in caught.value.message


def test_options_and_files_say_the_same(tmp_path: Path) -> None:
    given = ["target=0.8", "method=movement", "schedule=linear", "every=5", "block=[4,1]"]
    settings = sparsify_settings(given)
    assert settings == SparsifySettings(target=0.8, method="movement", schedule="linear", every=5, block=(4, 1))
    (tmp_path / "sparse.yaml").write_text('pattern: "2:4"\nmethod: sr-ste\n')
    assert sparsify_settings([str(tmp_path / "sparse.yaml")]) == SparsifySettings(pattern="2:4", method="sr-ste")
    assert sparsify_settings(["pattern=2:4", "method=sr-ste"]) == SparsifySettings(pattern="2:4", method="sr-ste")
    assert sparsify_settings([]) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("target=much", "--sparsify target: input should be a valid number"),
        ("method=luck", "--sparsify method: input should be 'magnitude', 'movement' or 'sr-ste'"),
        ("aim=0.5", "--sparsify aim"),
        ("block=[4", "--sparsify block takes a list"),
    ],
)
def test_options_that_are_wrong(given: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        sparsify_settings(["target=0.5", given])
    assert said in caught.value.message


def with_two_processes(*command: str, cwd: Path) -> None:
    """`limbeck` under `accelerate launch`."""
    options = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options, "-m", "limbeck", *command]
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(launched, cwd=cwd, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.thorough
def test_two_processes_cut_what_one_does(
    tiny_checkpoint: Callable[..., Path], texts: list[str], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Real processes over gloo: scores are taken from gradients that were averaged, so the masks are those of the whole
    batch (but for weights whose scores are equal within rounding)."""
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts[:44]])
    teacher = str(tiny_checkpoint("bert"))
    given = ["distill", teacher, "--task", "sentence-similarity", "--layers", "1"]
    given += ["--data", str(tmp_path / "rows.jsonl"), "--objective", "embedding-cosine=1", "--max-steps", "8"]
    given += ["--learning-rate", "3e-3", "--sparsify", "target=0.6", "--sparsify", "method=movement"]
    given += ["--sparsify", "every=1"]
    assert _run([*given, "--batch-size", "16", "--out", str(tmp_path / "one")]) == 0
    with_two_processes(*given, "--batch-size", "8", "--out", "two", cwd=tmp_path)
    one, two = matrices(tmp_path / "one"), matrices(tmp_path / "two")
    for name, weight in one.items():
        assert int((weight == 0).sum()) == int((two[name] == 0).sum()) == weight.numel() - round(0.4 * weight.numel())
        same = (weight == 0) == (two[name] == 0)
        assert float(same.float().mean()) > 0.995, name
        np.testing.assert_allclose(two[name][same], weight[same], atol=2e-3)
